"""Ragged projections: linear layers that store only the kept directions of each head but have full-width inputs or
outputs.

The stock attention code between them sees heads of the original head_dim, with zeros in the cut directions, so its
caches, masks and kernels run unchanged and the softmax scale stays that of the original head_dim. Bucketed attention
requests other, narrower slots from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pessa_cli.algebra.heads import live
from pessa_cli.blocks.compact_format import Ragged

FEW_ROWS = 64  # with fewer rows one index_select is faster than copying runs


@dataclass(frozen=True)
class Slots:
    """A selection of columns: for each slot `index` holds the column that fills it, or the number of columns for zero.

    `pieces` is the same selection as runs of consecutive columns, (first column, length), with None as the first column
    of a run of zeros. Copying runs is four times as fast as selecting single columns, except for few rows.
    """

    index: Tensor
    pieces: tuple[tuple[int | None, int], ...]

    @staticmethod
    def of(index: Tensor, columns: int) -> Slots:
        """Return the selection with this index, (slots,), from an input with this number of columns."""
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
        """Return the selection with its index on a device."""
        return Slots(self.index.to(device), self.pieces)

    def fill(self, x: Tensor) -> Tensor:
        """Apply the selection: (..., columns) -> (..., slots)."""
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
    """A linear layer without the rows or columns of cut directions.

    It reports the full in_features and out_features, which PEFT and the stock attention code expect.
    """

    slots: Slots  # not a buffer, because transformers overwrites buffers that are not in the checkpoint
    ragged: Ragged

    def _set_slots(self, ragged: Ragged, slots: Slots) -> None:
        self.ragged = ragged
        self.slots = slots

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.to_device(self.weight.device)
        return self

    def to_device(self, device: torch.device) -> None:
        """Move the slots to the weight's device, except to meta, which holds no data."""
        if device.type != "meta":
            self.slots = self.slots.to(device)


def narrow_module(module: Any, ragged: Ragged) -> nn.Module:
    """Return the replacement for a linear layer or a Conv1D that stores less than its full width.

    A module of an MLP becomes a plain narrower one, since the modules beside it have the same channels. A projection of
    attention becomes a ragged one.
    """
    if not ragged.channels:
        return ragged_module(module, ragged)
    kept = sum(ragged.ranks)
    linear = isinstance(module, nn.Linear)
    inputs, outputs = module.weight.shape[::-1] if linear else module.weight.shape
    inputs, outputs = (inputs, kept) if ragged.rows else (kept, outputs)
    with torch.device(module.weight.device):
        narrow = nn.Linear(inputs, outputs, module.bias is not None) if linear else type(module)(outputs, inputs)
    return narrow.to(module.weight.dtype)


def ragged_module(module: Any, ragged: Ragged) -> _RaggedLinear:
    """Return the ragged replacement for a linear layer, or for a Conv1D, whose weight is transposed."""
    kind = RaggedOut if ragged.rows else RaggedIn
    if isinstance(module, nn.Linear):
        return kind(module, ragged)
    inputs, outputs = module.weight.shape
    with torch.device("meta"):
        like = nn.Linear(inputs, outputs, dtype=module.weight.dtype)
    swapped: _RaggedLinear = (RaggedConvOut if kind is RaggedOut else RaggedConvIn)(like, ragged)
    return swapped.to_empty(device=module.weight.device)


class RaggedOut(_RaggedLinear):
    """W_Q, W_K or W_V with rows for the kept directions only; the output has zeros in the cut directions.

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
        # For each slot, the column of the narrow output that fills it; len(index) stands for zero.
        gather = torch.full((self.out_features,), len(index), device="cpu")
        gather[index] = torch.arange(len(index), device="cpu")
        self._set_slots(ragged, Slots.of(gather, len(index)))

    def forward(self, x: Tensor, slots: Slots | None = None) -> Tensor:
        """Apply the projection; `slots` replaces the default layout of `head_dim` slots per head."""
        narrow = nn.functional.linear(x, self.weight, self.bias)
        return (slots or self.slots).fill(narrow)


class RaggedIn(_RaggedLinear):
    """W_O with columns for the kept directions only; it selects these directions from its full-width input.

    weight: (out_features, sum of ranks); input: (..., len(ranks) * head_dim), or (..., sum of ranks).
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
        self._set_slots(ragged, Slots.of(index, self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        live = x if x.shape[-1] == self.weight.shape[1] else self.slots.fill(x)
        return nn.functional.linear(live, self.weight, self.bias)


class RaggedConvOut(RaggedOut):
    """The RaggedOut of a Conv1D; weight: (in_features, sum of ranks)."""

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        super().__init__(linear, ragged)
        self.weight = nn.Parameter(self.weight.mT.contiguous())

    def forward(self, x: Tensor, slots: Slots | None = None) -> Tensor:
        return (slots or self.slots).fill(nn.functional.linear(x, self.weight.mT, self.bias))


class RaggedConvIn(RaggedIn):
    """The RaggedIn of a Conv1D; weight: (sum of ranks, out_features)."""

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        super().__init__(linear, ragged)
        self.weight = nn.Parameter(self.weight.mT.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.slots.fill(x), self.weight.mT, self.bias)
