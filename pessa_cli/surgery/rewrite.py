"""The description of an output before it is written: its blocks, ranks, layout, tensors and files."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal

import numpy as np

from pessa_cli.blocks.compact_format import Ranks, pairs_text
from pessa_cli.blocks.site import Site, in_full
from pessa_cli.checkpoint.contents import Contents
from pessa_cli.checkpoint.files import SINGLE_FILE
from pessa_cli.checkpoint.reader import Header
from pessa_cli.checkpoint.staging import run_identity
from pessa_cli.common.version import VERSION
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.spectra import Spectra, Spectrum
from pessa_cli.surgery.block_io import StorageLayout
from pessa_cli.surgery.generation import generation_notes
from pessa_cli.surgery.model import Model

Ranking = Literal["svd", "vanilla", "calibrated"]
SHARD_BYTES = 5 * 10**9  # the default of save_pretrained in transformers 4


@dataclass(frozen=True)
class Rewrite:
    """The description of an output: which blocks are rewritten, with which ranks, and how; all else is copied.

    command: the command that writes it. source: the name that the user gave the model. sites: the blocks that are
    rewritten, as the source stores them. spectra: of the blocks before the cut, by site name. rule: how the ranks were
    chosen, in words. shard_bytes: the largest size of one file of weights. data: the SHA-256 of the calibration data,
    None without. sequential: the rule by which the blocks before each block were pruned during calibration, if any.
    contents: the other files of the source, and what becomes of them.
    """

    command: str
    source: str
    model: Model
    sites: list[Site]
    ranks: RankPlan
    spectra: Mapping[str, Spectra]
    rule: str
    method: Ranking = "svd"
    layout: StorageLayout = "compact"
    shard_bytes: int = SHARD_BYTES
    data: str | None = None
    sequential: str | None = None
    contents: Contents = field(default_factory=Contents)

    @cached_property
    def stored(self) -> list[Site]:
        """All sites of the model as the output stores them; a block that is not rewritten keeps its layout."""
        return [self._stored(site) for site in self.model.sites]

    def _stored(self, site: Site) -> Site:
        if site.name not in self.ranks.vo:
            return site
        if self.layout == "dense":
            return in_full(site)
        return self.ranks.kept(site)

    @cached_property
    def owner(self) -> dict[str, Site]:
        """The rewritten block of each of its tensors, by tensor name."""
        return {name: site for site in self.sites for name in site.tensors}

    def sites_of(self, plan: Header) -> list[Site]:
        """Return the rewritten blocks in a part of the header, in order."""
        return list({self.owner[name].name: self.owner[name] for name in plan if name in self.owner}.values())

    @cached_property
    def header(self) -> Header:
        """The names, dtypes and shapes of all tensors of the output, in its order."""
        source = self.model.reader.header
        shapes = {name: shape for site in self.stored for name, shape in site.tensors.items()}
        order: dict[str, None] = {}
        for name in source:
            order |= dict.fromkeys(self.owner[name].tensors if name in self.owner else [name])
        return {name: replace(source[name], shape=shapes.get(name, source[name].shape)) for name in order}

    @cached_property
    def shards(self) -> dict[str, dict[str, Any]]:
        """The weight files of the output by name, each with its part of the header."""
        return cut_into_files(self.header, {name: site.name for name, site in self.owner.items()}, self.shard_bytes)

    @cached_property
    def notes(self) -> list[str]:
        """A sentence for each file whose content the output changes, because it does not fit the model."""
        return generation_notes(self.model.reader.folder, self.model.reader.config)

    @property
    def summary(self) -> dict[str, Any]:
        """The content of pessa.json without the hashes: versions, options, ranks and dropped norms of each block."""
        sides = {"qk": self.ranks.qk, "vo": self.ranks.vo}
        of_spectra = {"qk": self.merged_ranks, "vo": self.ranks.vo}
        pairs = {name: {"pairs": pairs_text(kept)} for name, kept in self.ranks.pairs.items()}
        return {
            "pessa": VERSION,
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "command": self.command,
            "source": self.source,
            "method": self.method,
            **({} if self.data is None else {"calibration_sha256": self.data}),
            **({} if self.sequential is None else {"calibration_sequential": self.sequential}),
            "rule": self.rule,
            **({"notes": self.notes} if self.notes else {}),
            "layout": self.layout,
            "ranks": {
                s.name: {side: _ranks_text(plan[s.name]) for side, plan in sides.items()} | pairs.get(s.name, {})
                for s in self.sites
            },
            "dropped": {name: _dropped(known, of_spectra, name) for name, known in sorted(self.spectra.items())},
        }

    @property
    def merged_ranks(self) -> dict[str, Ranks]:
        """How many values of the Q-K spectrum of each head are kept, by site name."""
        before = {site.name: site.always_kept for site in self.sites}
        return {name: tuple(rank - before[name] for rank in ranks) for name, ranks in self.ranks.qk.items()}

    @property
    def run(self) -> str:
        """The identity of the output, by which a resumed run recognizes the shards of the run before it."""
        shapes = {file: {name: info.shape for name, info in part.items()} for file, part in self.shards.items()}
        return run_identity(self.model.reader, self.summary, shapes)


def cut_into_files(header: Header, owner: Mapping[str, str], most_bytes: int) -> dict[str, dict[str, Any]]:
    """Split a header into files of at most `most_bytes` each, by file name.

    owner: the block of each tensor that belongs to one. Consecutive tensors of one block stay in the same file, which
    may therefore be larger. Files are named as transformers names them.
    """
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


def _ranks_text(ranks: Ranks) -> str:
    return " ".join(map(str, ranks))


def _dropped(known: Spectra, sides: Mapping[str, Mapping[str, Ranks]], name: str) -> dict[str, list[float] | None]:
    """Return the norm of the dropped directions of each head, by side; None for a side without a spectrum."""

    def norms(spectrum: Spectrum | None, ranks: Ranks) -> list[float] | None:
        if spectrum is None:
            return None
        return [float(f"{np.linalg.norm(row[rank:]):.9g}") for row, rank in zip(spectrum, ranks, strict=True)]

    return {side: norms(getattr(known, side), plan[name]) for side, plan in sides.items() if name in plan}
