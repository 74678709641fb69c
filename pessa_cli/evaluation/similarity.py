"""Sentence similarity: the rank correlation between an encoder's cosine similarities and human ratings."""

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
from pessa_cli.evaluation.figures import Figure
from pessa_cli.evaluation.measures import Score, ScoreSettings
from pessa_cli.models.inputs import Inputs

Pooling = Literal["mean", "cls"]
POOLINGS: dict[str, Pooling] = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
LAYERS = ("Transformer", "Pooling", "Normalize")  # supported sentence-transformers modules; Normalize keeps cosines


@dataclass(frozen=True)
class Embedding:
    """How token vectors are pooled into a sentence embedding, and after how many tokens a sentence is truncated."""

    pooling: Pooling = "mean"
    tokens: int = 512


@dataclass(frozen=True)
class SentencePairs:
    """The rows of one CSV file, not yet encoded, with the SHA-256 of the file."""

    path: Path
    rows: Sequence[tuple[str, str, float]]  # two sentences and their similarity
    sha256: str


def read_pairs(path: Path) -> SentencePairs:
    """Read CSV rows of sentence, sentence, similarity. Raises PessaError listing the rows of another form."""
    return SentencePairs(path, _read(path), sha256_of(path))


@dataclass(frozen=True)
class Similarity:
    """A `Measure`: pairs of sentences encoded with one tokenizer, and the similarity that people gave each pair.

    batches: sentences of about the same length. places: the index of each batched sentence in the list of all first
    sentences followed by all second sentences.
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
        """Read and encode a CSV file; see `read_pairs` and `of` for its form and for the errors."""
        return cls.of(read_pairs(path), tokenizer, settings or ScoreSettings(), embedding or Embedding())

    @classmethod
    def of(cls, pairs: SentencePairs, tokenizer: Any, settings: ScoreSettings, embedding: Embedding) -> Similarity:
        """Encode pairs. Raises PessaError when all similarities are equal, as a correlation is then undefined."""
        rows = pairs.rows[settings.first]
        similarities = np.array([similarity for _, _, similarity in rows])
        if len(set(similarities)) < 2:
            raise PessaError(
                f"the {len(rows)} pairs of {pairs.path} all have the same similarity",
                "give pairs of at least two different similarities",
            )
        sentences = [a for a, _, _ in rows] + [b for _, b, _ in rows]
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        batches: list[Inputs] = []
        for start in range(0, len(order), settings.batch):
            some = [sentences[i] for i in order[start : start + settings.batch]]
            options = {"padding": True, "truncation": True, "max_length": embedding.tokens, "return_tensors": "pt"}
            batches.append(dict(tokenizer(some, **options)))
        sources = {str(pairs.path): pairs.sha256}
        return cls(pairs.path.name, batches, torch.tensor(order), similarities, sources, embedding)

    @torch.inference_mode()
    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Compute Spearman's rank correlation between the given similarities and the cosines of the embeddings."""
        found = []
        with progress(self.name, 0, len(self.places)) as tick:
            for batch in self.batches:
                inputs = {key: value.to(model.device) for key, value in batch.items()}
                hidden = model(**inputs, output_hidden_states=True).hidden_states[-1].float()  # (sentences, tokens, D)
                mask = inputs["attention_mask"][:, :, None]
                mean = (hidden * mask).sum(1) / mask.sum(1)
                found.append((hidden[:, 0] if self.embedding.pooling == "cls" else mean).cpu())
                tick(0, len(hidden))
        vectors = torch.empty(len(self.places), found[0].shape[1])
        vectors[self.places] = torch.cat(found)
        first, second = vectors.chunk(2)
        given, cosines = self.similarities, cosine_similarity(first, second).numpy()
        figure = Figure(len(given), lambda indices: spearman(given[indices], cosines[indices]))
        how = f"cosine of {self.embedding.pooling}-pooled embeddings"
        return Score("Spearman correlation", how, self.name, {"pairs": len(given)}, figure)


def spearman(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Spearman's rank correlation of two lists; ties share their mean rank. NaN when all values of one are equal."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


def _read(path: Path) -> list[tuple[str, str, float]]:
    """The rows of a CSV file; the first one may be a heading."""
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
        what = f"{len(wrong)} rows of {path} are not pairs\n{listed(wrong)}" if wrong else f"{path} contains no pairs"
        raise PessaError(what, "write each row as: sentence, sentence, similarity")
    return rows


def embedding_of(folder: Path, config: Mapping[str, Any]) -> Embedding:
    """The pooling and the maximum length that a sentence-transformers folder specifies; by default mean pooling.

    Raises PessaError when the folder uses another pooling or further modules, or when its files are malformed.
    """
    try:
        modules = _json(folder / "modules.json", [])
        pooling = _json(folder / "1_Pooling" / "config.json", {"pooling_mode_mean_tokens": True})
        cut = int(_json(folder / "sentence_bert_config.json", {}).get("max_seq_length") or Embedding.tokens)
        chosen = [key for key, value in pooling.items() if key.startswith("pooling_mode_") and value is True]
        layers = [str(module["type"]) for module in modules]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PessaError(
            f"the sentence-transformers files of {folder} are malformed: {error!r}",
            "restore modules.json, sentence_bert_config.json and 1_Pooling/config.json, or remove them",
        ) from error
    unknown = [layer for layer in layers if layer.rpartition(".")[2] not in LAYERS]
    unknown += [key for key in chosen if key not in POOLINGS]
    if unknown or len(chosen) != 1:
        raise PessaError(
            f"{folder} computes its embeddings in an unsupported way: {', '.join(unknown or chosen) or 'no pooling'}",
            "pessa eval supports mean pooling and the first token (CLS), without further layers",
        )
    return Embedding(POOLINGS[chosen[0]], min(cut, config.get("max_position_embeddings", cut)))


def _json(path: Path, otherwise: Any) -> Any:
    return json.loads(read_text(path, "restore it or remove it")) if path.is_file() else otherwise
