"""Calibration: one pass of real data through the model, collecting what each attention block does with it.

Speech models hear audio files, folders of them, or the clips of JSON lines; text models read text files or JSON lines.
Every input runs alone, so that nothing is padding but what the model itself pads.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.listeners import collect_statistics
from pessa_cli.calibration.sequential import collect_in_sequence
from pessa_cli.calibration.trial_cuts import PASSES, try_out
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.models.data import read_data
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.models.windows import item_windows, on_device
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import Statistics, fingerprint, save_statistics
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import Model

TRIED = 8  # inputs that trials are made on, at most
FOLDS = 4  # one of so many parts of the inputs is for trials; the decomposition that is tried is that of the others


@contextmanager
def statistics_for(
    model: Model,
    sites: Sequence[Site],
    data: Sequence[Path],
    files: Sequence[Path],
    rule: Rule | None = None,
    progress: Progress = quietly,
    device: str = "cpu",
) -> Iterator[Statistics | None]:
    """What the options --calibrate and --statistics come to: statistics read or collected, or None without either.

    With both, what is collected goes to the one file. With `rule` they are collected in sequence.
    """
    if rule is not None and not data:
        raise UsageError("--sequential depends on the rule", "give it the data itself: --calibrate")
    if not data:
        yield Statistics(*files) if files else None
        return
    if len(files) > 1:
        raise UsageError("--calibrate writes one --statistics", "collect first, and add files up afterwards")
    if files and files[0].exists():
        raise UsageError(f"{files[0]} is there already", "leave out --calibrate to use it, or give another file")
    with tempfile.TemporaryDirectory() as folder:
        path = files[0] if files else Path(folder) / "statistics.safetensors"
        collect(model, sites, data, path, rule, progress, device)
        yield Statistics(path)


def collect(
    model: Model,
    sites: Sequence[Site],
    data: Sequence[Path],
    out: Path,
    rule: Rule | None = None,
    progress: Progress = quietly,
    device: str = "cpu",
) -> None:
    """Run the data through the model and write the statistics of its blocks to `out`.

    Takes a float64 matrix of a block's width for each block, and the attention of one input at a time. Weights that do
    not fit into memory twice are read from disk block by block, at every input, and there are no trials. With `rule`
    each block meets what the blocks before it produce when they are pruned by it: one more pass for each block.
    """
    items, hashes = read_data(data)
    weights = {site.name: fingerprint(read_site(model.reader, site)) for site in sites}
    free = free_memory()
    fits = free is None or 2 * 4 * model.parameters < free  # in float32, and the pruned one of the trials
    if rule is not None and not fits:
        raise PessaError(
            f"--sequential: {4 * model.parameters:,} bytes of weights do not fit twice into {free:,} of free memory",
            "leave it out, or calibrate on a larger machine and use its --statistics here",
        )
    with quiet_transformers(), tempfile.TemporaryDirectory() as offloaded:
        if free is None or fits:
            loaded = load_for_calibration(model).to(device)
        else:
            on_disk = {"device_map": "auto", "max_memory": {"cpu": free // 2}, "offload_folder": offloaded}
            loaded = load_for_calibration(model, **on_disk)
        with torch.inference_mode():
            said = any(not site.spec.kind.startswith("encoder") for site in sites)
            inputs = (given for item in items for given in item_windows(model.reader.folder, loaded, item, said))
            total = sum(item.nbytes for item in items)
            samples: list[Inputs] = []
            # In sequence, what the whole model hears is what its decoder goes on with.
            kept = _sampled(inputs, samples) if rule is None else list(_sampled(inputs, samples))
            held_out, others = collect_statistics(model, loaded, sites, kept, progress("calibrating", total, 1), FOLDS)
        found = {site.name: held_out[site.name] + others[site.name] for site in sites}
        if fits:
            few = not any(float(one.frames) for one in others.values())  # of a single input nothing can be held out
            save_statistics(out, found if few else others, weights, hashes)
            with progress("trying out", 0, PASSES) as tick:
                loaded.set_attn_implementation("sdpa")
                found = try_out(model, loaded, sites, on_device(samples, device), found, Statistics(out), tick)
        save_statistics(out, found, weights, hashes)
        if rule is not None:
            collect_in_sequence(model, loaded, sites, kept, out, rule, found, (weights, hashes), progress)


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
