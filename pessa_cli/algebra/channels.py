"""The canonical form of an MLP's weights, which is the same for every file layout, and the values of its channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.algebra.weighted import NEGLIGIBLE, scales

LEAST_BATCH, BATCHES = 16, 64  # channels removed at a time: at least so many, or one of so many parts of all


@dataclass(frozen=True)
class ChannelWeights:
    """The weights of one MLP with F channels, each written by P matrices (2 if it is gated) and read by one."""

    into: Tensor  # (P, F, D)
    out: Tensor  # (D_o, F)
    into_bias: Tensor | None = None  # (P, F)
    out_bias: Tensor | None = None  # (D_o,)

    def to(self, device: str | torch.device) -> ChannelWeights:
        """Return the same weights on another device."""
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in vars(self).items()}
        return ChannelWeights(**moved)

    def ordered(self, order: Tensor) -> ChannelWeights:
        """Return the weights of these channels, in this order; with all of them it is the same function."""
        bias = None if self.into_bias is None else self.into_bias[:, order]
        return ChannelWeights(self.into[:, order], self.out[:, order], bias, self.out_bias)

    def restored(self, order: Tensor) -> ChannelWeights:
        """Undo `ordered`: return the channels in the order in which those of `order` had their numbers."""
        return self.ordered(order.argsort())


Weights = HeadWeights | ChannelWeights  # the canonical forms of the two kinds of blocks


def channel_norms(weights: ChannelWeights) -> Tensor:
    """Return the product of the L2 norms of all vectors of each channel, (F,): of its rows with their bias, and column.

    It ranks channels by the weights alone, as the paper's baseline ranks the dimensions of heads.
    """
    rows = weights.into.double()
    if weights.into_bias is not None:
        rows = torch.cat([rows, weights.into_bias.double().unsqueeze(-1)], -1)
    norms: Tensor = rows.norm(dim=-1).prod(0) * weights.out.double().norm(dim=0)
    return norms


def removal_order(moment: Tensor, out: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Return the channels in the order of a greedy removal, the last removed first, and the error that each adds.

    moment: (F, F), the second moment of the values of the channels. out: (D_o, F), the matrix that reads them, with its
    rows weighed by the importance of the outputs. After each removal the others make up for it, by the ridge regression
    of `algebra.weighted.refitted`, so the error of removing channel q is `|w_q|^2 / [H^-1]_qq`, where H is the moment
    with the ridge and w_q the column as refitted so far. Source: Optimal Brain Surgeon (Hassibi and Stork, 1992), for
    columns as in SparseGPT (Frantar and Alistarh, arXiv 2301.00774).

    Returns (F,) numbers of channels and (F,) squared errors, float64. The channels are removed in batches of those that
    are the least important before the batch, and greedily within it, in O(F^3).
    """
    batch = max(LEAST_BATCH, len(moment) // BATCHES)
    scale, inverse = scales(moment)
    columns = out.double() * scale
    correlations = inverse.unsqueeze(-1) * moment * inverse
    # A channel that is always zero is uncorrelated with all others and read by nothing.
    correlations.diagonal().add_(torch.where(scale > 0, ridge + NEGLIGIBLE, 1.0))
    precision = torch.cholesky_inverse(torch.linalg.cholesky(correlations))
    left = torch.arange(len(moment), device=moment.device)
    removed: list[Tensor] = []
    errors: list[float] = []
    while len(left):
        scores = columns.square().sum(0) / precision.diagonal()
        picked = scores.topk(min(batch, len(left)), largest=False).indices
        order, added = _greedy(precision[picked][:, picked], columns[:, picked])
        removed.append(left[picked[order]])
        errors += added
        rest = torch.ones(len(left), dtype=torch.bool, device=left.device)
        rest[picked] = False
        across = precision[picked][:, rest]
        solved = torch.linalg.solve(precision[picked][:, picked], across)
        columns = columns[:, rest] - columns[:, picked] @ solved
        precision = precision[rest][:, rest] - across.mT @ solved
        left = left[rest]
    return torch.cat(removed).flip(0), torch.tensor(errors, dtype=torch.float64).flip(0)


def _greedy(precision: Tensor, columns: Tensor) -> tuple[Tensor, list[float]]:
    """Return the order in which a few channels are removed one by one, and the squared error that each removal adds."""
    precision, columns = precision.clone(), columns.clone()
    gone = torch.zeros(len(precision), dtype=torch.bool, device=precision.device)
    order, errors = [], []
    for _ in range(len(precision)):
        scores = (columns.square().sum(0) / precision.diagonal()).masked_fill(gone, torch.inf)
        worst = int(scores.argmin())
        order.append(worst)
        errors.append(float(scores[worst]))
        gone[worst] = True
        row = precision[worst] / precision[worst, worst]
        columns -= torch.outer(columns[:, worst], row)
        precision -= torch.outer(precision[:, worst], row)
        precision[worst], precision[:, worst], precision[worst, worst] = 0.0, 0.0, 1.0
    return torch.tensor(order, device=precision.device), errors
