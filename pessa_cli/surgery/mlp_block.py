"""The order of an MLP's channels by importance, and the refit of the matrix that reads them to the kept ones.

An activation stands between the matrices that write the channels and the one that reads them, so whole channels are
cut. What the cut channels have added to the output is made up for by the kept ones as well as possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pessa_cli.algebra.channels import ChannelWeights, channel_norms, removal_order
from pessa_cli.algebra.weighted import refitted
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.statistics.sums import MlpStatistics
from pessa_cli.statistics.weighing import ChannelRefit, channel_refit, output_root


@dataclass(frozen=True)
class ChannelOrder:
    """The channels of an MLP by importance.

    order: (F,), the number of each channel, the most important first. refit: the statistics for the refit after
    cutting, of the channels in this order; None without calibration.
    """

    order: Tensor
    refit: ChannelRefit | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all values as tensors by name, for a file."""
        if self.refit is None:
            return {"order": self.order.double()}
        found = {"order": self.order.double(), "moment": self.refit.moment, "mean": self.refit.mean}
        return found | {"ridge": torch.tensor(self.refit.ridge, dtype=torch.float64)}

    def to(self, device: torch.device) -> ChannelOrder:
        """Return the same order on another device."""
        return ChannelOrder.of({name: tensor.to(device) for name, tensor in self.tensors().items()})

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> ChannelOrder:
        """Rebuild the order from the result of `tensors`."""
        refit = None
        if "moment" in tensors:
            refit = ChannelRefit(tensors["moment"], tensors["mean"], float(tensors["ridge"]))
        return ChannelOrder(tensors["order"].long(), refit)


def decompose_mlp(weights: ChannelWeights, found: MlpStatistics | None = None) -> tuple[Spectra, ChannelOrder]:
    """Order the channels of an MLP by the norms of their weights or, with statistics, by what cutting them changes.

    The spectrum of a calibrated MLP is in units of the block's output: the sum of squares of its last values is the
    mean squared error when these channels are cut and the others make up for them, weighted by how much each direction
    of the output matters to the model's output (`statistics.weighing.output_root`).
    """
    if found is None:
        values, order = channel_norms(weights).sort(descending=True, stable=True)
        order = order.cpu()
        return Spectra({"mlp": values.reshape(1, -1).cpu().numpy()}, order=order.numpy()), ChannelOrder(order)
    found = found.to(weights.out.device)
    refit, root = channel_refit(found, weights), output_root(found)
    order, errors = removal_order(refit.moment, root @ weights.out.double(), refit.ridge)
    spectrum = np.maximum.accumulate(errors.clamp(min=0).sqrt().numpy()[::-1])[::-1]
    ordered = replace(refit, moment=refit.moment[order][:, order], mean=refit.mean[order])
    spectra = Spectra(
        {"mlp": spectrum.reshape(1, -1).copy()},
        calibrated=True,
        trials=found.trials,
        order=order.cpu().numpy(),
        norms=channel_norms(weights)[order].cpu().numpy(),
    )
    moved = {name: tensor.cpu() for name, tensor in ChannelOrder(order, ordered).tensors().items()}
    return spectra, ChannelOrder.of(moved)


def ordered_channels(weights: ChannelWeights, order: ChannelOrder) -> ChannelWeights:
    """Return the MLP with its channels in order of importance: the same function of its inputs."""
    return weights.ordered(order.order.to(weights.out.device))


def cut_mlp(weights: ChannelWeights, kept: MlpSite, order: ChannelOrder) -> ChannelWeights:
    """Refit an MLP, whose channels are in order, to the first `kept.kept` of them; unchanged without calibration.

    Where the output has a bias, the means of the cut channels are returned through it, and the refit is to what varies.
    """
    if order.refit is None or kept.kept == kept.width:
        return weights
    refit = order.to(weights.out.device).refit
    assert refit is not None
    first = torch.arange(kept.kept, device=weights.out.device)
    out = weights.out.double()
    new = refitted(out, refit.moment, first, refit.ridge)
    bias = weights.out_bias
    if bias is not None:
        bias = (bias.double() + out @ refit.mean - new[:, first] @ refit.mean[first]).to(bias.dtype)
    return replace(weights, out=new.to(weights.out.dtype), out_bias=bias)
