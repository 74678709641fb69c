"""What all measures of a model's quality share: data are made ready once, and models are scored again and again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from pessa_cli.common.errors import UsageError
from pessa_cli.common.progress import Progress, quietly


@dataclass(frozen=True)
class ScoreSettings:
    """How models are scored.

    metric, template: of tasks; language: of speech, for a multilingual model; window, stride: of text, in tokens;
    limit: the first questions, clips, windows and pairs only, 0 for all; batch: questions, clips, sentences at a time;
    new_tokens: the longest transcript of a window, 0 for half of what the decoder holds, as openai-whisper does it.
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
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch} is no number of questions", "give 1 or more")
        if self.limit < 0:
            raise UsageError(f"--limit {self.limit} is no number of questions", "give 1 or more, or 0 for all")
        if not 1 <= self.stride <= self.window or self.window < 2:
            raise UsageError(
                f"--window {self.window} and --stride {self.stride} leave tokens out",
                "give a window of 2 tokens or more, and a stride from 1 to the window",
            )

    @property
    def first(self) -> slice:
        """What of a list `limit` leaves."""
        return slice(self.limit or None)


@dataclass(frozen=True)
class Score:
    """What a model is worth on some data.

    metric: what the value is, as "word error rate"; how: what it depends on, in words; counts: what it was made of,
    the amount of data first, as {"clips": 12, "words": 187, "errors": 4}.
    """

    metric: str
    how: str
    data: str
    value: float
    counts: Mapping[str, int]

    def to_dict(self) -> dict[str, Any]:
        return {"metric": self.metric, "value": self.value, "how": self.how, "data": self.data, **self.counts}


class Measure(Protocol):
    """Data made ready for the models of one tokenizer or processor. Scoring reads no file and encodes nothing."""

    @property
    def name(self) -> str:
        """That of the data."""

    @property
    def sources(self) -> dict[str, str]:
        """The SHA-256 of each file whose content counts, by its name."""

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """The model, loaded and in eval mode on its device, is left as it is."""
