"""What every measure of model quality has in common: settings, the score, and the interface `Measure`.

A measure encodes its data once, when it is made. It can then score any number of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pessa_cli.common.errors import UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.values import check_device


@dataclass(frozen=True)
class ScoreSettings:
    """How models are scored.

    metric, template: for tasks, the metric and the prompt template. limit: use only the first `limit` questions, clips,
    windows or pairs; 0 uses all. batch: questions, clips or sentences per forward pass. language: the language of the
    speech, for a multilingual Whisper. window, stride: of perplexity, in tokens. new_tokens: maximum length of one
    transcript in tokens; 0 allows half of the decoder's positions, as openai-whisper does.
    """

    metric: str = "likelihood"
    limit: int = 0
    batch: int = 16
    template: str = "alpaca"
    dtype: str = "float32"
    device: str = "cpu"
    language: str | None = None
    window: int = 512
    stride: int = 256
    new_tokens: int = 0

    def __post_init__(self) -> None:
        check_device(self.device, self.dtype)
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch}: a batch needs at least 1 input", "give 1 or more")
        check_device(self.device, self.dtype)
        if self.limit < 0:
            raise UsageError(f"--limit {self.limit} is negative", "give 1 or more, or 0 to use all data")
        if not 1 <= self.stride <= self.window or self.window < 2:
            raise UsageError(
                f"--window {self.window} with --stride {self.stride} would skip tokens",
                "give a window of at least 2 tokens, and a stride between 1 and the window",
            )

    @property
    def first(self) -> slice:
        """The slice of a list that `limit` selects."""
        return slice(self.limit or None)


@dataclass(frozen=True)
class Score:
    """The score of one model on one data set.

    metric: the name of the value, for example "word error rate". how: the settings that the value depends on, in words.
    data: the name of the data set. counts: the numbers behind the value, the amount of data first, for example
    {"clips": 12, "words": 187, "errors": 4}.
    """

    metric: str
    how: str
    data: str
    value: float
    counts: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "how": self.how, "data": self.data, **self.counts}


class Measure(Protocol):
    """A data set encoded with one tokenizer or processor. Scoring a model reads no file and encodes no input."""

    @property
    def name(self) -> str:
        """The name of the data set."""

    @property
    def sources(self) -> dict[str, str]:
        """The SHA-256 of each file that the score depends on, by file name."""

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Score a loaded model, which is in eval mode on its device and is not changed."""
