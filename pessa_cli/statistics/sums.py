"""What calibration data makes of an attention block: sums over its frames."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from pessa_cli.blocks.site import Site
from pessa_cli.ranks.spectra import LEVELS, Trials


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the calibration data for one block, float64.

    frames: (), how many queries there were. queries: (G, d, d), of q q^T over queries and the query heads of a group,
    their bias included. keys: (G, d, d), of the covariance of the keys that each query sees, which leaves out what is
    common to all of them, as softmax does. influence: (G, d, d), of what an error of the keys does to the output, to
    first order: C W_O^T W_O C^T, where C is the covariance of keys and values under a query's own attention; under RoPE
    there is instead `pairs`, the Gram matrix of what frequency pairs add to the output, see `rope.output_gram`. Of the
    two the one that does not apply is (0, d, d).
    mixtures: (H d, H d), of a a^T where a is what goes into W_O, all heads one after the other; mixture: (H d,), of a.
    From trials on some of the data: output, (), squares of what the block puts out; tried: (2, LEVELS), squares of the
    difference with that share of Q-K and of V-O cut; harm: (3,), what a difference does to the model's output (nats,
    or the relative squared error of hidden states), over how many tokens, and the squares of that difference.
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
        """What the trials say, None without any."""
        output, (done, tokens, moved) = float(self.output), self.harm.tolist()
        if output == 0:
            return None
        qk, vo = ((errors / output).tolist() for errors in self.tried)
        # A block that nothing comes of any more, and one that cannot be moved, do no harm.
        return Trials(tuple(qk), tuple(vo), done / tokens * output / moved if tokens and moved else 0.0)

    def __add__(self, other: BlockStatistics) -> BlockStatistics:
        return BlockStatistics(*(getattr(self, name) + getattr(other, name) for name in NAMES))

    def to(self, device: str | torch.device) -> BlockStatistics:
        return BlockStatistics(*(getattr(self, name).to(device) for name in NAMES))


NAMES = tuple(field.name for field in fields(BlockStatistics))


def shapes_of(site: Site) -> tuple[tuple[int, ...], ...]:
    """Of the statistics of a block, in the order of NAMES."""
    g, d, n = site.kv_heads, site.head_dim, site.heads * site.head_dim
    head, none, rope = (g, d, d), (0, d, d), site.by_pairs
    influence, pairs = (none, head) if rope else (head, none)
    return (), head, head, influence, (n, n), (n,), pairs, (), (2, len(LEVELS)), (3,)
