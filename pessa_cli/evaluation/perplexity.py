"""Perplexity of a language model on text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
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
    """A `Measure`: documents encoded with one tokenizer."""

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

    @torch.inference_mode()
    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Compute exp of the mean negative log-likelihood of all predicted tokens.

        Windows start `stride` tokens apart. Each token counts in the first window that predicts it, as in
        https://huggingface.co/docs/transformers/perplexity. Windows run one at a time because their logits are large.
        """
        window = min(self.settings.window, getattr(model.config, "max_position_embeddings", self.settings.window))
        stride = min(self.settings.stride, window)
        steps = ((ids, *span) for ids in self.documents for span in windows(len(ids), window, stride))
        chosen = list(islice(steps, self.settings.limit or None))
        tokens, loss = 0, 0.0
        with progress(self.name, 0, len(chosen)) as tick:
            for ids, start, new, end in chosen:
                given = ids[None, start:end].to(model.device)
                logits = model(input_ids=given, use_cache=False, logits_to_keep=end - new + 1).logits[0, :-1].float()
                loss += float(cross_entropy(logits, given[0, new - start :], reduction="sum"))
                tokens += end - new
                tick(0, 1)
        value = float(torch.tensor(loss / tokens, dtype=torch.float64).exp())  # math.exp would raise on overflow
        counts = {"tokens": tokens, "windows": len(chosen), "window": window, "stride": stride}
        return Score("perplexity", f"windows of {window} tokens, stride {stride}", self.name, value, counts)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, first scored token, end) of each window over a document of `length` tokens."""
    new = 1  # the first token of a document has no context
    for start in range(0, length, stride):
        end = min(start + window, length)
        # When the stride equals the window, the first token of each window has no context and is not scored.
        yield start, max(new, start + 1), end
        if end == length:
            return
        new = end
