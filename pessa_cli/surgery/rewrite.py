"""The description of an output before it is written: its blocks, ranks, layout, tensors and files."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import groupby
from typing import Any, Literal

import numpy as np

from pessa_cli.blocks.compact_format import Ranks, pairs_text
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.contents import Contents
from pessa_cli.checkpoint.files import SINGLE_FILE
from pessa_cli.checkpoint.reader import Header
from pessa_cli.checkpoint.staging import run_identity
from pessa_cli.common.version import VERSION
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.surgery.block_io import StorageLayout
from pessa_cli.surgery.channel_numbers import CHANNELS, all_channels
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
    None without. augmented: how they were augmented, in words, if they were. sequential: the rule by which the blocks
    before each block were pruned during calibration, if any. contents: the other files of the source, and what becomes
    of them. compared: the plans that were compared, if there were several. work: the operations of the blocks before
    and after, as in `ranks.work.work_of`, for a budget of work.
    """

    command: str
    source: str
    model: Model
    sites: Sequence[Site]
    ranks: RankPlan
    spectra: Mapping[str, Spectra]
    rule: str
    method: Ranking = "svd"
    layout: StorageLayout = "compact"
    shard_bytes: int = SHARD_BYTES
    data: str | None = None
    sequential: str | None = None
    augmented: str | None = None
    contents: Contents = field(default_factory=Contents)
    compared: Mapping[str, Any] | None = None
    work: Mapping[str, float] | None = None

    @cached_property
    def stored(self) -> list[Site]:
        """All sites of the model as the output stores them; a block that is not rewritten keeps its layout."""
        return [self._stored(site) for site in self.model.sites]

    def _stored(self, site: Site) -> Site:
        if site.name not in self.ranks.ranks:
            return site
        if self.layout == "dense":
            return site.in_full()
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
        pairs = {name: {"pairs": pairs_text(kept)} for name, kept in self.ranks.pairs.items()}
        return {
            "pessa": VERSION,
            "versions": {"python": platform.python_version(), "torch": version("torch")},
            "command": self.command,
            "source": self.source,
            "method": self.method,
            **({} if self.data is None else {"calibration_sha256": self.data}),
            **({} if self.augmented is None else {"calibration_augmented": self.augmented}),
            **({} if self.sequential is None else {"calibration_sequential": self.sequential}),
            "rule": self.rule,
            **({} if self.compared is None else {"compared": dict(self.compared)}),
            **({} if self.work is None else {"work": dict(self.work)}),
            **({"notes": self.notes} if self.notes else {}),
            "layout": self.layout,
            "ranks": {
                s.name: {seam: _ranks_text(kept) for seam, kept in self.ranks.ranks[s.name].items()}
                | pairs.get(s.name, {})
                for s in self.sites
            },
            **({CHANNELS: self.channels} if self.channels else {}),
            "dropped": {name: self._dropped(name, known) for name, known in sorted(self.spectra.items())},
        }

    @cached_property
    def channels(self) -> dict[str, str]:
        """The original numbers of the channels that each reordered MLP of the output stores, by site name."""
        texts = {name: _ranks_text(numbers) for name, numbers in self.model.channels.items()}
        for site in self.sites:
            if not isinstance(site, MlpSite):
                continue
            order = self.spectra[site.name].order if site.name in self.spectra else None
            if order is None and site.name not in self.model.channels:
                continue
            before = all_channels(self.model.channels.get(site.name), site.width)
            after = before if order is None else [before[place] for place in order.tolist()]
            texts[site.name] = _ranks_text(tuple(after[: self.ranks.ranks[site.name]["mlp"][0]]))
        return texts

    def _dropped(self, name: str, known: Spectra) -> dict[str, list[float] | None]:
        """Return the norm of what each group drops, by seam; None for a seam without a spectrum."""
        found: dict[str, list[float] | None] = {}
        for seam, kept in self.kept_values.get(name, {}).items():
            rows = zip(known.seams[seam], kept, strict=True) if seam in known.seams else None
            norms = None if rows is None else [float(f"{np.linalg.norm(row[rank:]):.9g}") for row, rank in rows]
            found[seam] = norms
        return found

    @cached_property
    def kept_values(self) -> dict[str, dict[str, Ranks]]:
        """How many values of the spectrum of each group are kept, by site name and seam."""
        return {
            site.name: {
                seam.name: tuple(rank - seam.always_kept for rank in self.ranks.ranks[site.name][seam.name])
                for seam in site.seams
            }
            for site in self.sites
        }

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
