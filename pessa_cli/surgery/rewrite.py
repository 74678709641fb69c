"""What one rewriting pass writes: which blocks, with which ranks, in which files."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal

import numpy as np

from pessa_cli.blocks.compact_format import Ranks, pairs_text
from pessa_cli.blocks.site import Site, in_full
from pessa_cli.checkpoint.files import SINGLE_FILE
from pessa_cli.checkpoint.reader import Header
from pessa_cli.checkpoint.staging import run_identity
from pessa_cli.common.version import VERSION
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.spectra import Spectra, Spectrum
from pessa_cli.surgery.block_io import StorageLayout
from pessa_cli.surgery.model import Model

Ranking = Literal["svd", "vanilla", "calibrated"]
SHARD_BYTES = 5 * 10**9  # as transformers


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
    method: Ranking = "svd"
    layout: StorageLayout = "compact"
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
            "pessa": VERSION,
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
        before = {site.name: site.always_kept for site in self.sites}
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
