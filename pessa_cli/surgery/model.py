"""A checkpoint with its attention blocks: what every command opens first. Headers only, no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pessa_cli.blocks.discover import find_sites, specs_of
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.spectra import Size, Spectra
from pessa_cli.surgery.spectra_file import load_spectra

MANIFEST_FILE = "pessa.json"


@dataclass(frozen=True)
class Model:
    """A checkpoint with its attention blocks, and the spectra that an earlier `decompose` or `prune` left there."""

    reader: CheckpointReader
    sites: list[Site]
    spectra: Mapping[str, Spectra]  # by site name; only for blocks that are stored as balanced factors

    @property
    def parameters(self) -> int:
        return sum(info.count for info in self.reader.header.values())

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.reader.header.values())

    @property
    def size(self) -> Size:
        return Size(self.parameters, self.nbytes)


def open_model(folder: Path, architecture: str | None = None) -> Model:
    """Headers, sites and known spectra of a Hugging Face folder; no weights are read."""
    reader = CheckpointReader(folder)
    try:
        sites = find_sites(specs_of(reader.config, reader.header, architecture), reader.config, reader.header)
    except PessaError as error:  # which knows names and shapes, but not whose they are
        raise type(error)(f"{folder}: {error.message}", error.hint) from None
    return Model(reader, sites, load_spectra(folder, sites))
