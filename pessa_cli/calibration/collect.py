"""Calibration: run the calibration data through a model, and collect the statistics of its attention blocks.

The calibration data of speech models are audio files, folders of them, or JSON lines of clips; those of text models are
text files or JSON lines. Every input runs in a batch of its own, so that no padding is added to it.
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
from pessa_cli.calibration.listeners import BY_WEIGHTS, collect_statistics
from pessa_cli.calibration.sequential import collect_in_sequence
from pessa_cli.calibration.trial_cuts import PASSES, try_out
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.data import CalibrationData, read_data
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.models.windows import on_device, windows
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import CollectedStatistics, SavedStatistics, Statistics, fingerprint, save_statistics
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.run import Run

TRIED = 8  # the largest number of inputs for trial cuts
FOLDS = 4  # one of this many parts of the inputs is for trial cuts; the blocks are then decomposed by the other parts


@dataclass(frozen=True)
class Calibration:
    """Calibration statistics, with what was read and computed to collect them.

    blocks: the reader, which may hold the weights in memory. decomposition: that of all chosen blocks by these
    statistics, if collecting them has already computed it; otherwise None.
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
    """Collect or read the statistics for the options --calibrate and --statistics; None without either.

    With both options, the collected statistics are also saved to the file. rule: if given, the statistics are collected
    in sequence. Raises UsageError for options that exclude each other, and the errors of `calibrate`.
    """
    if rule is not None and data is None:
        raise UsageError(
            "--sequential needs the calibration data, because its statistics depend on the rule",
            "give --calibrate DATA",
        )
    run = run or Run()
    if data is None:
        yield Calibration(SavedStatistics(*files), BlockReader(model.reader)) if files else None
        return
    if len(files) > 1:
        raise UsageError(
            f"--calibrate writes one file, but --statistics names {len(files)}",
            "collect into one file; to add up several files, give them without --calibrate",
        )
    if files and files[0].exists():
        raise UsageError(f"{files[0]} exists already", "leave out --calibrate to use it, or give another file")
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
    """Collect the statistics of the given blocks, and save them to the file `out`; see `calibrate` for the errors."""
    with calibrate(model, sites, read_data(data), rule, run or Run()) as found:
        save(out, found, sites)


def save(path: Path, found: Calibration, sites: Sequence[Site]) -> None:
    """Save statistics to a file, with the fingerprints of the weights that they belong to.

    Raises PessaError if the file cannot be written.
    """
    blocks = found.blocks
    fingerprints = {site.name: fingerprint(blocks.weights(site)) for site in sites}
    sums = {site.name: found.statistics.of(site) for site in sites}
    save_statistics(path, sums, fingerprints, found.statistics.data)


@contextmanager
def calibrate(
    model: Model, sites: Sequence[Site], data: CalibrationData, rule: Rule | None, run: Run
) -> Iterator[Calibration]:
    """Run the data through the model, and collect the statistics of the given blocks in memory.

    Memory is needed for the model, for one float64 matrix (H d, H d) for each block, and for the attention weights of
    one input. If the float32 weights do not fit into memory twice, they are read from disk block by block for every
    input, and there are no trial cuts. rule: if given, each block is calibrated on the outputs of the blocks before it
    after those were pruned by the rule, which takes one more pass over the data for each block.

    Raises UsageError for data that do not fit the model and for blocks that cannot be calibrated, and PessaError when
    the model does not compute attention as the statistics assume.
    """
    items, hashes = data
    free = free_memory()
    fits = free is None or 2 * 4 * model.parameters < free  # the float32 model, and cut copies of its blocks
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
                if sequence is not None:  # the inputs are needed again for each block
                    inputs = list(inputs)
                total = sum(item.nbytes for item in items)
                ticks = run.progress("calibrating", total, 1)
                held_out, others = collect_statistics(loaded, sites, inputs, blocks, ticks, FOLDS)
            found = {site.name: held_out[site.name] + others[site.name] for site in sites}
            if fits:
                few = not any(float(one.frames) for one in others.values())  # a single input cannot be held out
                loaded.set_attn_implementation("sdpa")
                tried = CollectedStatistics(found if few else others, hashes)
                with (
                    decomposition_of(model, run, blocks, reuse=True) as trial,
                    run.progress("trying out", 0, PASSES) as tick,
                ):
                    trial.decompose(sites, tried)
                    most = sys.maxsize if free is None else free // 4
                    found = try_out(loaded, sites, on_device(samples, run.device), found, trial, most, tick)
            if rule is not None and sequence is not None:
                found = collect_in_sequence(model, loaded, sites, inputs, rule, found, blocks, sequence, run)
            del loaded
        yield Calibration(CollectedStatistics(found, sorted(hashes)), blocks, sequence)


def free_memory() -> int | None:
    """Return the free memory in bytes.

    Returns None without psutil, which measures it, and without accelerate, which could leave weights on disk.
    """
    if find_spec("psutil") is None or find_spec("accelerate") is None:
        return None
    import psutil

    return int(psutil.virtual_memory().available)


def _sampled(inputs: Iterable[tuple[Inputs, int]], samples: list[Inputs]) -> Iterator[tuple[Inputs, int]]:
    """Yield all inputs, and store in `samples` at most TRIED, evenly spaced among the first of every FOLDS inputs."""
    every = FOLDS
    for number, (given, nbytes) in enumerate(inputs):
        if number % every == 0:
            samples.append(given)
        if len(samples) > TRIED:
            del samples[1::2]
            every *= 2
        yield given, nbytes


def load_for_calibration(model: Model, **placing: Any) -> Any:
    """Load the model with the attention implementation of transformers that returns attention weights.

    placing: arguments of `from_pretrained` that place the weights. Raises UsageError for a compact model, and for
    attention blocks that hooks on the projections cannot observe.
    """
    for site in model.sites:
        if why := _obstacle(site):
            raise UsageError(
                f"{site.name} cannot be calibrated: {why}",
                BY_WEIGHTS,
            )
    if any((site.qk_ranks, site.vo_ranks) != (site.full, site.full) for site in model.sites):
        raise UsageError(
            f"{model.reader.folder} is compact, which cannot be calibrated: some of its directions are not stored",
            "calibrate the original model, or export this one with `pessa export --layout dense` and calibrate that",
        )
    loaded = load(model, **placing)
    loaded.set_attn_implementation("eager")
    return loaded


def _obstacle(site: Site) -> str:
    """Return why the outputs of a block's projections are not enough to calibrate it; "" if they are."""
    if site.spec.fused:
        return "queries, keys and values come from one projection"
    if 0 < site.unmerged < site.head_dim:
        return f"RoPE rotates only {site.unmerged} of the {site.head_dim} dimensions of each head"
    if site.spec.key_bias_stays:
        return "its projections are also applied to relative positions"
    if not site.spec.compact:
        return "it reads the weights of its projections directly"
    return ""
