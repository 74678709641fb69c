"""What one rewriting pass writes, and the pass: shards planned ahead, filled block by block, in order.

The order of the tensors is that of the source, but that a block's are together, and no block is cut in two by the
end of a shard. So a shard needs nothing from the one before it, and a killed run goes on with the next one.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pessa_cli import __version__
from pessa_cli.card import CARD_FILE, ORIGINAL_FILE, front_matter, is_card, model_card, read_card
from pessa_cli.checkpoint import CONFIG_FILE, SINGLE_FILE, CheckpointReader, Header, write_json
from pessa_cli.heads import Layout
from pessa_cli.jobs import in_order
from pessa_cli.model import MANIFEST_FILE, Model, save_spectra
from pessa_cli.ragged import LOAD_HINT, QUANT_METHOD, Ranks, pairs_text
from pessa_cli.ranks import RankPlan, Spectra, Spectrum
from pessa_cli.report import totals
from pessa_cli.sites import Site, in_full, ragged_site
from pessa_cli.sources import source_name
from pessa_cli.writer import ShardWriter, Staging, run_identity, sha256_of, write_index

Method = Literal["svd", "vanilla", "calibrated"]
UNHASHED = (MANIFEST_FILE, CARD_FILE)  # what cannot hold its own hash, and what people edit
SHARD_BYTES = 5 * 10**9  # as transformers
# Weights in other formats: a copy of them in the output would be the unpruned model again.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ot"),
    ".index.json",
)


@dataclass(frozen=True)
class Rewrite:
    """What one pass writes: which blocks, with how many directions, and how; the rest of the model stays as it is.

    `spectra` are the blocks' spectra before the cut; `rule` says in words where the ranks come from, `source` what
    the user called the model.
    """

    command: str
    source: str
    model: Model
    sites: list[Site]
    ranks: RankPlan
    spectra: Mapping[str, Spectra]
    rule: str
    method: Method = "svd"
    layout: Layout = "compact"
    shard_bytes: int = SHARD_BYTES
    data: str | None = None

    @cached_property
    def stored(self) -> list[Site]:
        """All of the model's sites as the output stores them; one that was not chosen keeps its layout and bytes."""
        return [self._stored(site) for site in self.model.sites]

    def _stored(self, site: Site) -> Site:
        if site.name not in self.ranks.vo:
            return site
        if self.layout == "dense":
            return in_full(site)
        return self.ranks.kept(site)

    @cached_property
    def owner(self) -> dict[str, Site]:
        """The rewritten block that a tensor belongs to."""
        return {name: site for site in self.sites for name in site.tensors}

    def sites_of(self, plan: Header) -> list[Site]:
        """The rewritten blocks in a part of the header, in order."""
        return list({self.owner[name].name: self.owner[name] for name in plan if name in self.owner}.values())

    @cached_property
    def header(self) -> Header:
        """Every tensor of the output, in the output's order."""
        source = self.model.reader.header
        shapes = {name: shape for site in self.stored for name, shape in site.tensors.items()}
        order: dict[str, None] = {}
        for name in source:
            order |= dict.fromkeys(self.owner[name].tensors if name in self.owner else [name])
        return {name: replace(source[name], shape=shapes.get(name, source[name].shape)) for name in order}

    @cached_property
    def shards(self) -> dict[str, dict[str, Any]]:
        """The files of the output under their final names, each with its part of the header."""
        return cut_into_files(self.header, {name: site.name for name, site in self.owner.items()}, self.shard_bytes)

    @property
    def summary(self) -> dict[str, Any]:
        """What pessa.json says before the hashes: versions, options, and ranks and dropped norms of every block."""
        sides = {"qk": self.ranks.qk, "vo": self.ranks.vo}
        of_spectra = {"qk": self.merged_ranks, "vo": self.ranks.vo}
        pairs = {name: {"pairs": pairs_text(kept)} for name, kept in self.ranks.pairs.items()}
        return {
            "pessa": __version__,
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "command": self.command,
            "source": self.source,
            "method": self.method,
            **({} if self.data is None else {"calibration_sha256": self.data}),
            "rule": self.rule,
            "layout": self.layout,
            "ranks": {
                s.name: {side: _text(plan[s.name]) for side, plan in sides.items()} | pairs.get(s.name, {})
                for s in self.sites
            },
            "dropped": {name: _dropped(known, of_spectra, name) for name, known in sorted(self.spectra.items())},
        }

    @property
    def merged_ranks(self) -> dict[str, Ranks]:
        """How many directions of the spectra of Q-K are kept."""
        before = {site.name: site.before for site in self.sites}
        return {name: tuple(rank - before[name] for rank in ranks) for name, ranks in self.ranks.qk.items()}

    @property
    def run(self) -> str:
        """Identifies what is written, for a run that goes on with another's shards."""
        shapes = {file: {name: info.shape for name, info in part.items()} for file, part in self.shards.items()}
        return run_identity(self.model.reader, self.summary, shapes)


def cut_into_files(header: Header, owner: Mapping[str, str], most_bytes: int) -> dict[str, dict[str, Any]]:
    """The header in parts of at most so many bytes, by file name; neighbours of one owner stay together."""
    parts: list[dict[str, Any]] = [{}]
    size = 0
    for _, names in groupby(header, lambda name: owner.get(name, name)):
        together = {name: header[name] for name in names}
        nbytes = sum(info.nbytes for info in together.values())
        if parts[-1] and size + nbytes > most_bytes:
            parts.append({})
            size = 0
        parts[-1] |= together
        size += nbytes
    if len(parts) == 1:
        return {SINGLE_FILE: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def _text(ranks: Ranks) -> str:
    return " ".join(map(str, ranks))


def _dropped(known: Spectra, sides: Mapping[str, Mapping[str, Ranks]], name: str) -> dict[str, list[float] | None]:
    """The norm of each head's dropped directions."""

    def norms(spectrum: Spectrum | None, ranks: Ranks) -> list[float] | None:
        if spectrum is None:
            return None
        return [float(f"{np.linalg.norm(row[rank:]):.9g}") for row, rank in zip(spectrum, ranks, strict=True)]

    return {side: norms(getattr(known, side), plan[name]) for side, plan in sides.items() if name in plan}


def write_output(
    rewrite: Rewrite,
    staging: Staging,
    tensors_of: Callable[[Site], Mapping[str, Any]],
    jobs: int,
    tick: Callable[[int, int], None],
) -> None:
    """Write everything into the staging folder: shards that are not finished yet, side files, config, manifest.

    `tensors_of` makes a block's new tensors; it runs in up to `jobs` threads, a few blocks ahead of the writing.
    `tick` is called with the bytes and blocks that were written. Raises PessaError when the source changes meanwhile.
    """
    reader, folder = rewrite.model.reader, staging.folder
    staging.begin(rewrite.run)
    hasher = ThreadPoolExecutor(1)
    try:
        hashes = {file: hasher.submit(sha256_of, reader.folder / file) for file in reader.files}
        last = {list(site.tensors)[-1] for site in rewrite.sites}
        write_shards(
            reader, staging, rewrite.shards, lambda plan: _tensors(rewrite, plan, tensors_of, jobs), last, tick
        )
        sources = {file: digest.result() for file, digest in hashes.items()}
    finally:
        hasher.shutdown(cancel_futures=True)
    copied = copy_side_files(reader.folder, folder)
    _write_config(reader.config, rewrite.stored, folder)
    _write_card(rewrite, folder)
    if known := _left(rewrite):
        save_spectra(folder, known)
    reader.check_unchanged()
    outputs = hashes_of(staging)
    sources |= {CONFIG_FILE: sha256_of(reader.folder / CONFIG_FILE)} | {
        name: outputs[copy] for name, copy in copied.items()
    }
    manifest = rewrite.summary | {
        "source_sha256": dict(sorted(sources.items())),
        "sha256": outputs,
    }
    write_json(folder / MANIFEST_FILE, manifest)


def write_shards(
    reader: CheckpointReader,
    staging: Staging,
    shards: Mapping[str, Header],
    tensors: Callable[[Header], Iterable[tuple[str, Any]]],
    last: Container[str],
    tick: Callable[[int, int], None],
) -> None:
    """Write the shards that are not finished yet, and their index where there are several.

    `tensors` gives a shard's in order, None for one to copy. `tick` is called with the bytes written, and with
    a block for each name in `last`. Raises PessaError when the source changes meanwhile.
    """
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
    """SHA-256 of the files in the staging folder that a manifest lists, by name."""
    files = {name: path for name, path in visible_files(staging.folder).items() if name not in UNHASHED}
    return {name: staging.finished.get(name) or sha256_of(path) for name, path in sorted(files.items())}


def _tensors(
    rewrite: Rewrite, plan: Header, tensors_of: Callable[[Site], Mapping[str, Any]], jobs: int
) -> Iterator[tuple[str, Any]]:
    """The planned tensors in order: None for one to copy, computed ones a few blocks ahead."""
    ready: dict[str, Any] = {}
    with closing(in_order(tensors_of, rewrite.sites_of(plan), jobs)) as results:
        for name in plan:
            if name in rewrite.owner and name not in ready:
                ready = dict(next(results))
            yield name, ready.pop(name) if name in ready else None


def _write_config(config: dict[str, Any], stored: list[Site], folder: Path) -> None:
    modules = {name: str(ragged) for site in stored for name, ragged in ragged_site(site).items()}
    config = {key: value for key, value in config.items() if key != "quantization_config"}
    if config.get("attn_implementation") == LOAD_HINT:
        del config["attn_implementation"]
    if modules:
        config.setdefault("attn_implementation", LOAD_HINT)
        config["quantization_config"] = {"quant_method": QUANT_METHOD, "modules": modules}
    write_json(folder / CONFIG_FILE, config)


def visible_files(folder: Path) -> dict[str, Path]:
    """The files below a folder by their relative names, but for hidden ones and links to somewhere else.

    In the hub's cache every file is a link into the blobs of its own repository: that is no other place.
    """
    inside = folder.resolve()
    if inside.parent.name == "snapshots":
        inside = inside.parent.parent
    files = {
        path.relative_to(folder): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.resolve().is_relative_to(inside)
    }
    return {name.as_posix(): path for name, path in files.items() if not any(p.startswith(".") for p in name.parts)}


def copy_side_files(source: Path, folder: Path) -> dict[str, str]:
    """Copy tokenizer, generation config and whatever else the source has, but no weights and nothing we write anew.

    Returns the names there and here: a card that pessa did not write gets another one, byte for byte as it is.
    """
    copied = {
        name: name
        for name in visible_files(source)
        if name not in (CONFIG_FILE, *UNHASHED) and not name.endswith(WEIGHT_SUFFIXES)
    }
    if CARD_FILE in visible_files(source) and not is_card(read_card(source)):
        copied[CARD_FILE] = ORIGINAL_FILE
    for name, copy in copied.items():
        (folder / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, folder / copy)
    return copied


def _write_card(rewrite: Rewrite, folder: Path) -> None:
    reader, model = rewrite.model.reader, rewrite.model
    card = read_card(reader.folder) if CARD_FILE in visible_files(reader.folder) else ""
    known = front_matter(card)
    names = (source_name(reader.folder), rewrite.source, known.pop("base_model", "") if is_card(card) else "")
    repository = next((name for name in names if re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII)), None)
    counts = totals(reader.header, model.sites, rewrite.sites, rewrite.ranks)
    original = (folder / ORIGINAL_FILE).exists()
    text = model_card(rewrite.summary, reader.config, counts, known, repository, original)
    (folder / CARD_FILE).write_text(text, encoding="utf-8")


def _left(rewrite: Rewrite) -> dict[str, Spectra]:
    """The spectra that hold for the output: none of blocks that are in no such order, or were fitted anew."""
    if rewrite.method == "vanilla":
        return {}
    fitted = rewrite.command == "prune" and rewrite.data is not None
    others = {name: known for name, known in rewrite.model.spectra.items() if name not in rewrite.ranks.vo}
    return others if fitted else dict(rewrite.model.spectra) | _cut(rewrite)


def _cut(rewrite: Rewrite) -> dict[str, Spectra]:
    """The spectra after pruning: zero from each head's rank on."""

    def cut(spectrum: Spectrum, ranks: Ranks) -> Spectrum:
        return np.where(np.arange(spectrum.shape[1]) < np.array(ranks)[:, None], spectrum, 0.0)

    qk, vo = rewrite.merged_ranks, rewrite.ranks.vo
    return {
        name: replace(known, qk=None if known.qk is None else cut(known.qk, qk[name]), vo=cut(known.vo, vo[name]))
        for name, known in rewrite.spectra.items()
        if name in vo
    }
