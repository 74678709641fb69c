"""Calibration in sequence: each block is calibrated on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.listeners import collect_statistics
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.common.progress import quietly
from pessa_cli.models.hooks import block_modules
from pessa_cli.models.layers import LayerCall, layer_by_layer, stacks_of
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.statistics.file import CollectedStatistics
from pessa_cli.statistics.sums import BlockStatistics
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.run import Run


@torch.inference_mode()
def collect_in_sequence(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    runs: Sequence[Callable[[], object]],
    plan: RankPlan,
    found: Mapping[str, BlockStatistics],
    blocks: BlockReader,
    decomposition: Decomposition,
    run: Run,
) -> dict[str, BlockStatistics]:
    """Collect the statistics of each block on the outputs of the blocks before it, which are pruned by a plan.

    The model runs layer by layer, and the hidden states of all inputs are kept in memory; see `models.layers`. loaded:
    the model in transformers; its blocks are pruned. runs: each runs it on one input. found: the statistics of the
    unpruned model by site name, whose trial cuts are taken over. The decomposed blocks are added to `decomposition`.
    Returns the statistics by site name.
    """
    loaded.set_attn_implementation("eager")  # the one that returns attention weights
    modules, result = block_modules(sites, loaded), dict(found)
    with run.progress("calibrating in sequence", 0, len(sites)) as tick:
        for layers in stacks_of(loaded, sites, model.sites):
            for layer, calls in layer_by_layer(layers, runs):
                for site in layer.sites:
                    replays = [(partial(_replay, layer.module, own), 0) for own in calls]
                    (sums,) = collect_statistics([site], modules, replays, blocks, quietly("", 0, 0), device=run.device)
                    result[site.name] = sums[site.name].with_trials(found[site.name].trial_sums)
                    decomposition.decompose([site], CollectedStatistics(result, ()))
                    set_block(site, modules[site.name], decomposition.cut(plan.kept(site), "dense"))
                    tick(0, 1)
    return result


def _replay(layer: nn.Module, calls: Sequence[LayerCall]) -> None:
    for call in calls:
        call.of(layer)
