"""What every measure of model quality has in common: settings, the score, and the interface `Measure`.

A measure encodes its data once, when it is made. It can then score any number of models. Measures whose data are tokens
that a model predicts are also a `TokenMeasure`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from pessa_cli.common.errors import UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.values import check_device
from pessa_cli.evaluation.figures import Figure
from pessa_cli.evaluation.likelihood import First, Passage


@dataclass(frozen=True)
class ScoreSettings:
    """How models are scored.

    metric, template: for tasks, the metric and the prompt template. limit: use only the first `limit` questions, clips,
    windows or pairs; 0 uses all. batch: questions, clips or sentences per forward pass. language: the language of the
    speech, for a multilingual Whisper. window, stride: of perplexity, in tokens. new_tokens: maximum length of one
    transcript in tokens; 0 allows half of the decoder's positions, as openai-whisper does. kl: whether models are
    compared with the first one token by token, for which both have to be in memory.
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
    kl: bool = True

    def __post_init__(self) -> None:
        check_device(self.device, self.dtype)
        if self.batch < 1:
            raise UsageError(f"--batch {self.batch}: a batch needs at least 1 input", "give 1 or more")
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

    metric: the name of the figure, for example "word error rate". how: the settings that it depends on, in words. data:
    the name of the data set. counts: the numbers behind the figure, the amount of data first, for example
    {"clips": 12, "words": 187, "errors": 4}. nats: the negative log-likelihood per token. divergence: per token, from
    the first model of a comparison. Both are None where they were not measured. about_nats: their data, in words.
    """

    metric: str
    how: str
    data: str
    counts: Mapping[str, int]
    figure: Figure
    nats: Figure | None = None
    divergence: Figure | None = None
    about_nats: str = ""

    @property
    def value(self) -> float:
        return self.figure.value

    @property
    def figures(self) -> dict[str, Figure]:
        """The figures by their names: the metric, and those that were measured beside it."""
        others = {NATS: self.nats, DIVERGENCE: self.divergence}
        return {self.metric: self.figure} | {name: figure for name, figure in others.items() if figure is not None}

    def changes(self, first: Score) -> dict[str, Figure]:
        """The differences to the first model's figures, by name, where both were measured on the same items."""
        mine, theirs = ({n: f for n, f in score.figures.items() if n != DIVERGENCE} for score in (self, first))
        return {
            name: f.less(theirs[name]) for name, f in mine.items() if name in theirs and f.items == theirs[name].items
        }

    def to_dict(self, first: Score | None = None) -> dict[str, Any]:
        """The score as JSON. first: the first model's, unless this is it."""
        found = {KEYS.get(name, name): figure.to_dict() for name, figure in self.figures.items()}
        for name, change in ({} if first is None else self.changes(first)).items():
            found[KEYS.get(name, name)]["difference"] = change.to_dict()
        named = {"metric": self.metric, "how": self.how, "data": self.data, **self.counts}
        return named | found.pop(self.metric) | found


NATS, DIVERGENCE = "nats per token", "KL to the first"
KEYS = {NATS: "nats_per_token", DIVERGENCE: "kl_to_first"}  # in JSON


class Measure(Protocol):
    """A data set encoded with one tokenizer or processor. Scoring a model reads no file and encodes no input."""

    @property
    def name(self) -> str:
        """The name of the data set."""

    @property
    def sources(self) -> dict[str, str]:
        """The SHA-256 of each file that the score depends on, by file name."""

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Score a loaded model, which is in eval mode on its device and is not changed, by the metric alone."""


@runtime_checkable
class TokenMeasure(Measure, Protocol):
    """A measure whose data are tokens that a model predicts."""

    def passages(self, model: Any) -> Sequence[Passage]:
        """Encode the tokens for a loaded model."""

    def score_tokens(
        self, model: Any, passages: Sequence[Passage], first: First | None = None, progress: Progress = quietly
    ) -> Score:
        """As `score`, with the nats per token, and with the divergence from a first model.

        passages: those of `model`.
        """
