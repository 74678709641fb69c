"""Sentence similarity: whether an encoder's embeddings order pairs of sentences as people do."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cosine_similarity

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import listed, read_text
from pessa_cli.evaluation.measures import Score, ScoreSettings
from pessa_cli.models.inputs import Inputs

Pooling = Literal["mean", "cls"]
POOLINGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
LAYERS = ("Transformer", "Pooling", "Normalize")  # of sentence-transformers; the last changes no cosine


@dataclass(frozen=True)
class Embedding:
    """How the vector of a sentence comes from those of its tokens, and after how many of them it is cut."""

    pooling: Pooling = "mean"
    tokens: int = 512


@dataclass(frozen=True)
class Similarity:
    """Pairs of sentences with their similarities, as token ids of one tokenizer: a Measure.

    batches: sentences of about the same length; places: which of the first and then the second sentences they are.
    """

    name: str
    batches: Sequence[Inputs]
    places: Tensor
    similarities: NDArray[np.float64]
    sources: dict[str, str]
    embedding: Embedding

    @classmethod
    def load(
        cls, path: Path, tokenizer: Any, settings: ScoreSettings | None = None, embedding: Embedding | None = None
    ) -> Similarity:
        """CSV of sentence, sentence, similarity. Raises PessaError for lines that are not, and when all are alike."""
        settings, embedding = settings or ScoreSettings(), embedding or Embedding()
        rows = _read(path)[settings.first]
        similarities = np.array([similarity for _, _, similarity in rows])
        if len(set(similarities)) < 2:
            raise PessaError(f"the {len(rows)} pairs of {path} are all as similar", "there is no order in them")
        sentences = [a for a, _, _ in rows] + [b for _, b, _ in rows]
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        batches: list[Inputs] = []
        for start in range(0, len(order), settings.batch):
            some = [sentences[i] for i in order[start : start + settings.batch]]
            options = {"padding": True, "truncation": True, "max_length": embedding.tokens, "return_tensors": "pt"}
            batches.append(dict(tokenizer(some, **options)))
        return cls(path.name, batches, torch.tensor(order), similarities, {str(path): sha256_of(path)}, embedding)

    @torch.inference_mode()
    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Spearman's correlation of the given similarities with the cosines of the embeddings."""
        found = []
        with progress(self.name, len(self.places), 1) as tick:
            for batch in self.batches:
                inputs = {key: value.to(model.device) for key, value in batch.items()}
                hidden = model(**inputs, output_hidden_states=True).hidden_states[-1].float()  # (sentences, tokens, D)
                mask = inputs["attention_mask"][:, :, None]
                mean = (hidden * mask).sum(1) / mask.sum(1)
                found.append((hidden[:, 0] if self.embedding.pooling == "cls" else mean).cpu())
                tick(len(hidden), 0)
        vectors = torch.empty(len(self.places), found[0].shape[1])
        vectors[self.places] = torch.cat(found)
        first, second = vectors.chunk(2)
        value = spearman(self.similarities, cosine_similarity(first, second).numpy())
        how = f"cosine of {self.embedding.pooling}-pooled embeddings"
        return Score("Spearman correlation", how, self.name, value, {"pairs": len(self.similarities)})


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Pearson's correlation of the ranks; values that are equal share their mean rank. NaN where all of them are."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def _read(path: Path) -> list[tuple[str, str, float]]:
    """The lines of a CSV file; the first may be a heading."""
    rows: list[tuple[str, str, float]] = []
    wrong = []
    for number, row in enumerate(csv.reader(StringIO(read_text(path, "give a CSV file"), newline="")), 1):
        try:
            first, second, similarity = row
            rows.append((first, second, float(similarity)))
        except ValueError:
            if row and not (number == 1 and len(row) == 3):
                wrong.append(f"row {number}: {str(row)[:80]}")
    if wrong or not rows:
        what = f"{len(wrong)} rows of {path} are no pairs\n{listed(wrong)}" if wrong else f"{path} holds no pairs"
        raise PessaError(what, "a row is: sentence, sentence, similarity")
    return rows


def embedding_of(folder: Path, config: Mapping[str, Any]) -> Embedding:
    """What a folder of sentence-transformers asks for; the mean of all tokens where it does not say.

    Raises PessaError for what is not known here: other poolings, and layers on top.
    """
    try:
        modules = _json(folder / "modules.json", [])
        pooling = _json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
        cut = int(_json(folder / "sentence_bert_config.json", {}).get("max_seq_length") or Embedding.tokens)
        chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
        layers = [str(module["type"]) for module in modules]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PessaError(
            f"{folder} is not as sentence-transformers writes it: {error!r}",
            "restore modules.json, sentence_bert_config.json and 1_Pooling/config.json, or remove them",
        ) from None
    unknown = [layer for layer in layers if layer.rpartition(".")[2] not in LAYERS]
    unknown += [key for key in chosen if key not in POOLINGS]
    if unknown or len(chosen) != 1:
        raise PessaError(
            f"{folder} makes its embeddings in another way: {', '.join(unknown or chosen)}",
            "pessa eval knows the mean of all tokens and the first one",
        )
    return Embedding(POOLINGS[chosen[0]], min(cut, config.get("max_position_embeddings", cut)))


def _json(path: Path, otherwise: Any) -> Any:
    return json.loads(read_text(path, "restore it or remove it")) if path.is_file() else otherwise
