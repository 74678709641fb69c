"""Ragged projections: linear layers that store only the kept directions of each head and still look full-width.

Between them the stock attention code sees slots of the original head_dim, zero where a direction was cut, so its
caches, masks and kernels run unchanged and the softmax scale stays that of the original head_dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from pessa_cli.heads import live
from pessa_cli.ragged import Ragged


class _RaggedLinear(nn.Linear):
    """A linear layer with some of its rows or columns left out; reports the full in_features and out_features."""

    index: Tensor  # a plain attribute: transformers overwrites buffers that no checkpoint holds

    def _adopt(self, index: Tensor) -> None:
        self.index = index

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.to_device(self.weight.device)
        return self

    def to_device(self, device: torch.device) -> None:
        """Keep the index beside the weight; what is on meta has no place yet."""
        if device.type != "meta":
            self.index = self.index.to(device)

    def index_beside(self, x: Tensor) -> Tensor:
        return self.index if self.index.device == x.device else self.index.to(x.device)


class RaggedOut(_RaggedLinear):
    """W_Q, W_K or W_V with rows for the kept directions only; the output has all slots, zeros in the cut ones.

    weight: (sum of ranks, in_features); output: (..., len(ranks) * head_dim).
    """

    def __init__(self, linear: nn.Linear, ragged: Ragged) -> None:
        index = live(ragged.ranks, ragged.head_dim)
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
        self._adopt(gather)

    def forward(self, x: Tensor) -> Tensor:
        narrow = nn.functional.linear(x, self.weight, self.bias)
        return nn.functional.pad(narrow, (0, 1)).index_select(-1, self.index_beside(x))


class RaggedIn(_RaggedLinear):
    """W_O with columns for the kept directions only; takes the full slots and reads the live ones.

    weight: (out_features, sum of ranks); input: (..., len(ranks) * head_dim).
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
        self._adopt(index)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.index_select(-1, self.index_beside(x)), self.weight, self.bias)
