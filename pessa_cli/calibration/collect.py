"""Calibration: run the calibration data through a model, and collect the statistics of its blocks.

The calibration data of Whisper are audio files, folders of them, or JSON lines of clips; those of models that read text
are text files or JSON lines. Every input runs in a batch of its own, so that no padding is added to it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.joint_plan import OutputHarm, best_plan, on_seen_inputs
from pessa_cli.calibration.listeners import BY_WEIGHTS, collect_statistics
from pessa_cli.calibration.memory import CALLS, WORK, free_memory, free_on, needs
from pessa_cli.calibration.sequential import collect_in_sequence
from pessa_cli.calibration.store import StatisticsOnDisk, WithTrials, in_groups
from pessa_cli.calibration.trial_cuts import passes, restoring, try_out
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.data import CalibrationData, DataItem, amount_of, read_data
from pessa_cli.models.dense import dense_model, text_part
from pessa_cli.models.hooks import BlockModules, block_modules, output_of
from pessa_cli.models.inputs import Inputs, positions_of
from pessa_cli.models.load import quiet_transformers
from pessa_cli.models.windows import device_of, on_device, windows
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.plan import Comparison
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import CollectedStatistics, SavedStatistics, Statistics, fingerprint, save_statistics
from pessa_cli.statistics.sums import BlockStatistics
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of, measure
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.run import Run

TRIED, TRIED_POSITIONS = 8, 4096  # the largest number of inputs for trial cuts, unless they are so short together
UNREAD = ("vision", "audio")  # the parts of models with several parts that calibration data do not reach
FOLDS = 4  # one of this many parts of the inputs is for trial cuts; the blocks are then decomposed by the other parts


@dataclass(frozen=True)
class Calibration:
    """Calibration statistics, with what was read and computed to collect them.

    blocks: the reader, which may hold the weights in memory. decomposition: that of all chosen blocks by these
    statistics, if collecting them has already computed it; otherwise None. comparison: the plan for the budget, if
    there is one and plans could be tried.
    """

    statistics: Statistics
    blocks: BlockReader
    decomposition: Decomposition | None = None
    comparison: Comparison | None = None


@contextmanager
def calibration_for(
    model: Model,
    sites: Sequence[Site],
    data: CalibrationData | None,
    files: Sequence[Path],
    rule: Rule | None = None,
    run: Run | None = None,
    budget: Rule | None = None,
) -> Iterator[Calibration | None]:
    """Collect or read the statistics for the options --calibrate and --statistics; None without either.

    With both options, the collected statistics are also saved to the file. rule: if given, the statistics are collected
    in sequence. budget: see `calibrate`. Raises UsageError for options that exclude each other, and the errors of
    `calibrate`.
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
    with calibrate(model, sites, data, rule, run, budget) as found:
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
    save_statistics(path, sums, fingerprints, found.statistics.data, found.statistics.sequential)


@contextmanager
def calibrate(
    model: Model,
    sites: Sequence[Site],
    data: CalibrationData,
    rule: Rule | None,
    run: Run,
    budget: Rule | None = None,
) -> Iterator[Calibration]:
    """Run the data through the model, and collect the statistics of the given blocks in memory.

    Memory is needed for the model, for two float64 matrices (H d, H d) for each block of attention and (F, F) for each
    MLP of F channels, and for the attention weights of one input; see `calibration.memory`. If that is not free, the
    data are run once for each of several groups of blocks, and the sums are kept in a temporary file. If the model does
    not fit, the weights are read from disk block by block for every input, and there are no trial cuts.

    budget: a rule with a budget, for which plans are assembled and compared at the model's output, on the inputs of the
    trial cuts. rule: if given, each block is then calibrated on the outputs of the blocks before it after those were
    pruned, by the plan that was taken or by this rule.

    Raises UsageError for data that do not fit the model and for blocks that cannot be calibrated, and PessaError when
    there is too little memory, or when the model does not compute attention as the statistics assume.
    """
    check_blocks(sites)
    items, identities = data
    groups = _groups(model, sites, rule, run)
    blocks = BlockReader(model.reader, keep=bool(groups))
    with ExitStack() as resources:
        with ExitStack() as running:
            running.enter_context(quiet_transformers())
            loaded = _loaded(model, run, bool(groups), running)
            at = _At(model, sites, loaded, block_modules(sites, loaded), blocks, run, resources)
            budget = budget if groups and budget is not None and budget.budgeted else None
            samples = _Samples([], [])
            inputs = _inputs(at, items, samples, transcribes=bool(groups), compares=budget is not None)
            if rule is not None or len(groups) > 1:  # they are needed again for each layer or group
                inputs = list(inputs)
            folds = _collected(at, inputs, sum(item.nbytes for item in items), groups)
            decomposition: Decomposition | None = None
            comparison: Comparison | None = None
            found: Mapping[str, BlockStatistics] = folds[0]
            if groups:
                found, decomposition, comparison = _tried(at, folds, samples, budget, data)
            if rule is not None:
                found, decomposition = _in_sequence(at, [given for given, _ in inputs], rule, found, comparison)
            del loaded, at
        statistics = CollectedStatistics(found, sorted(identities), None if rule is None else str(rule))
        yield Calibration(statistics, blocks, decomposition, comparison)


@dataclass(frozen=True)
class _At:
    """What all steps of calibration work on.

    loaded: the model in transformers; modules: its blocks by site name. resources: close what the result still needs.
    """

    model: Model
    sites: Sequence[Site]
    loaded: Any
    modules: Mapping[str, BlockModules]
    blocks: BlockReader
    run: Run
    resources: ExitStack


class _Samples(NamedTuple):
    """Some of the inputs: `held_out` for trials, and `seen` by the statistics that the trials cut by."""

    held_out: list[Inputs]
    seen: list[Inputs]


def _loaded(model: Model, run: Run, fits: bool, running: ExitStack) -> Any:
    """Load the part of a model that calibration runs; weights that do not fit into memory stay on disk."""
    placing: dict[str, Any] = {}
    if not fits:
        offloaded = running.enter_context(tempfile.TemporaryDirectory())
        most = {"cpu": (free_memory() or 0) // 2}
        placing = {"device_map": "auto", "max_memory": most, "offload_folder": offloaded}
    loaded = text_part(running.enter_context(dense_model(model, **placing)))
    loaded.set_attn_implementation("eager")  # the one that returns attention weights
    return loaded.to(run.device) if fits else loaded


def _inputs(
    at: _At, items: Sequence[DataItem], samples: _Samples, transcribes: bool, compares: bool
) -> Iterable[tuple[Inputs, int]]:
    """Yield the inputs that the data are encoded as, with their bytes, and store some of them in `samples`.

    transcribes: whether the decoder may run for the sake of the encoder's blocks. compares: whether plans are compared.
    """
    decodes = any(not site.kind.startswith("encoder") for site in at.sites)
    writes = transcribes and at.loaded.can_generate()

    def transcribed(number: int) -> bool:
        """Whether the decoder reads the text of a window: for its own blocks, and to measure their harm."""
        return decodes or (writes and number % FOLDS in range(2 if compares else 1))

    encoded = windows(at.model.reader.folder, at.loaded, items, transcribed)
    return _sampled(_sampled(encoded, samples.held_out, 0), samples.seen, 1)


@torch.inference_mode()
def _collected(
    at: _At, inputs: Iterable[tuple[Inputs, int]], nbytes: int, groups: Sequence[Sequence[Site]]
) -> list[MutableMapping[str, BlockStatistics]]:
    """Add up the statistics of the blocks in one pass for each group, by site name.

    There is a sum for the inputs that are held out and one for all others; without groups there is one, over all.
    """
    on_disk = len(groups) > 1
    folds = [_store(at.sites, on_disk, at.resources) for _ in range(2 if groups else 1)]
    for number, group in enumerate(groups or [at.sites]):
        part = f" {number + 1} of {len(groups)}" if on_disk else ""
        ticks = at.run.progress(f"calibrating{part}", nbytes, 0)
        runs = ((partial(_run, at.loaded, given), size) for given, size in inputs)
        device = device_of(at.loaded)
        sums = collect_statistics(group, at.modules, runs, at.blocks, ticks, FOLDS if groups else 1, device)
        for fold, own in zip(folds, sums, strict=True):
            fold.update(own)
        del sums, own
    return folds


def _tried(
    at: _At,
    folds: Sequence[MutableMapping[str, BlockStatistics]],
    samples: _Samples,
    budget: Rule | None,
    data: CalibrationData,
) -> tuple[Mapping[str, BlockStatistics], Decomposition | None, Comparison | None]:
    """Make trial cuts, and with a budget compare plans, by the statistics of the inputs that are not held out.

    Returns the statistics of all inputs with the results of the trial cuts, and with a budget the decomposition by them
    and the comparison. `folds` are emptied.
    """
    items, identities = data
    held_out, others = folds
    few = not float(others[at.sites[0].name].frames)  # a single input cannot be held out
    with suppress(ValueError):  # it is faster, but some models, such as Gemma 2, do not have it
        at.loaded.set_attn_implementation("sdpa")
    tried = CollectedStatistics(held_out if few else others, identities)
    with (
        decomposition_of(at.model, at.run, at.blocks, reuse=True) as trial,
        at.run.progress("trying out cuts", 0, passes(at.sites)) as tick,
    ):
        trial.decompose(at.sites, tried)
        # Block by block, since the sums of all blocks may be the largest part of the memory.
        total = _store(at.sites, isinstance(others, StatisticsOnDisk), at.resources)
        for site in at.sites:
            total[site.name] = held_out.pop(site.name) + others.pop(site.name)
        free = free_memory()
        most_bytes = sys.maxsize if free is None else int(CALLS * free)
        held, seen = (on_device(some, at.run.device) for some in samples)
        found = WithTrials(total, try_out(at.loaded, at.sites, held, trial, most_bytes, tick))
        if budget is None:
            return found, None, None
        decomposition = at.resources.enter_context(decomposition_of(at.model, at.run, at.blocks))
        decomposition.decompose(at.sites, CollectedStatistics(found, identities))
        with (
            restoring(at.modules),
            OutputHarm(at.loaded, at.sites, held, trial) as harm,
            OutputHarm(at.loaded, at.sites, seen, trial) as harm_on_seen,
        ):
            spectra, size, progress = decomposition.spectra, at.model.size, at.run.progress
            comparison = best_plan(harm, at.sites, spectra, budget, size, progress)
            if few:
                comparison = replace(comparison, held_out=False)
            else:
                comparison = on_seen_inputs(comparison, harm_on_seen, amount_of(items))
        return found, decomposition, comparison


def _in_sequence(
    at: _At,
    inputs: Sequence[Inputs],
    rule: Rule,
    found: Mapping[str, BlockStatistics],
    comparison: Comparison | None,
) -> tuple[Mapping[str, BlockStatistics], Decomposition]:
    """Collect the statistics of each block again, behind those before it as the best plan or the rule cuts them."""
    if comparison is None:
        known = CollectedStatistics(found, ())
        spectra = measure(at.model, at.sites, run=at.run, statistics=known, blocks=at.blocks)
        plan = ranks_for(at.sites, spectra, rule, at.model.size)
    else:
        plan = comparison.plan
    decomposition = at.resources.enter_context(decomposition_of(at.model, at.run, at.blocks))
    runs = [partial(_run, at.loaded, given) for given in inputs]
    again = collect_in_sequence(at.model, at.loaded, at.sites, runs, plan, found, at.blocks, decomposition, at.run)
    return again, decomposition


def _run(loaded: Any, given: Inputs) -> None:
    """Run a model on one input."""
    output_of(loaded, on_device([given], device_of(loaded))[0])


def _store(sites: Sequence[Site], on_disk: bool, resources: ExitStack) -> MutableMapping[str, BlockStatistics]:
    """Return a place for the statistics of blocks, on disk until `resources` are closed."""
    return StatisticsOnDisk(sites, resources) if on_disk else {}


def _groups(model: Model, sites: Sequence[Site], rule: Rule | None, run: Run) -> list[Sequence[Site]]:
    """Return the blocks that are calibrated together, in a pass for each group, if the whole model fits into memory.

    One group is all blocks, and all sums are in memory. The sums of several groups are in a temporary file, apart from
    those of the group. No group: the model does not fit.

    Raises PessaError if the model has to be in memory and does not fit, or if not even the statistics fit.
    """
    need = needs(model, sites)
    free, on_device = free_memory(), free_on(run.device)
    if on_device is not None and need.on_device > on_device:
        raise PessaError(
            f"--device {run.device}: calibration needs {need.on_device:,} bytes there, and {on_device:,} are free",
            "leave --device out, or choose fewer blocks with --sites and --layers",
        )
    if free is None or need.in_memory <= free:
        return [sites]
    if rule is None and need.in_groups <= free:
        room = int(free * (1 - CALLS)) - need.weights - need.copies - WORK * need.largest
        return [*in_groups(sites, room // 2)]
    short = f"calibration needs {need.in_memory:,} bytes of memory, and {free:,} are free"
    if rule is not None:
        raise PessaError(
            f"--sequential: {short}", "leave it out, or calibrate on a larger machine and use its --statistics here"
        )
    if need.on_disk > free:
        raise PessaError(
            f"calibration needs {need.on_disk:,} bytes of memory for the statistics alone, and {free:,} are free",
            "choose fewer blocks with --sites and --layers",
        )
    if find_spec("accelerate") is None:
        raise PessaError(
            f"{short}; without accelerate the weights cannot be read from disk block by block",
            "pip install accelerate, or calibrate on a larger machine and use its --statistics here",
        )
    return []


def _sampled(inputs: Iterable[tuple[Inputs, int]], samples: list[Inputs], place: int) -> Iterator[tuple[Inputs, int]]:
    """Yield all inputs, and store in `samples` some evenly spaced among those at a place of every FOLDS.

    At most TRIED are stored, or more if they have at most TRIED_POSITIONS positions together.
    """
    every, positions = FOLDS, 0
    for number, (given, nbytes) in enumerate(inputs):
        if number % every == place:
            samples.append(given)
            positions += positions_of(given)
        if len(samples) > TRIED and positions > TRIED_POSITIONS:
            del samples[1::2]
            every *= 2
            positions = sum(map(positions_of, samples))
        yield given, nbytes


def check_blocks(sites: Sequence[Site]) -> None:
    """Raise UsageError for blocks that cannot be calibrated."""
    for site in sites:
        if not site.compact:
            raise UsageError(
                f"{site.name} cannot be calibrated: it reads the weights of its projections without calling them",
                BY_WEIGHTS,
            )
        if (tower := site.kind.partition(".")[0]) in UNREAD:
            raise UsageError(
                f"{site.name} cannot be calibrated: the data of a model with several parts are text, which its {tower} "
                "part does not read",
                "choose the blocks of the text part: --sites text.self",
            )
