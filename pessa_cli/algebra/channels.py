"""The canonical form of an MLP's weights, which is the same for every file layout, and the values of its channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


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


def channel_norms(weights: ChannelWeights) -> Tensor:
    """Return the product of the L2 norms of all vectors of each channel, (F,): of its rows with their bias, and column.

    It ranks channels by the weights alone, as the paper's baseline ranks the dimensions of heads.
    """
    rows = weights.into.double()
    if weights.into_bias is not None:
        rows = torch.cat([rows, weights.into_bias.double().unsqueeze(-1)], -1)
    norms: Tensor = rows.norm(dim=-1).prod(0) * weights.out.double().norm(dim=0)
    return norms
