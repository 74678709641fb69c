"""How likely a model finds given tokens, and how far its predictions of them are from those of another model.

The tokens are given to the model whatever it would have said (teacher forcing), so both figures change smoothly where
counts of errors jump.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from pessa_cli.algebra.compare import kl_divergence
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.figures import Figure, ratio
from pessa_cli.models.inputs import Inputs


class Passage(NamedTuple):
    """Inputs of a model for one clip or window, and the tokens that its last logits predict, (tokens,)."""

    inputs: Inputs
    targets: Tensor


class First(NamedTuple):
    """The model that others are compared with, and its passages: the same tokens, encoded for this model."""

    model: Any
    passages: Sequence[Passage]


@dataclass(frozen=True)
class Likelihoods:
    """The sums over the tokens of each passage, (passages,), in nats.

    nats: the negative log-likelihood. divergence: the KL divergence from the first model's predictions, None without a
    first model or where the two predict different tokens.
    """

    tokens: NDArray[np.int64]
    nats: NDArray[np.float64]
    divergence: NDArray[np.float64] | None

    @property
    def nats_per_token(self) -> Figure:
        return ratio(self.nats, self.tokens)

    @property
    def divergence_per_token(self) -> Figure | None:
        return None if self.divergence is None else ratio(self.divergence, self.tokens)


@torch.inference_mode()
def likelihoods(
    model: Any, passages: Sequence[Passage], first: First | None, name: str, progress: Progress = quietly
) -> Likelihoods:
    """Run a model, and the first model beside it, on one passage after the other.

    No more than the logits of one passage by both models is in memory. name: of the data, for `progress`.
    """
    compared = first is not None and _same_targets(first.passages, passages)
    nats, divergence = np.zeros(len(passages)), np.zeros(len(passages))
    with progress(name, 0, len(passages)) as tick:
        for i, passage in enumerate(passages):
            logits = _logits(model, passage)
            nats[i] = float(cross_entropy(logits, passage.targets.to(logits.device), reduction="sum"))
            if compared and first is not None:
                reference = logits if first.model is model else _logits(first.model, first.passages[i])
                compared = reference.shape == logits.shape
                divergence[i] = float(kl_divergence(reference, logits).sum()) if compared else 0.0
            tick(0, 1)
    tokens = np.array([len(passage.targets) for passage in passages], dtype=np.int64)
    return Likelihoods(tokens, nats, divergence if compared else None)


def _logits(model: Any, passage: Passage) -> Tensor:
    """The logits that predict the targets of a passage, (tokens, vocabulary), in float32."""
    inputs = {
        key: _placed(value, model) if isinstance(value, Tensor) else value for key, value in passage.inputs.items()
    }
    logits: Tensor = model(**inputs, use_cache=False).logits[0, -len(passage.targets) :]
    return logits.float()


def _placed(tensor: Tensor, model: Any) -> Tensor:
    return tensor.to(model.device, model.dtype if tensor.is_floating_point() else tensor.dtype)


def _same_targets(ours: Sequence[Passage], theirs: Sequence[Passage]) -> bool:
    pairs = zip(ours, theirs, strict=False)
    return len(ours) == len(theirs) and all(torch.equal(a.targets, b.targets) for a, b in pairs)
