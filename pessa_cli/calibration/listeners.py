"""Hooks that add up the calibration statistics of blocks while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from pessa_cli.algebra.rope import output_gram, rotated
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.progress import Tick
from pessa_cli.common.text import listed
from pessa_cli.models.hooks import BlockModules
from pessa_cli.statistics.sums import BlockStatistics, shapes_of, statistics_of
from pessa_cli.surgery.block_io import split_fused
from pessa_cli.surgery.block_reader import BlockReader

QUERIES = 64  # queries of each input for the statistics that need each query alone; more cost much and change little
BY_WEIGHTS = "prune by the weights alone: leave out --calibrate and --statistics"


def collect_statistics(
    sites: Sequence[Site],
    modules: Mapping[str, BlockModules],
    runs: Iterable[tuple[Callable[[], object], int]],
    blocks: BlockReader,
    progress: AbstractContextManager[Tick],
    folds: int = 1,
    device: torch.device | str = "cpu",
) -> list[dict[str, BlockStatistics]]:
    """Add up the statistics of the given blocks while a model, or a part of it, runs on inputs.

    modules: of the blocks, by site name. runs: each runs the model on one input; with its number of bytes, for the
    progress bar. folds: if more than 1, there are two results: the sums over the first of every `folds` inputs, and
    those over the other inputs; otherwise there is one result, over all inputs. Each result is by site name. Raises
    PessaError as BlockListener does, and UsageError, after the first input, for blocks that it did not reach.
    """
    with ExitStack() as hooks, progress as tick:
        masks = VisibleKeys()
        listeners = [_listener(site, modules[site.name], blocks, hooks, device, masks, min(folds, 2)) for site in sites]
        for number, (run, nbytes) in enumerate(runs):
            for listener in listeners:
                listener.fold = int(number % folds > 0)
            try:
                run()
            finally:
                for listener in listeners:
                    listener.fold = None
            tick(nbytes, 0)
            if number == 0:
                _check_all_ran(listeners)
        return [{each.site.name: each.found(fold) for each in listeners} for fold in range(min(folds, 2))]


def _listener(
    site: Site,
    modules: BlockModules,
    blocks: BlockReader,
    hooks: ExitStack,
    device: torch.device | str,
    masks: VisibleKeys,
    folds: int,
) -> BlockListener:
    """Create the listener of one block."""
    if isinstance(site, MlpSite):
        return MlpListener(site, modules, hooks, device, folds)
    assert isinstance(site, AttentionSite)
    return AttentionListener(site, modules, blocks.weights(site).o, hooks, device, masks, folds)


def _check_all_ran(listeners: Sequence[BlockListener]) -> None:
    """Raise UsageError if a block had no queries in the inputs so far."""
    idle = [each.site for each in listeners if not each.called]
    if idle:
        lacking = {site.kind for site in idle}
        others = [kind for kind in dict.fromkeys(each.site.kind for each in listeners) if kind not in lacking]
        raise UsageError(
            f"the calibration data do not reach {len(idle)} of the chosen blocks\n{listed([s.name for s in idle])}",
            f"choose others: --sites {','.join(others)}" if others else BY_WEIGHTS,
        )


class VisibleKeys:
    """The keys that each query can see, as rows that sum to one.

    They are computed once for each mask, because the layers of a model share their masks.
    """

    def __init__(self) -> None:
        self._mask: Tensor | None = None
        self._rows = self._totals = torch.empty(0)

    def of(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows, (G, queries, keys), and their sums over the queries, (G, keys).

        attention: attention weights, (G, queries, keys); a query sees the keys with a weight above 0.
        """
        mask = attention > 0
        if self._mask is None or mask.shape != self._mask.shape or not torch.equal(mask, self._mask):
            rows = mask.to(attention.dtype)
            self._mask, self._rows = mask, rows / rows.sum(-1, keepdim=True)
            self._totals = self._rows.sum(1)
        return self._rows, self._totals


class BlockListener:
    """Adds up the statistics of one block while the model runs, with hooks on its modules.

    fold: the index of the sums that are added to; None to add nothing. folds: the number of separate sums.
    """

    def __init__(self, site: Site, device: torch.device | str, folds: int) -> None:
        self.site = site
        self.fold: int | None = None
        self._sums = [
            {name: torch.zeros(shape, dtype=torch.float64, device=device) for name, shape in shapes_of(site).items()}
            for _ in range(folds)
        ]

    @property
    def called(self) -> bool:
        """Whether the block was called yet."""
        return any(bool(sums["frames"] > 0) for sums in self._sums)

    def found(self, fold: int = 0) -> BlockStatistics:
        """Return the sums of one fold so far, on the CPU."""
        return statistics_of(self.site).of({name: total.cpu() for name, total in self._sums[fold].items()})


class MlpListener(BlockListener):
    """Adds up the statistics of one MLP: the moments of the inputs of the matrix that reads its channels.

    hooks: removes the hook when it is closed.
    """

    def __init__(
        self, site: MlpSite, modules: BlockModules, hooks: ExitStack, device: torch.device | str = "cpu", folds: int = 1
    ) -> None:
        super().__init__(site, device, folds)
        hooks.callback(modules.output.register_forward_pre_hook(self._add).remove)

    def _add(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.fold is None:
            return
        sums, channels = self._sums[self.fold], args[0].reshape(-1, args[0].shape[-1]).double()
        sums["frames"] += len(channels)
        sums["moment"].addmm_(channels.mT, channels)
        sums["total"] += channels.sum(0)


class AttentionListener(BlockListener):
    """Adds up the statistics of one attention block.

    o: W_O as in HeadWeights. hooks: removes the hooks when it is closed. masks: may be shared by the blocks of a model.
    Every input must have batch size 1.

    While the model runs, PessaError is raised if the block returns no attention weights, if the input of W_O is not
    attention times values, or if RoPE is applied in an unknown way.
    """

    site: AttentionSite

    def __init__(
        self,
        site: AttentionSite,
        modules: BlockModules,
        o: Tensor,
        hooks: ExitStack,
        device: torch.device | str = "cpu",
        masks: VisibleKeys | None = None,
        folds: int = 1,
    ) -> None:
        super().__init__(site, device, folds)
        self._checked = False
        self._seen: dict[str, Tensor] = {}
        self._masks = masks or VisibleKeys()
        # R of the QR decomposition of W_O, (G, M, d, d). It replaces W_O where only inner products of outputs matter.
        self._roots = torch.linalg.qr(o.double().permute(1, 2, 0, 3).to(device), mode="r").R
        for side in "qkv":
            hooks.callback(modules.projections[side].register_forward_hook(self._keep_output(side)).remove)
        hooks.callback(modules.projections["o"].register_forward_pre_hook(self._keep_input).remove)
        if "output_attentions" in signature(modules.block.forward).parameters:
            hooks.callback(modules.block.register_forward_pre_hook(_ask_for_weights, with_kwargs=True).remove)
        hooks.callback(modules.block.register_forward_hook(self._add_call, with_kwargs=True).remove)

    def _keep_output(self, side: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> None:
            # The first call of a block is for its inputs; DeBERTa's calls after that are for relative positions.
            if self.fold is not None and side not in self._seen:
                self._seen[side] = split_fused(output[0].mT, self.site)[side] if self.site.spec.fused else output[0].mT

        return hook

    def _heads(self, side: str) -> Tensor:
        """Return the outputs of a projection by head, (positions, G, M, d); M is 1 for keys and values."""
        heads = self._seen[side].reshape(self.site.kv_heads, -1, self.site.head_dim, self._seen[side].shape[-1])
        return heads.permute(3, 0, 1, 2)

    def _keep_input(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.fold is not None:
            self._seen["o"] = args[0]

    def _add_call(self, _module: nn.Module, _args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        """Add one call of the block to the sums."""
        if self.fold is None:
            return
        site, sums = self.site, self._sums[self.fold]
        g, m, d = site.kv_heads, site.group, site.head_dim
        # T5 also returns the position bias, which has the same shape, before the weights.
        found = [t[0] for t in output if isinstance(t, Tensor) and t.dim() == 4 and t.shape[1] == site.heads]
        if not found:
            raise PessaError(f"{site.name} returns no attention weights, which calibration needs", BY_WEIGHTS)
        attention = found[-1]  # (G M, queries, keys)
        queries, keys = self._heads("q").double(), self._heads("k").double().squeeze(2)
        values = self._heads("v").double().permute(1, 2, 0, 3) @ self._roots.mT
        mixtures = self._seen["o"][0].double().reshape(-1, g * m * d)
        if not self._checked:
            self._check(attention, mixtures)
        self._seen.clear()
        some = torch.linspace(0, len(queries) - 1, min(QUERIES, len(queries)), device=queries.device).round().long()
        weights = attention.reshape(g, m, *attention.shape[1:])  # (G, M, queries, keys)
        share = len(queries) / len(some)
        if site.by_pairs:
            turned, turned_keys = self._rotated(queries, keys, kwargs.get("position_embeddings"))
            chosen = turned[some].permute(1, 2, 0, 3)  # (G, M, queries, d)
            sums["pairs"] += output_gram(chosen, turned_keys.transpose(0, 1), weights[:, :, some], values) * share
        # The mean changes no covariance, and subtracting it avoids cancellation.
        keys = (keys - keys.mean(0)).transpose(0, 1)  # (G, keys, d)
        if not site.by_pairs and site.merges_qk:
            sums["influence"] += _influence(weights[:, :, some], keys, values) * share
        visible, totals = self._masks.of(weights[:, 0])
        means = (visible @ keys.to(visible.dtype)).double()  # (G, queries, d)
        flat = queries.permute(1, 2, 0, 3).flatten(1, 2)  # (G, M queries, d)
        sums["frames"] += len(mixtures)
        sums["queries"] += flat.mT @ flat
        sums["keys"] += keys.mT @ (totals.double().unsqueeze(-1) * keys) - means.mT @ means
        sums["mixtures"] += mixtures.mT @ mixtures
        sums["mixture"] += mixtures.sum(0)

    def _check(self, attention: Tensor, mixtures: Tensor) -> None:
        """Raise PessaError unless the input of W_O is attention times values, as the statistics assume."""
        site = self.site
        values = self._heads("v").float().permute(1, 2, 0, 3)
        weights = attention.reshape(site.kv_heads, site.group, *attention.shape[1:]).float()
        fit = weights.shape[-1] == values.shape[-2] and weights[..., 0].numel() * site.head_dim == mixtures.numel()
        expected = (weights @ values).permute(2, 0, 1, 3).reshape(mixtures.shape).double() if fit else mixtures
        if not fit or not float((expected - mixtures).norm()) <= 1e-3 * float(mixtures.norm()):
            raise PessaError(
                f"{site.name}: the input of its output projection is not attention times values", BY_WEIGHTS
            )
        self._checked = True

    def _rotated(self, queries: Tensor, keys: Tensor, rotation: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """Return queries and keys after RoPE. Raises PessaError if the block is not given cos and sin of full heads."""
        if rotation is None:
            raise PessaError(f"{self.site.name} is not called with position_embeddings (cos and sin)", BY_WEIGHTS)
        cos, sin = (angle[0] for angle in rotation)
        head_dim = self.site.head_dim
        if 2 * cos.shape[-1] == head_dim:  # GPT-OSS gives the angles of each pair once
            cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        if cos.shape[-1] != head_dim:
            raise PessaError(
                f"{self.site.name}: rotations of width {cos.shape[-1]} for heads of width {head_dim}",
                BY_WEIGHTS,
            )
        return rotated(queries, cos, sin), rotated(keys, cos, sin)


def _ask_for_weights(_module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Make a block return its attention weights, if it does so only on request."""
    return args, {**kwargs, "output_attentions": True}


def _influence(attention: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Return the squared effect of key errors on the output, (G, d, d), summed over queries, to first order.

    Errors e_j of a query's scores change its output by sum_j a_j (e_j - sum_i a_i e_i) v_j, where a are its attention
    weights. For e_j = k_j x this is C^T x, where C is the covariance of keys and values under a, so that C C^T is
    summed. attention: (G, M, queries, keys). keys: (G, keys, d). values: (G, M, keys, w), after W_O, or vectors with
    the same inner products.
    """
    total, dtype = torch.zeros_like(keys.mT @ keys), attention.dtype
    # One query head at a time, and always in the same memory: it is the largest tensor of calibration.
    products = torch.empty(*keys.shape[1:], values.shape[-1], dtype=dtype, device=keys.device)  # (keys, d, w)
    for g, each in enumerate(keys.to(dtype)):
        for own, v in zip(attention[g], values[g].to(dtype), strict=True):
            torch.mul(each.unsqueeze(2), v.unsqueeze(1), out=products)
            joint = (own @ products.flatten(1)).reshape(len(own), each.shape[1], -1)
            covariance = joint - (own @ each).unsqueeze(2) * (own @ v).unsqueeze(1)  # (queries, d, w)
            through = covariance.transpose(0, 1).flatten(1)
            total[g] += (through @ through.mT).double()
    return total
