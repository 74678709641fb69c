"""Writing an output folder: shards, side files, config.json, model card, spectra and manifest.

Tensors are written in the order of the source, except that the tensors of one block follow one another and lie in the
same shard. A shard therefore needs nothing from the shard before it, and a run that was killed can continue with the
first shard that is not finished.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pessa_cli.blocks.compact_format import HINT_BEGINS, LOAD_HINT, QUANT_METHOD, Ranks
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.dtypes import loaded_dtype
from pessa_cli.checkpoint.files import CONFIG_FILE, sha256_of, source_name, write_json
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.manifest import CARD_FILE, UNHASHED, write_manifest
from pessa_cli.checkpoint.reader import CheckpointReader, Header
from pessa_cli.checkpoint.shards import ShardWriter, write_index
from pessa_cli.checkpoint.staging import Staging
from pessa_cli.common.jobs import in_order
from pessa_cli.ranks.spectra import Spectra, Spectrum
from pessa_cli.surgery.card import ORIGINAL_FILE, front_matter, is_card, model_card, read_card
from pessa_cli.surgery.generation import GENERATION_FILE, write_generation_config
from pessa_cli.surgery.rewrite import Rewrite
from pessa_cli.surgery.side_files import copy_side_files
from pessa_cli.surgery.spectra_file import save_spectra
from pessa_cli.surgery.totals import totals


def write_output(
    rewrite: Rewrite,
    staging: Staging,
    tensors_of: Callable[[Site], Mapping[str, Any]],
    jobs: int,
    tick: Callable[[int, int], None],
) -> None:
    """Write the whole output into the staging folder, except shards that an earlier run has finished.

    tensors_of: returns the new tensors of a block; it runs in up to `jobs` threads, a few blocks ahead of the writing.
    tick: is called with the numbers of bytes and blocks that were written. Raises PessaError when the source files
    change during the run.
    """
    reader, folder = rewrite.model.reader, staging.folder
    staging.begin(rewrite.run)
    hasher = ThreadPoolExecutor(1)
    try:
        hashes = {file: hasher.submit(sha256_of, reader.folder / file) for file in reader.files}
        last = {list(site.tensors)[-1] for site in rewrite.sites}
        write_shards(
            reader, staging, rewrite.shards, lambda plan: _new_tensors(rewrite, plan, tensors_of, jobs), last, tick
        )
        sources = {file: digest.result() for file, digest in hashes.items()}
    finally:
        hasher.shutdown(cancel_futures=True)
    copied = copy_side_files(reader.folder, folder, rewrite.contents.copied)
    write_generation_config(reader.folder, folder, reader.config)
    _write_config(rewrite, folder)
    _write_card(rewrite, folder)
    if known := _output_spectra(rewrite):
        save_spectra(folder, known)
    reader.check_unchanged()
    outputs = hashes_of(staging)
    sources |= {CONFIG_FILE: sha256_of(reader.folder / CONFIG_FILE)} | {
        name: sha256_of(reader.folder / name) if name == GENERATION_FILE else outputs[copy]
        for name, copy in copied.items()
    }
    write_manifest(folder, rewrite.summary | {"source_sha256": dict(sorted(sources.items()))}, outputs)


def write_shards(
    reader: CheckpointReader,
    staging: Staging,
    shards: Mapping[str, Header],
    tensors: Callable[[Header], Iterable[tuple[str, Any]]],
    last: Container[str],
    tick: Callable[[int, int], None],
) -> None:
    """Write the shards that are not finished yet, and the index if there are several shards.

    tensors: returns the names and tensors of a shard in order, with None for a tensor that is copied from the source.
    last: the names of the last tensors of blocks. tick: is called for each tensor with its bytes, and with one block
    if its name is in `last`. Raises PessaError when the disk has no room for the shards, before the first is written,
    and when the source files change during the run.
    """
    left = [plan for file, plan in shards.items() if file not in staging.finished]
    staging.need(sum(info.nbytes for plan in left for info in plan.values()))
    for file, plan in shards.items():
        if file in staging.finished:
            tick(sum(info.nbytes for info in plan.values()), sum(name in last for name in plan))
            continue
        with ShardWriter(staging.folder / file, plan, reader.metadata) as shard:
            for name, tensor in tensors(plan):
                if tensor is None:
                    shard.write(name, reader.checked_chunks(name))
                else:
                    shard.put(name, tensor)
                tick(plan[name].nbytes, name in last)
        reader.check_unchanged()
        staging.done(file, shard.sha256)
    if len(shards) > 1:
        write_index(staging.folder, shards)


def hashes_of(staging: Staging) -> dict[str, str]:
    """Return the SHA-256 hashes of the files in the staging folder that the manifest lists, by name."""
    files = {name: path for name, path in visible_files(staging.folder).items() if name not in UNHASHED}
    return {name: staging.finished.get(name) or sha256_of(path) for name, path in sorted(files.items())}


def _new_tensors(
    rewrite: Rewrite, plan: Header, tensors_of: Callable[[Site], Mapping[str, Any]], jobs: int
) -> Iterator[tuple[str, Any]]:
    """Yield the planned tensors in order, with None for tensors to copy; blocks are computed a few ahead."""
    ready: dict[str, Any] = {}
    with closing(in_order(tensors_of, rewrite.sites_of(plan), jobs)) as results:
        for name in plan:
            if name in rewrite.owner and name not in ready:
                ready = dict(next(results))
            yield name, ready.pop(name) if name in ready else None


def _write_config(rewrite: Rewrite, folder: Path) -> None:
    modules = {name: str(ragged) for site in rewrite.stored for name, ragged in site.ragged().items()}
    reader = rewrite.model.reader
    config = {key: value for key, value in reader.config.items() if key != "quantization_config"}
    # Without a dtype in config.json transformers takes that of the first tensor, and the order of tensors may change.
    found, written = (
        loaded_dtype(config, (info.dtype for info in header.values())) for header in (reader.header, rewrite.header)
    )
    if found != written:
        config["dtype"] = found
    if str(config.get("attn_implementation")).startswith(HINT_BEGINS):
        del config["attn_implementation"]
    if modules:
        config.setdefault("attn_implementation", LOAD_HINT)
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "modules": modules}
    write_json(folder / CONFIG_FILE, config)


def _write_card(rewrite: Rewrite, folder: Path) -> None:
    reader, model = rewrite.model.reader, rewrite.model
    card = read_card(reader.folder) if (reader.folder / CARD_FILE).is_file() else ""
    known = front_matter(card)
    names = (source_name(reader.folder), rewrite.source, known.pop("base_model", "") if is_card(card) else "")
    repository = next((name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)), None)
    counts = totals(reader.header, model.sites, rewrite.sites, rewrite.ranks)
    original = (folder / ORIGINAL_FILE).exists()
    text = model_card(rewrite.summary, reader.config, counts, known, repository, original)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _output_spectra(rewrite: Rewrite) -> dict[str, Spectra]:
    """Return the spectra that are valid for the weights of the output.

    There are none for method "vanilla", whose output is not stored as factors, and none for blocks with a refitted W_O.
    """
    if rewrite.method == "vanilla":
        return {}
    fitted = rewrite.command == "prune" and rewrite.data is not None
    others = {name: known for name, known in rewrite.model.spectra.items() if name not in rewrite.ranks.ranks}
    return others if fitted else dict(rewrite.model.spectra) | _cut_spectra(rewrite)


def _cut_spectra(rewrite: Rewrite) -> dict[str, Spectra]:
    """Return the spectra after pruning: the values beyond each head's rank are zero."""

    def cut(spectrum: Spectrum, ranks: Ranks) -> Spectrum:
        return np.where(np.arange(spectrum.shape[1]) < np.array(ranks)[:, None], spectrum, 0.0)

    found: dict[str, Spectra] = {}
    for name, known in rewrite.spectra.items():
        kept = rewrite.kept_values.get(name)
        if kept is None:
            continue
        norms = known.norms if known.norms is None else cut(known.norms[None], kept["mlp"])[0]
        seams = {seam: cut(each, kept[seam]) for seam, each in known.seams.items()}
        found[name] = replace(known, seams=seams, norms=norms, order=None)
    return found
