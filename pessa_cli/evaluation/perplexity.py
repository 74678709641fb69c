"""Perplexity of a language model on text, and how far its predictions are from those of another model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.figures import Figure, Indices
from pessa_cli.evaluation.likelihood import First, Passage, likelihoods
from pessa_cli.evaluation.measures import Score, ScoreSettings
from pessa_cli.models.data import read_data


@dataclass(frozen=True)
class Documents:
    """The texts of one file, not yet encoded, with the SHA-256 of the file."""

    path: Path
    texts: Sequence[str]
    sha256: str


def read_documents(path: Path) -> Documents:
    """Read a text file as one document, or JSON lines with one document {"text": "..."} per line.

    Raises PessaError when the file cannot be read or contains audio.
    """
    items, _ = read_data([path])
    if any(item.audio for item in items):
        raise PessaError(
            f"{path} contains audio, but perplexity needs text", 'give a text file, or JSON lines: {"text": "..."}'
        )
    return Documents(path, [item.text or "" for item in items], next((item.sha256 for item in items), ""))


@dataclass(frozen=True)
class Perplexity:
    """A `TokenMeasure`: documents encoded with one tokenizer."""

    name: str
    documents: Sequence[Tensor]
    sources: dict[str, str]
    settings: ScoreSettings

    @classmethod
    def load(cls, path: Path, tokenizer: Any, settings: ScoreSettings | None = None) -> Perplexity:
        """Read and encode a file; see `read_documents` and `of` for its form and for the errors."""
        return cls.of(read_documents(path), tokenizer, settings or ScoreSettings())

    @classmethod
    def of(cls, read: Documents, tokenizer: Any, settings: ScoreSettings) -> Perplexity:
        """Encode documents, with the special tokens that the tokenizer adds.

        Raises PessaError when every document has fewer than two tokens: the first token of a document is never
        predicted.
        """
        # Documents may be longer than the model's context, so the tokenizer's warning about their length is turned off.
        encoded = [tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0] for text in read.texts]
        documents = [ids for ids in encoded if len(ids) > 1]
        if not documents:
            raise PessaError(f"{read.path} is too short to score", "give a text of at least two tokens")
        return cls(read.path.name, documents, {str(read.path): read.sha256}, settings)

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Compute exp of the mean negative log-likelihood of all predicted tokens.

        Windows start `stride` tokens apart. Each token counts in the first window that predicts it, as in
        https://huggingface.co/docs/transformers/perplexity. Windows run one at a time because their logits are large.
        """
        return replace(self.score_tokens(model, self.passages(model), None, progress), nats=None)

    def score_tokens(
        self, model: Any, passages: Sequence[Passage], first: First | None = None, progress: Progress = quietly
    ) -> Score:
        """Compute the perplexity, its logarithm, and the divergence from a first model."""
        found = likelihoods(model, passages, first, self.name, progress)
        nats, (window, stride) = found.nats_per_token, self._spans(model)

        def perplexity(indices: Indices) -> float:
            with np.errstate(over="ignore"):
                return float(np.exp(nats.of(indices)))

        return Score(
            metric="perplexity",
            how=f"windows of {window} tokens, stride {stride}",
            data=self.name,
            counts={"tokens": int(found.tokens.sum()), "windows": nats.items, "window": window, "stride": stride},
            figure=Figure(nats.items, perplexity),
            nats=nats,
            divergence=found.divergence_per_token,
        )

    def passages(self, model: Any) -> list[Passage]:
        """The windows in which the model predicts tokens, at most the first `settings.limit`."""
        spans = self._spans(model)
        steps = ((ids, *span) for ids in self.documents for span in windows(len(ids), *spans))
        return [
            # The last token is predicted, but predicts nothing.
            Passage({"input_ids": ids[None, start : end - 1], "logits_to_keep": end - new}, ids[new:end])
            for ids, start, new, end in islice(steps, self.settings.limit or None)
        ]

    def _spans(self, model: Any) -> tuple[int, int]:
        """The window and the stride, which cannot be longer than the model's positions."""
        window = min(self.settings.window, getattr(model.config, "max_position_embeddings", self.settings.window))
        return window, min(self.settings.stride, window)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first scored token, end) of each window over a document of `length` tokens that scores any."""
    new = 1  # the first token of a document has no context
    for start in range(0, length, stride):
        end = min(start + window, length)
        # When the stride equals the window, the first token of each window has no context and is not scored.
        if max(new, start + 1) < end:
            yield start, max(new, start + 1), end
        if end == length:
            return
        new = end
