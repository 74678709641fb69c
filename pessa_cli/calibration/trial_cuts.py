"""Trials: what cutting a block does to its output and to the model's, measured on a few of the calibration inputs.

Second moments alone do not tell: to first order, with independent keys, the error of a cut Q-K comes out at a tenth of
what it is in some blocks and at twice that in others. So each side of each block is cut for real, at a few depths.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pessa_cli.blocks.compact_format import pair_ranks
from pessa_cli.blocks.site import Site, with_ranks
from pessa_cli.common.progress import Tick
from pessa_cli.models.hooks import block_squares, compare_block, modules_of, output_of
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.spectra import LEVELS, Spectra, Spectrum, largest_pairs, pair_shares, smallest_dropped
from pessa_cli.statistics.file import Statistics
from pessa_cli.statistics.sums import BlockStatistics
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.passes import Cuts, measure
from pessa_cli.surgery.scratch import Spool

DEPTH = 0.5  # of both sides, where the harm to the model is looked at
SAMPLES = 4  # of the gradients that tell it, for each input
PASSES = 2 * len(LEVELS) + 1  # over the inputs


def try_out(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    inputs: Sequence[Inputs],
    found: Mapping[str, BlockStatistics],
    statistics: Statistics,
    tick: Tick,
) -> dict[str, BlockStatistics]:
    """The statistics of the blocks with those of trials. `tick` is called once for each pass over the inputs."""
    pruned = copy.deepcopy(loaded)
    with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
        spectra = measure(model, list(sites), spool=spool, statistics=statistics)
        cuts = Cuts(model, spool, statistics)

        def cut(qk: float, vo: float) -> None:
            for site in sites:
                set_block(pruned, site, cuts.tensors(site, kept_at(site, spectra[site.name], qk, vo)))

        squares = {site.name: torch.zeros(2, len(LEVELS), dtype=torch.float64) for site in sites}
        output = {site.name: torch.zeros((), dtype=torch.float64) for site in sites}
        for at, level in enumerate(LEVELS):
            for side, depths in enumerate(((level, 0.0), (0.0, level))):
                cut(*depths)
                with ExitStack() as hooks, torch.inference_mode():
                    sums = block_squares(sites, loaded, pruned, hooks)
                    for given in inputs:
                        output_of(loaded, given)
                for name, (off, whole) in sums.items():
                    squares[name][side, at] = off
                    output[name].fill_(whole)
                tick(0, 1)
        cut(DEPTH, DEPTH)
        harm = _harm(loaded, pruned, sites, inputs)
        tick(0, 1)
    return {
        name: replace(known, output=output[name], tried=squares[name], harm=harm[name]) for name, known in found.items()
    }


def set_block(loaded: Any, site: Site, tensors: Mapping[str, Tensor]) -> None:
    """Exchange the weights of one block of a loaded model."""
    _, projections = modules_of(site, loaded)
    for side, module in projections.items():
        for name, parameter in module.named_parameters():
            parameter.data.copy_(tensors[f"{site.module(side)}.{name}"])


def kept_at(site: Site, spectra: Spectra, qk: float, vo: float) -> Site:
    """What is kept of a block with these shares of its directions dropped."""

    def left(spectrum: Spectrum, share: float) -> NDArray[np.int64]:
        return smallest_dropped({site.name: spectrum}, share)[site.name]

    vo_ranks = tuple(left(spectra.vo, vo).tolist())
    if spectra.qk is not None:
        return with_ranks(site, tuple(left(spectra.qk, qk).tolist()), vo_ranks)
    if spectra.pairs is None or qk == 0:
        return with_ranks(site, site.full, vo_ranks)
    pairs = largest_pairs(spectra.pairs, left(pair_shares(spectra.pairs), qk))
    return with_ranks(site, pair_ranks(pairs), vo_ranks, pairs)


def _harm(ours: Any, theirs: Any, sites: Sequence[Site], inputs: Sequence[Inputs]) -> dict[str, Tensor]:
    """What the difference of each block alone does to the output of the model, to second order: see BlockStatistics.

    For logits the KL divergence, half the variance that the difference gives to the log-likelihood of tokens drawn from
    the model itself; for hidden states their relative squared error, likewise by random projections.
    """
    ours.requires_grad_(False)
    sums = {site.name: torch.zeros(3, dtype=torch.float64) for site in sites}
    generator = torch.Generator().manual_seed(0)
    probes: dict[str, list[Tensor]] = {}
    moves: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks, torch.enable_grad():
        for site in sites:

            def probe(_module: nn.Module, _args: Any, output: Tensor, name: str = site.name) -> Tensor:
                probes.setdefault(name, []).append(torch.zeros_like(output, requires_grad=True))
                return output + probes[name][-1]

            def heard(expected: Tensor, other: Tensor, name: str = site.name) -> None:
                moves.setdefault(name, []).append((other - expected).detach())

            hooks.callback(modules_of(site, ours)[1]["o"].register_forward_hook(probe).remove)
            compare_block(site, ours, theirs, heard, hooks)
        for given in inputs:
            probes.clear()
            moves.clear()
            kind, output = output_of(ours, given)
            tokens = output.shape[:-1].numel()
            leaves = [leaf for name in probes for leaf in probes[name]]
            for _ in range(SAMPLES):
                scalar, scale = _projected(kind, output, generator)
                gradients = iter(torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True))
                for name in probes:
                    grads = [next(gradients) for _ in probes[name]]
                    moved = sum(
                        float((g * m).double().sum()) for g, m in zip(grads, moves[name], strict=True) if g is not None
                    )
                    sums[name][0] += scale * moved**2 / SAMPLES
            for name, moved_by in moves.items():
                sums[name][1] += tokens
                sums[name][2] += sum(float(m.double().square().sum()) for m in moved_by)
    return sums


def _projected(kind: str, output: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """A random number made of the output, and what the square of its change is to be multiplied by."""
    flat = output.reshape(-1, output.shape[-1])
    if kind == "logits":
        likelihood = flat.log_softmax(-1)
        drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=generator).to(flat.device)
        return likelihood.gather(1, drawn).sum(), 0.5
    noise = torch.randn(flat.shape, generator=generator).to(flat)
    return (flat * noise).sum(), len(flat) / float(flat.detach().double().square().sum())
