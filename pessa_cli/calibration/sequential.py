"""Calibration in sequence: each block meets what the pruned blocks before it produce."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.listeners import collect_statistics
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.common.progress import Progress
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import Statistics, save_statistics
from pessa_cli.statistics.sums import BlockStatistics
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.passes import Cuts, measure
from pessa_cli.surgery.scratch import Spool


def collect_in_sequence(
    model: Model,
    loaded: Any,
    sites: Sequence[Site],
    inputs: Iterable[tuple[Inputs, int]],
    out: Path,
    rule: Rule,
    found: dict[str, BlockStatistics],
    about: tuple[Mapping[str, str], Sequence[str]],
    progress: Progress,
) -> None:
    """Collect the statistics of each block anew, behind those before it as the rule prunes them."""
    spectra = measure(model, list(sites), statistics=Statistics(out))
    plan = ranks_for(list(sites), spectra, rule, model.size)
    loaded.set_attn_implementation("eager")
    for site in sorted(sites, key=_place):
        with torch.inference_mode():
            ticks = progress(f"calibrating {site.name}", sum(nbytes for _, nbytes in inputs), 1)
            anew = collect_statistics(model, loaded, [site], inputs, ticks)[0][site.name]
        before = found[site.name]
        found[site.name] = replace(anew, output=before.output, tried=before.tried, harm=before.harm)
        save_statistics(out, found, *about)
        statistics = Statistics(out)
        with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool:
            measure(model, [site], spool=spool, statistics=statistics)
            set_block(loaded, site, Cuts(model, spool, statistics).tensors(site, plan.kept(site)))


def _place(site: Site) -> tuple[bool, int, bool]:
    """Where a block stands among those that one input passes through."""
    return not site.spec.kind.startswith("encoder"), site.layer, site.spec.kind.endswith("cross")
