"""Calibration in sequence: each block is calibrated on the outputs of the pruned blocks before it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.listeners import collect_statistics
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.models.hooks import block_modules
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import CollectedStatistics
from pessa_cli.statistics.sums import BlockStatistics
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition, measure
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.run import Run


def collect_in_sequence(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    inputs: Iterable[tuple[Inputs, int]],
    rule: Rule,
    found: Mapping[str, BlockStatistics],
    blocks: BlockReader,
    decomposition: Decomposition,
    run: Run,
) -> dict[str, BlockStatistics]:
    """Collect the statistics of each block on the outputs of the blocks before it, which are pruned by the rule.

    loaded: the model in transformers; its blocks are pruned. inputs: each with its number of bytes. found: the
    statistics of the unpruned model by site name, from which the ranks are planned. The decomposed blocks are added to
    `decomposition`. Returns the statistics by site name.
    """
    spectra = measure(model, sites, run=run, statistics=CollectedStatistics(found, ()), blocks=blocks)
    plan = ranks_for(list(sites), spectra, rule, model.size)
    loaded.set_attn_implementation("eager")  # the one that returns attention weights
    modules, result = block_modules(sites, loaded), dict(found)
    total = sum(nbytes for _, nbytes in inputs)
    for site in sorted(sites, key=_place):
        with torch.inference_mode():
            ticks = run.progress(f"calibrating {site.name}", total, 0)
            sums = collect_statistics(loaded, [site], inputs, blocks, ticks)[0][site.name]
        before = found[site.name]
        result[site.name] = replace(sums, output=before.output, tried=before.tried, harm=before.harm)
        decomposition.decompose([site], CollectedStatistics(result, ()))
        set_block(site, modules[site.name], decomposition.cut(plan.kept(site), "dense"))
    return result


def _place(site: Site) -> tuple[bool, int, int]:
    """Return a sort key for the order in which an input passes through the blocks."""
    last = site.kind.rpartition(".")[2]
    return not site.kind.startswith("encoder"), site.layer, (last == "mlp") + (last in ("mlp", "cross"))
