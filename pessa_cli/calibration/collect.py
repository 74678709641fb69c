"""Calibration: one pass of real data through the model, collecting what each attention block does with it.

Speech models hear audio files, folders of them, or the clips of JSON lines; text models read text files or JSON lines.
Every input runs alone, so that nothing is padding but what the model itself pads.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.listeners import collect_statistics
from pessa_cli.calibration.sequential import collect_in_sequence
from pessa_cli.calibration.trial_cuts import PASSES, try_out
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.data import CalibrationData, read_data
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.models.windows import on_device, windows
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import CollectedStatistics, SavedStatistics, Statistics, save_statistics
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.run import Run

TRIED = 8  # inputs that trials are made on, at most
FOLDS = 4  # one of so many parts of the inputs is for trials; the decomposition that is tried is that of the others


@dataclass(frozen=True)
class Calibration:
    """What a run knows of the calibration data.

    blocks: the reader that knows the weights by now. decomposition: that of all chosen blocks by these statistics, if
    collecting them has needed one already.
    """

    statistics: Statistics
    blocks: BlockReader
    decomposition: Decomposition | None = None


@contextmanager
def calibration_for(
    model: Model,
    sites: Sequence[Site],
    data: CalibrationData | None,
    files: Sequence[Path],
    rule: Rule | None = None,
    run: Run | None = None,
) -> Iterator[Calibration | None]:
    """What the options --calibrate and --statistics ask for: statistics collected or read, or None without either.

    With both, what is collected is also saved to the one file. With `rule` the statistics are collected in sequence.
    Raises UsageError for options that do not go together, and what `calibrate` raises.
    """
    if rule is not None and data is None:
        raise UsageError("--sequential depends on the rule", "give it the data itself: --calibrate")
    run = run or Run()
    if data is None:
        yield Calibration(SavedStatistics(*files), BlockReader(model.reader)) if files else None
        return
    if len(files) > 1:
        raise UsageError("--calibrate writes one --statistics", "collect first, and add files up afterwards")
    if files and files[0].exists():
        raise UsageError(f"{files[0]} is there already", "leave out --calibrate to use it, or give another file")
    with calibrate(model, sites, data, rule, run) as found:
        if files:
            save(files[0], found, sites)
        yield found


def collect(
    model: Model,
    sites: Sequence[Site],
    data: Sequence[Path],
    out: Path,
    rule: Rule | None = None,
    run: Run | None = None,
) -> None:
    """Collect the statistics of blocks, and save them to a file; see `calibrate`."""
    with calibrate(model, sites, read_data(data), rule, run or Run()) as found:
        save(out, found, sites)


def save(path: Path, found: Calibration, sites: Sequence[Site]) -> None:
    """Save statistics with the fingerprints of the weights that they belong to. Raises PessaError if that fails."""
    blocks = found.blocks
    fingerprints = {site.name: blocks.fingerprint(site, blocks.weights(site)) for site in sites}
    sums = {site.name: found.statistics.of(site) for site in sites}
    save_statistics(path, sums, fingerprints, found.statistics.data)


@contextmanager
def calibrate(
    model: Model, sites: Sequence[Site], data: CalibrationData, rule: Rule | None, run: Run
) -> Iterator[Calibration]:
    """Run the data through the model and collect the statistics of the given blocks, in memory.

    Takes a float64 matrix of a block's width for each block, and the attention of one input at a time. Weights that do
    not fit into memory twice are read from disk block by block, at every input, and there are no trial cuts. With
    `rule` each block is calibrated on what the blocks before it produce when they are pruned by it: one more pass for
    each block. Raises UsageError for a model and data that do not fit each other, and PessaError for a model that
    cannot be calibrated.
    """
    items, hashes = data
    free = free_memory()
    fits = free is None or 2 * 4 * model.parameters < free  # in float32, and the cut one of the trials
    if rule is not None and not fits:
        raise PessaError(
            f"--sequential: {4 * model.parameters:,} bytes of weights do not fit twice into {free:,} of free memory",
            "leave it out, or calibrate on a larger machine and use its --statistics here",
        )
    blocks = BlockReader(model.reader, keep=fits)
    with ExitStack() as resources:
        sequence = None
        if rule is not None:
            sequence = resources.enter_context(decomposition_of(model, run, blocks))
        with quiet_transformers(), tempfile.TemporaryDirectory() as offloaded:
            if free is None or fits:
                loaded = load_for_calibration(model).to(run.device)
            else:
                on_disk = {"device_map": "auto", "max_memory": {"cpu": free // 2}, "offload_folder": offloaded}
                loaded = load_for_calibration(model, **on_disk)
            samples: list[Inputs] = []
            with torch.inference_mode():
                transcribed = any(not site.spec.kind.startswith("encoder") for site in sites)
                inputs: Iterable[tuple[Inputs, int]] = _sampled(
                    windows(model.reader.folder, loaded, items, transcribed), samples
                )
                if sequence is not None:  # which goes over the inputs again for each block
                    inputs = list(inputs)
                total = sum(item.nbytes for item in items)
                ticks = run.progress("calibrating", total, 1)
                held_out, others = collect_statistics(loaded, sites, inputs, blocks, ticks, FOLDS)
            found = {site.name: held_out[site.name] + others[site.name] for site in sites}
            if fits:
                few = not any(float(one.frames) for one in others.values())  # of one input nothing can be held out
                loaded.set_attn_implementation("sdpa")
                tried = CollectedStatistics(found if few else others, hashes)
                with decomposition_of(model, run, blocks) as trial, run.progress("trying out", 0, PASSES) as tick:
                    trial.decompose(sites, tried)
                    most = sys.maxsize if free is None else free // 4
                    found = try_out(loaded, sites, on_device(samples, run.device), found, trial, most, tick)
            if rule is not None and sequence is not None:
                found = collect_in_sequence(model, loaded, sites, inputs, rule, found, blocks, sequence, run)
            del loaded
        yield Calibration(CollectedStatistics(found, sorted(hashes)), blocks, sequence)


def free_memory() -> int | None:
    """Bytes, None where nothing tells or no package could put weights elsewhere."""
    if find_spec("psutil") is None or find_spec("accelerate") is None:
        return None
    import psutil

    return int(psutil.virtual_memory().available)


def _sampled(inputs: Iterable[tuple[Inputs, int]], samples: list[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """The same inputs, with some of the first of every FOLDS kept on the way, evenly spaced: at most TRIED."""
    every = FOLDS
    for number, (given, nbytes) in enumerate(inputs):
        if number % every == 0:
            samples.append(given)
        if len(samples) > TRIED:
            del samples[1::2]
            every *= 2
        yield given, nbytes


def load_for_calibration(model: Model, **placing: Any) -> Any:
    """The model with an attention that gives its weights away.

    Raises UsageError for one in the compact layout, and for attention that hooks on its projections do not understand.
    """
    for site in model.sites:
        if why := _unheard(site):
            raise UsageError(f"{site.name} cannot be calibrated: {why}", "go by the weights alone")
    if any((site.qk_ranks, site.vo_ranks) != (site.full, site.full) for site in model.sites):
        raise UsageError(
            f"{model.reader.folder} is compact: some of its directions are gone",
            "calibrate the original, or what `pessa export --layout dense` makes of this one",
        )
    loaded = load(model, **placing)
    loaded.set_attn_implementation("eager")
    return loaded


def _unheard(site: Site) -> str:
    """Why what the projections of a block give away is not enough; nothing for no such reason."""
    if site.spec.fused:
        return "queries, keys and values come out of one projection"
    if 0 < site.unmerged < site.head_dim:
        return "a part of each head rotates"
    if site.spec.key_bias_stays:
        return "its projections see relative positions, too"
    if not site.spec.compact:
        return "it reads the weights of its projections directly"
    return ""
