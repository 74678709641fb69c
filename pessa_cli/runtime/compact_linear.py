"""Ragged projections: linear layers that store only the kept directions of each head and still look full-width.

Between them the stock attention code sees slots of the original head_dim, zero where a direction was cut, so its
caches, masks and kernels run unchanged and the softmax scale stays that of the original head_dim. `attention` asks
them for other slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pessa_cli.algebra.heads import live
from pessa_cli.blocks.compact_format import Ragged

FEW_ROWS = 64


@dataclass(frozen=True)
class Slots:
    """Columns to be set side by side: `index` names for each slot the column it takes, or their number for zeros.

    `pieces` are the same as runs of columns, (first column, how many), the first None for zeros: copying those is four
    times as fast as picking columns one by one, but for few rows not worth so many steps.
    """

    index: Tensor
    pieces: tuple[tuple[int | None, int], ...]

    @staticmethod
    def of(index: Tensor, columns: int) -> Slots:
        pieces: list[tuple[int | None, int]] = []
        for column in index.tolist():
            first, length = pieces[-1] if pieces else (-1, 0)
            follows = column == columns if first is None else column == first + length < columns
            if follows and length:
                pieces[-1] = first, length + 1
            else:
                pieces.append((None if column == columns else column, 1))
        return Slots(index, tuple(pieces))

    def to(self, device: torch.device) -> Slots:
        return Slots(self.index.to(device), self.pieces)

    def fill(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., slots)."""
        if self.pieces == ((0, x.shape[-1]),):
            return x
        if x.shape[:-1].numel() < FEW_ROWS or not x.is_cpu:
            index = self.index if self.index.device == x.device else self.index.to(x.device)
            zeros = any(first is None for first, _ in self.pieces)
            return (nn.functional.pad(x, (0, 1)) if zeros else x).index_select(-1, index)
        widest = max([0, *(length for first, length in self.pieces if first is None)])
        zero = x.new_zeros(*x.shape[:-1], widest)
        parts = [(zero if first is None else x).narrow(-1, first or 0, length) for first, length in self.pieces]
        return torch.cat(parts, -1) if parts else x[..., :0]


class _RaggedLinear(nn.Linear):
    """A linear layer with some of its rows or columns left out; reports the full in_features and out_features."""

    slots: Slots  # a plain attribute: transformers overwrites buffers that no checkpoint holds
    ragged: Ragged

    def _adopt(self, ragged: Ragged, slots: Slots) -> None:
        self.ragged = ragged
        self.slots = slots

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.to_device(self.weight.device)
        return self

    def to_device(self, device: torch.device) -> None:
        """Keep the slots beside the weight; what is on meta has no place yet."""
        if device.type != "meta":
            self.slots = self.slots.to(device)


def ragged_module(module: Any, ragged: Ragged) -> _RaggedLinear:
    """What takes the place of a linear layer, or of a Conv1D, which has its weight the other way round."""
    kind = RaggedOut if ragged.side == "rows" else RaggedIn
    if isinstance(module, nn.Linear):
        return kind(module, ragged)
    inputs, outputs = module.weight.shape
    with torch.device("meta"):
        like = nn.Linear(inputs, outputs, dtype=module.weight.dtype)
    swapped: _RaggedLinear = (RaggedConvOut if kind is RaggedOut else RaggedConvIn)(like, ragged)
    return swapped.to_empty(device=module.weight.device)


class RaggedOut(_RaggedLinear):
    """W_Q, W_K or W_V with rows for the kept directions only; the output has all slots, zeros in the cut ones.

    weight: (sum of ranks, in_features); output: (..., len(ranks) * head_dim).
    """

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        index = live(ragged.ranks, ragged.head_dim, pairs=ragged.pairs)
        nn.Linear.__init__(
            self,
            linear.in_features,
            max(1, len(index)),
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        self.weight = nn.Parameter(self.weight[: len(index)], linear.weight.requires_grad)
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias[: len(index)], linear.bias.requires_grad)
        self.out_features = len(ragged.ranks) * ragged.head_dim
        # For each slot the column of the narrow output that fills it; the last column is the added zero.
        gather = torch.full((self.out_features,), len(index), device="cpu")
        gather[index] = torch.arange(len(index), device="cpu")
        self._adopt(ragged, Slots.of(gather, len(index)))

    def forward(self, x: Tensor, slots: Slots | None = None) -> Tensor:
        """`slots`: others than head_dim a head."""
        narrow = nn.functional.linear(x, self.weight, self.bias)
        return (slots or self.slots).fill(narrow)


class RaggedIn(_RaggedLinear):
    """W_O with columns for the kept directions only; takes the full slots and reads the live ones.

    weight: (out_features, sum of ranks); input: (..., len(ranks) * head_dim), or just the live slots.
    """

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        index = live(ragged.ranks, ragged.head_dim)
        nn.Linear.__init__(
            self,
            max(1, len(index)),
            linear.out_features,
            bias=linear.bias is not None,
            device=linear.weight.device,
            dtype=linear.weight.dtype,
        )
        self.weight = nn.Parameter(self.weight[:, : len(index)], linear.weight.requires_grad)
        self.in_features = len(ragged.ranks) * ragged.head_dim
        self._adopt(ragged, Slots.of(index, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        live = x if x.shape[-1] == self.weight.shape[1] else self.slots.fill(x)
        return nn.functional.linear(live, self.weight, self.bias)


class RaggedConvOut(RaggedOut):
    """The same for a Conv1D: weight (in_features, sum of ranks)."""

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        super().__init__(linear, ragged)
        self.weight = nn.Parameter(self.weight.mT.contiguous())

    def forward(self, x: Tensor, slots: Slots | None = None) -> Tensor:
        return (slots or self.slots).fill(nn.functional.linear(x, self.weight.mT, self.bias))


class RaggedConvIn(RaggedIn):
    """The same for a Conv1D: weight (sum of ranks, out_features)."""

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        super().__init__(linear, ragged)
        self.weight = nn.Parameter(self.weight.mT.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.slots.fill(x), self.weight.mT, self.bias)
