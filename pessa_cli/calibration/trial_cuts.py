"""Trial cuts: measuring how much cutting a block changes its own output and the output of the model.

Second moments alone do not predict this: a first-order estimate with independent keys gives between a tenth of the
measured error of a cut Q-K, in some blocks, and twice that error, in others. Therefore each side of each block is cut
to a few shares, and run on a few calibration inputs that were not used for its decomposition.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from pessa_cli.blocks.compact_format import pair_ranks
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Tick
from pessa_cli.models.hooks import BlockModules, Call, block_modules, on_calls, output_of, replay
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.spectra import LEVELS, Spectra, Spectrum, largest_pairs, pair_shares, smallest_dropped
from pessa_cli.statistics.sums import shapes_of
from pessa_cli.surgery.decomposition import Decomposition

DEPTH = 0.5  # the share of Q-K and of V-O that is cut to measure the harm to the model's output
SAMPLES = 4  # the number of gradients for each input from which the harm is estimated


@dataclass
class _Sums:
    """The sums over the trial cuts of one block, in float64; see `statistics.sums.BlockStatistics`.

    tried: by the name of the seam, a sum for each of LEVELS. metric: of MLPs, see `statistics.sums.MlpStatistics`.
    """

    tried: dict[str, list[float]]
    metric: Tensor | None = None
    output: float = 0.0
    harm: Tensor = field(default_factory=lambda: torch.zeros(3, dtype=torch.float64))

    def add_gradient(self, gradient: Tensor) -> None:
        """Add one gradient with respect to the block's output to its metric, if it has one."""
        if self.metric is not None:
            flat = gradient.flatten(0, -2).double().cpu()
            self.metric.addmm_(flat.mT, flat)

    def tensors(self) -> dict[str, Tensor]:
        """Return the sums as tensors by name."""
        output = torch.tensor(self.output, dtype=torch.float64)
        tried = torch.tensor(list(self.tried.values()), dtype=torch.float64)
        found = {"output": output, "tried": tried, "harm": self.harm}
        return found if self.metric is None else {**found, "metric": self.metric}


def try_out(
    loaded: Any,
    sites: Sequence[Site],
    inputs: Sequence[Inputs],
    decomposition: Decomposition,
    most_bytes: int,
    tick: Tick,
) -> dict[str, dict[str, Tensor]]:
    """Make trial cuts of the blocks, and return the results by site name: `output`, `tried` and `harm`.

    The model runs once for each input. The inputs of its blocks are kept, up to `most_bytes` at a time, and the cut
    copies of the blocks run on them. loaded: the model in transformers. decomposition: of the blocks, by statistics
    that do not include these inputs. tick: is called `passes(sites)` times.
    """
    ours = block_modules(sites, loaded)
    cut_blocks = {name: copied(modules) for name, modules in ours.items()}
    sums = {site.name: _Sums({seam: [0.0] * len(LEVELS) for seam in site.ranks}) for site in sites}
    for site in sites:
        if isinstance(site, MlpSite):
            sums[site.name].metric = torch.zeros(shapes_of(site)["metric"], dtype=torch.float64)

    def cut(share: float, seam: str | None = None) -> None:
        """Cut this share of one seam, or of all, of the blocks that have it."""
        for site in sites:
            if seam is None or seam in site.ranks:
                kept = kept_at(site, decomposition.spectra[site.name], share, seam)
                set_block(site, cut_blocks[site.name], decomposition.cut(kept, "dense"))

    seams = list(dict.fromkeys(seam for site in sites for seam in site.ranks))
    ticks_left = passes(sites)
    loaded.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    remaining = list(inputs)
    while remaining:
        cut(DEPTH)
        calls: dict[str, list[Call]] = {site.name: [] for site in sites}
        held = 0
        while remaining and held <= most_bytes:
            seen = _run_and_harm(loaded, sites, ours, cut_blocks, remaining.pop(0), sums, generator)
            held += _nbytes(seen)
            for name, each in seen.items():
                calls[name] += each
        for at, level in enumerate(LEVELS):
            for seam in seams:
                cut(level, seam)
                for name, each in calls.items():
                    for call in each if seam in sums[name].tried else ():
                        sums[name].tried[seam][at] += _square(cut_blocks[name], call)
                if not remaining:
                    tick(0, 1)
                    ticks_left -= 1
        for name, each in calls.items():
            for call in each:  # one by one, so that the sum does not depend on how many calls fit into memory
                sums[name].output += float(call.output.double().square().sum())
    tick(0, ticks_left)
    return {name: own.tensors() for name, own in sums.items()}


@torch.inference_mode()
def _square(modules: BlockModules, call: Call) -> float:
    """Return the sum of the squared differences between a cut block's output and the output of the call."""
    return float((call.output.double() - replay(modules, call).double()).square().sum())


def _run_and_harm(
    loaded: Any,
    sites: Sequence[Site],
    ours: Mapping[str, BlockModules],
    cut_blocks: Mapping[str, BlockModules],
    given: Inputs,
    sums: Mapping[str, _Sums],
    generator: torch.Generator,
) -> dict[str, list[Call]]:
    """Run the model on one input, add the harm of each block's cut to `sums`, and return the recorded calls by block.

    The harm is the effect on the model's output if only this block is cut, to second order. For logits it is the KL
    divergence: half the variance of the change in log-likelihood of tokens drawn from the model itself (the Fisher
    information). For hidden states it is their relative squared error, estimated by random projections. Both come from
    gradients with respect to the block's output.
    """
    probes: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    calls: dict[str, list[Call]] = {site.name: [] for site in sites}
    with ExitStack() as hooks, torch.enable_grad():
        for site in sites:

            def probe(_module: nn.Module, _args: Any, output: Tensor, name: str = site.name) -> Tensor:
                probes[name].append(torch.zeros_like(output, requires_grad=True))
                return output + probes[name][-1]

            def keep(call: Call, name: str = site.name) -> None:
                detached: Call = tree_map_only(Tensor, Tensor.detach, call)
                calls[name].append(detached)

            hooks.callback(ours[site.name].output.register_forward_hook(probe).remove)
            on_calls(site, ours[site.name], keep, hooks)
        kind, output = output_of(loaded, given)
        with torch.no_grad():
            moves = {
                name: [replay(cut_blocks[name], call) - call.output for call in each] for name, each in calls.items()
            }
        leaves = [leaf for each in probes.values() for leaf in each]
        for _ in range(SAMPLES):
            scalar, scale = _projected(kind, output, generator)
            gradients = iter(torch.autograd.grad(scalar, leaves, retain_graph=True, allow_unused=True))
            for name, each in probes.items():
                moved = 0.0
                for gradient, move in zip(islice(gradients, len(each)), moves[name], strict=True):
                    if gradient is not None:
                        moved += float((gradient * move).double().sum())
                        sums[name].add_gradient(gradient)
                sums[name].harm[0] += scale * moved**2 / SAMPLES
    for name, each in moves.items():
        sums[name].harm[1] += output.shape[:-1].numel()
        sums[name].harm[2] += sum(float(m.double().square().sum()) for m in each)
    return calls


def _nbytes(calls: Mapping[str, Sequence[Call]]) -> int:
    """Return the number of bytes that recorded calls hold; a tensor that several blocks share is counted once."""
    tensors = (leaf for leaf in tree_flatten(calls)[0] if isinstance(leaf, Tensor))
    return sum({leaf.data_ptr(): leaf.nbytes for leaf in tensors}.values())


def copied(modules: BlockModules) -> BlockModules:
    """Return a copy of a block's modules, whose weights can be exchanged."""
    names = {id(module): name for name, module in modules.block.named_modules()}
    block = copy.deepcopy(modules.block)
    own = {letter: block.get_submodule(names[id(module)]) for letter, module in modules.projections.items()}
    return BlockModules(block, own, modules.last)


def set_block(site: Site, modules: BlockModules, tensors: Mapping[str, Tensor]) -> None:
    """Replace the weights of one block of a loaded model; `tensors` are by their names in the file."""
    for side, module in modules.projections.items():
        for name, parameter in module.named_parameters():
            parameter.data.copy_(tensors[f"{site.module(side)}.{name}"])


@contextmanager
def restoring(modules: Mapping[str, BlockModules]) -> Iterator[None]:
    """Restore the weights of blocks of a loaded model at the end of the `with` block."""
    tensors = [parameter.data for own in modules.values() for parameter in _parameters(own)]
    kept = [tensor.clone() for tensor in tensors]
    yield
    for tensor, before in zip(tensors, kept, strict=True):
        tensor.copy_(before)


def _parameters(modules: BlockModules) -> Iterator[nn.Parameter]:
    for module in modules.projections.values():
        yield from module.parameters()


def passes(sites: Sequence[Site]) -> int:
    """Return how often trial cuts of these blocks pass over the inputs."""
    return len({seam for site in sites for seam in site.ranks}) * len(LEVELS) + 1


def kept_at(site: Site, spectra: Spectra, share: float, only: str | None = None) -> Site:
    """Return the block with the ranks that remain when this share of one of its seams, or of all of them, is cut."""

    def remaining(spectrum: Spectrum) -> NDArray[np.int64]:
        return smallest_dropped({site.name: spectrum}, share)[site.name]

    ranks, pairs = {seam.name: seam.full for seam in site.seams}, None
    for seam in site.seams:
        if only not in (None, seam.name):
            continue
        if (found := spectra.seams.get(seam.name)) is not None:
            ranks[seam.name] = tuple((seam.always_kept + remaining(found)).tolist())
        elif seam.symmetry == "pairs" and spectra.pairs is not None and share:
            pairs = largest_pairs(spectra.pairs, remaining(pair_shares(spectra.pairs)))
            ranks[seam.name] = pair_ranks(pairs)
    return site.keeping(ranks, pairs)


def _projected(kind: str, output: Tensor, generator: torch.Generator) -> tuple[Tensor, float]:
    """Return a random scalar function of the output, and the factor by which the square of its change is the harm."""
    flat = output.reshape(-1, output.shape[-1])
    if not bool(flat.isfinite().all()):
        raise PessaError(
            f"the {kind} of the model are not finite on the calibration data",
            "the weights are damaged, or too large for the data: compare the model's outputs on other data",
        )
    if kind == "logits":
        likelihood = flat.log_softmax(-1)
        drawn = torch.multinomial(likelihood.detach().exp().cpu(), 1, generator=generator).to(flat.device)
        return likelihood.gather(1, drawn).sum(), 0.5
    noise = torch.randn(flat.shape, generator=generator).to(flat)
    whole = float(flat.detach().double().square().sum())
    return (flat * noise).sum(), len(flat) / whole if whole else 0.0
