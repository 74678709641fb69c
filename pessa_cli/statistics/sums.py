"""The calibration statistics of one attention block: sums over the frames of the calibration data."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pessa_cli.blocks.site import Site
from pessa_cli.ranks.spectra import LEVELS, Trials


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the calibration data for one block; all tensors are float64.

    With G key/value heads, H query heads and head_dim d:
    frames: (), the number of queries.
    queries: (G, d, d), the sum of q q^T over the queries and the query heads of a group; q includes its bias.
    keys: (G, d, d), the sum over queries of the covariance of the keys that the query sees. A covariance is used
    because softmax ignores whatever is common to all keys.
    influence: (G, d, d), the sum over queries of C W_O^T W_O C^T, where C is the covariance of keys and values under
    the query's attention weights: to first order, the squared effect of key errors on the output. Under RoPE it is
    replaced by `pairs`, the Gram matrix of the effects of frequency pairs on the output, see
    `algebra.rope.output_gram`; the one of the two that does not apply is (0, d, d).
    mixtures: (H d, H d), the sum of a a^T, where a is the input of W_O with all heads concatenated.
    mixture: (H d,), the sum of a.
    The others are measured with trial cuts on some of the data:
    output: (), the sum of squares of the block's output.
    tried: (2, LEVELS), the sums of squared differences of that output with these shares of Q-K and of V-O cut.
    harm: (3,), the effect of a trial cut on the model's output (nats, or relative squared errors of hidden states),
    the number of tokens it was measured on, and the sum of squares of the difference that caused it.
    """

    frames: Tensor
    queries: Tensor
    keys: Tensor
    influence: Tensor
    mixtures: Tensor
    mixture: Tensor
    pairs: Tensor
    output: Tensor
    tried: Tensor
    harm: Tensor

    @property
    def trials(self) -> Trials | None:
        """The results of the trial cuts relative to the block's output; None if there were none."""
        output, (done, tokens, moved) = float(self.output), self.harm.tolist()
        if output == 0:
            return None
        qk, vo = ((errors / output).tolist() for errors in self.tried)
        # The harm is 0 for a block that no output depends on, and for one whose output the trial cut did not change.
        return Trials(tuple(qk), tuple(vo), done / tokens * output / moved if tokens and moved else 0.0)

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        return BlockStatistics(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def to(self, device: str | torch.device) -> BlockStatistics:
        return BlockStatistics(*(getattr(self, name).to(device) for name in NAMES))


NAMES = tuple(field.name for field in fields(BlockStatistics))


def shapes_of(site: Site) -> tuple[tuple[int, ...], ...]:
    """Return the shapes of the statistics of a block, in the order of NAMES."""
    g, d, n = site.kv_heads, site.head_dim, site.heads * site.head_dim
    head, none, rope = (g, d, d), (0, d, d), site.by_pairs
    influence, pairs = (none, head) if rope else (head, none)
    return (), head, head, influence, (n, n), (n,), pairs, (), (2, len(LEVELS)), (3,)
