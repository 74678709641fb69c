"""The canonical form of a block's weights, which is the same for every file layout.

Files store heads one after the other, as rows of W_Q, W_K and W_V and columns of W_O; a compact file stores only the
kept directions of each head. The canonical form has an axis for key/value heads (G), an axis for the query heads that
share a key/value head (M), and an axis for all `head_dim` directions (d), with zeros for directions that are cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pessa_cli.blocks.compact_format import PairRuns, Ranks

PART_BYTES = 8 * 2**20  # float64 weights per part: few enough for the processor's cache, and for memory to be reused


@dataclass(frozen=True)
class HeadWeights:
    """The weights of one attention block; D_q and D_k are the input widths, D_o is the output width."""

    q: Tensor  # (G, M, d, D_q)
    k: Tensor  # (G, d, D_k)
    v: Tensor  # (G, d, D_k)
    o: Tensor  # (D_o, G, M, d)
    q_bias: Tensor | None = None  # (G, M, d)
    k_bias: Tensor | None = None  # (G, d)
    v_bias: Tensor | None = None  # (G, d)
    o_bias: Tensor | None = None  # (D_o,)

    def to(self, device: str) -> HeadWeights:
        """Return the same weights on another device."""
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in self._tensors().items()}
        return HeadWeights(**moved)

    def _tensors(self) -> dict[str, Tensor | None]:
        return vars(self)

    def parts(self) -> Iterator[HeadWeights]:
        """Yield the block a few key/value heads at a time, so that its float64 form need not fit in memory at once.

        The number of heads per part depends only on the shapes. Each part has the whole output bias.
        """
        one = 8 * sum(tensor[0].numel() for tensor in (self.q, self.k, self.v)) + 8 * self.o[:, 0].numel()
        step = max(1, PART_BYTES // one)
        for start in range(0, len(self.v), step):
            cut = slice(start, start + step)
            by_head: dict[str, Any] = {
                name: None if tensor is None else tensor[cut]
                for name, tensor in self._tensors().items()
                if name not in ("o", "o_bias")
            }
            yield HeadWeights(**by_head, o=self.o[:, cut], o_bias=self.o_bias)


def joined(parts: list[HeadWeights], like: HeadWeights) -> HeadWeights:
    """Concatenate the parts of a block, with the dtypes of `like`; the output bias is taken from the last part."""

    def side(name: str, axis: int = 0) -> Any:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)
        return whole.to(getattr(like, name).dtype)

    letters = {name: side(name) for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias")}
    return HeadWeights(**letters, o=side("o", axis=1), o_bias=parts[-1].o_bias)


def all_finite(tensor: Tensor) -> bool:
    """Return whether no entry is NaN or infinite."""
    # aminmax is enough, and makes no copy: NaN propagates to both results, and an infinity is one of them.
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def live(ranks: Ranks, head_dim: int, repeats: int = 1, pairs: Sequence[PairRuns] | None = None) -> Tensor:
    """Return the indices of the kept directions among `len(ranks) * repeats * head_dim` slots, (repeats * sum(ranks),).

    Each head keeps its first `rank` directions, or with `pairs` those of its frequency pairs; each head is repeated
    `repeats` times.
    """
    if pairs is not None:
        kept = torch.zeros(len(pairs), head_dim // 2, dtype=torch.bool, device="cpu")
        for row, runs in zip(kept, pairs, strict=True):
            for run in runs:
                row[run.start : run.stop] = True
        return torch.cat([kept, kept], -1).repeat_interleave(repeats, 0).flatten().nonzero().squeeze(1)
    each = [rank for rank in ranks for _ in range(repeats)]
    # Always on the CPU, even if a model loader has set another default device, such as meta.
    kept = torch.tensor(each, device="cpu").unsqueeze(1) > torch.arange(head_dim, device="cpu")
    return kept.flatten().nonzero().squeeze(1)
