"""Hooks that add up the calibration statistics of one attention block while the model runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from pessa_cli.algebra.rope import output_gram, rotated
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Tick
from pessa_cli.models.hooks import modules_of, output_of
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.windows import device_of, on_device
from pessa_cli.statistics.sums import NAMES, BlockStatistics, shapes_of
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import Model

QUERIES = 64  # of an input that are looked at one by one: more cost much and say little


def run_input(model: Any, inputs: Inputs, collectors: Sequence[BlockListener]) -> None:
    """One input through the model, with the collectors listening; generating before it does not count."""
    for collector in collectors:
        collector.on = True
    try:
        output_of(model, on_device([inputs], device_of(model))[0])
    finally:
        for collector in collectors:
            collector.on = False


class BlockListener:
    """Listens to one attention block of a model, and adds up its statistics while `on`; o: as in HeadWeights."""

    def __init__(self, site: Site, model: Any, o: Tensor, hooks: ExitStack) -> None:
        self.on = self._checked = False
        self._site = site
        self._seen: dict[str, Tensor] = {}
        self._sums = {
            name: torch.zeros(shape, dtype=torch.float64, device=device_of(model))
            for name, shape in zip(NAMES, shapes_of(site), strict=True)
        }
        block, projections = modules_of(site, model)
        # What stands for W_O where only inner products of outputs matter, (G, M, d, d).
        self._roots = torch.linalg.qr(o.double().permute(1, 2, 0, 3).to(device_of(model)), mode="r").R
        for side in "qkv":
            hooks.callback(projections[side].register_forward_hook(self._heard(side)).remove)
        hooks.callback(projections["o"].register_forward_pre_hook(self._mixed).remove)
        hooks.callback(block.register_forward_hook(self._finished, with_kwargs=True).remove)

    def found(self) -> BlockStatistics:
        return BlockStatistics(**{name: total.cpu() for name, total in self._sums.items()})

    def _heard(self, side: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            if self.on:
                self._seen[side] = output

        return hook

    def _mixed(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.on:
            self._seen["o"] = args[0]

    def _finished(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Add up one call of the block. Everything is of batch 1."""
        if not self.on:
            return
        site = self._site
        g, m, d = site.kv_heads, site.group, site.head_dim
        attention = next(
            (t[0] for t in output if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == site.heads), None
        )  # (G M, queries, keys)
        if attention is None:
            raise PessaError(f"{site.name} gives no attention weights", "this model cannot be calibrated")
        queries = self._seen["q"][0].double().reshape(-1, g, m, d)
        keys = self._seen["k"][0].double().reshape(-1, g, d)
        values = self._seen["v"][0].double().reshape(-1, g, 1, d).permute(1, 2, 0, 3) @ self._roots.mT
        mixtures = self._seen["o"][0].double().reshape(-1, g * m * d)
        if not self._checked:
            self._check(attention, mixtures)
        self._seen.clear()
        some = torch.linspace(0, len(queries) - 1, min(QUERIES, len(queries)), device=queries.device).round().long()
        falls = attention.reshape(g, m, *attention.shape[1:])  # (G, M, queries, keys)
        more = len(queries) / len(some)
        if site.by_pairs:
            turned, seen_as = self._rotated(queries, keys, kwargs.get("position_embeddings"))
            asked = turned[some].permute(1, 2, 0, 3)  # (G, M, queries, d)
            self._sums["pairs"] += output_gram(asked, seen_as.transpose(0, 1), falls[:, :, some], values) * more
        keys = (keys - keys.mean(0)).transpose(0, 1)  # (G, keys, d); what is common would only cost digits
        if not site.by_pairs:
            self._sums["influence"] += _influence(falls[:, :, some], keys, values) * more
        seen = (falls[:, 0] > 0).to(attention.dtype)
        seen = seen / seen.sum(-1, keepdim=True)  # (G, queries, keys): each query's keys alike, none that is masked
        means = (seen @ keys.to(seen.dtype)).double()  # (G, queries, d)
        flat = queries.permute(1, 2, 0, 3).flatten(1, 2)  # (G, M queries, d)
        self._sums["frames"] += len(mixtures)
        self._sums["queries"] += flat.mT @ flat
        self._sums["keys"] += keys.mT @ (seen.sum(1).double().unsqueeze(-1) * keys) - means.mT @ means
        self._sums["mixtures"] += mixtures.mT @ mixtures
        self._sums["mixture"] += mixtures.sum(0)

    def _check(self, attention: Tensor, mixtures: Tensor) -> None:
        """Raise PessaError where attention times values is not what goes into W_O: then this is something else."""
        site = self._site
        values = self._seen["v"][0].double().reshape(-1, site.kv_heads, 1, site.head_dim).permute(1, 2, 0, 3)
        falls = attention.reshape(site.kv_heads, site.group, *attention.shape[1:]).double()
        fit = falls.shape[-1] == values.shape[-2] and falls[..., 0].numel() * site.head_dim == mixtures.numel()
        expected = (falls @ values).permute(2, 0, 1, 3).reshape(mixtures.shape) if fit else mixtures
        if not fit or not float((expected - mixtures).norm()) <= 1e-3 * float(mixtures.norm()):
            raise PessaError(f"{site.name} mixes values otherwise than by its attention", "go by the weights alone")
        self._checked = True

    def _rotated(self, queries: Tensor, keys: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        if rotation is None:
            raise PessaError(f"{self._site.name} is given no rotations", "this model cannot be calibrated")
        cos, sin = (angle[0] for angle in rotation)
        if cos.shape[-1] != self._site.head_dim:
            raise PessaError(f"{self._site.name} is given its rotations in another form", "go by the weights alone")
        return rotated(queries, cos, sin), rotated(keys, cos, sin)


def _influence(attention: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """What errors of the keys do to the output, (G, d, d), summed over queries.

    An error e_j of the scores moves what a query gets by sum_j a_j (e_j - mean e) v_j, and where e_j = k_j x by
    C^T x, with C the covariance of keys and values under the query's attention. attention: (G, M, queries, keys); keys:
    (G, keys, d); values behind W_O, or anything of the same inner products: (G, M, keys, w).
    """
    total, dtype = torch.zeros_like(keys.mT @ keys), attention.dtype
    for g, each in enumerate(keys.to(dtype)):  # one query head at a time: keys d w numbers
        for own, v in zip(attention[g], values[g].to(dtype), strict=True):
            joint = (own @ (each.unsqueeze(2) * v.unsqueeze(1)).flatten(1)).reshape(len(own), each.shape[1], -1)
            covariance = joint - (own @ each).unsqueeze(2) * (own @ v).unsqueeze(1)  # (queries, d, w)
            through = covariance.transpose(0, 1).flatten(1)
            total[g] += (through @ through.mT).double()
    return total


def collect_statistics(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    inputs: Iterable[tuple[Inputs, int]],
    progress: AbstractContextManager[Tick],
    every: int = 1,
) -> tuple[dict[str, BlockStatistics], dict[str, BlockStatistics]]:
    """The statistics of the given blocks over the first of `every` so many inputs, and over the others."""
    with ExitStack() as hooks, progress as tick:
        outputs = {site.name: read_site(model.reader, site).o for site in sites}
        first, others = ([BlockListener(site, loaded, outputs[site.name], hooks) for site in sites] for _ in range(2))
        for number, (given, nbytes) in enumerate(inputs):
            run_input(loaded, given, others if number % every else first)
            tick(nbytes, 0)
        tick(0, 1)
        names = [site.name for site in sites]
        found = [{name: c.found() for name, c in zip(names, part, strict=True)} for part in (first, others)]
        return found[0], found[1]
