"""Perplexity: how surprised a language model is by text."""

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
class Perplexity:
    """Documents as token ids of one tokenizer: a Measure."""

    name: str
    documents: Sequence[Tensor]
    sources: dict[str, str]
    settings: ScoreSettings

    @classmethod
    def load(cls, path: Path, tokenizer: Any, settings: ScoreSettings | None = None) -> Perplexity:
        """A text file as one document, or JSON lines, each {"text": "..."}; special tokens as the tokenizer adds them.

        Raises PessaError when no document has two tokens: nothing foretells the first one.
        """
        items, hashes = read_data([path])
        if any(item.audio for item in items):
            raise PessaError(f"{path} holds audio", 'give a text file, or JSON lines: {"text": "..."}')
        # Long documents are meant to be: the tokenizer's warning about them is not.
        encoded = [tokenizer(item.text or "", return_tensors="pt", verbose=False)["input_ids"][0] for item in items]
        documents = [ids for ids in encoded if len(ids) > 1]
        if not documents:
            raise PessaError(f"{path} is too short", "give a text of two tokens or more")
        return cls(path.name, documents, {str(path): hashes[0]}, settings or ScoreSettings())

    @torch.inference_mode()
    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """exp of the mean negative log-likelihood of all tokens that have one before them.

        Each window of tokens begins `stride` after the last one, and only what that did not have counts:
        https://huggingface.co/docs/transformers/perplexity. Windows go one by one, since logits are large.
        """
        window = min(self.settings.window, getattr(model.config, "max_position_embeddings", self.settings.window))
        stride = min(self.settings.stride, window)
        steps = ((ids, *span) for ids in self.documents for span in windows(len(ids), window, stride))
        chosen = list(islice(steps, self.settings.limit or None))
        tokens, loss = 0, 0.0
        with progress(self.name, len(chosen), 1) as tick:
            for ids, start, new, end in chosen:
                given = ids[None, start:end].to(model.device)
                logits = model(input_ids=given, use_cache=False, logits_to_keep=end - new + 1).logits[0, :-1].float()
                loss += float(cross_entropy(logits, given[0, new - start :], reduction="sum"))
                tokens += end - new
                tick(1, 0)
        value = float(torch.tensor(loss / tokens, dtype=torch.float64).exp())  # infinite where math.exp would raise
        counts = {"tokens": tokens, "windows": len(chosen), "window": window, "stride": stride}
        return Score("perplexity", f"windows of {window} tokens, stride {stride}", self.name, value, counts)


def windows(length: int, window: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """For each window of a document: where it begins, where in it begins what counts, and where it ends."""
    new = 1  # nothing foretells the first token
    for start in range(0, length, stride):
        end = min(start + window, length)
        # With a stride of a whole window its first token has nothing before it.
        yield start, max(new, start + 1), end
        if end == length:
            return
        new = end
