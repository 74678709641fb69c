"""Opening a model: its checkpoint headers, blocks and stored spectra, without reading weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pessa_cli.blocks.compact_format import ragged_modules
from pessa_cli.blocks.discover import find_sites, specs_of
from pessa_cli.blocks.mlp_discover import find_mlps, mlp_specs_of
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.spectra import Size, Spectra
from pessa_cli.surgery.channel_numbers import load_channels
from pessa_cli.surgery.spectra_file import load_spectra


@dataclass(frozen=True)
class Model:
    """A checkpoint, its blocks, and the spectra that an earlier `decompose` or `prune` stored with it.

    spectra: by site name, only for blocks that are stored as balanced factors or ordered
    channels. channels: by site name, the original numbers of the channels of MLPs that pessa has reordered.
    """

    reader: CheckpointReader
    sites: Sequence[Site]
    spectra: Mapping[str, Spectra]
    channels: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    model_type: str = ""

    @property
    def attention(self) -> list[AttentionSite]:
        """The attention blocks among the sites."""
        return [site for site in self.sites if isinstance(site, AttentionSite)]

    @property
    def parameters(self) -> int:
        """The number of parameters of the whole model."""
        return sum(info.count for info in self.reader.header.values())

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(info.nbytes for info in self.reader.header.values())

    @property
    def size(self) -> Size:
        """Parameters and bytes of the whole model, and its type, for budgets."""
        return Size(self.parameters, self.nbytes, self.model_type)


def open_model(folder: Path, architecture: str | None = None) -> Model:
    """Read the headers, find the blocks and load the stored spectra of a Hugging Face folder.

    No weights are read. architecture: treat the model as this `model_type`. Raises PessaError when the folder is not a
    readable checkpoint or its blocks are not supported.
    """
    reader = CheckpointReader(folder)
    try:
        config, header = reader.config, reader.header
        specs = specs_of(config, header, architecture)
        sites: list[Site] = [*find_sites(specs, config, header)]
        sites += find_mlps(mlp_specs_of(config, architecture), config, header, ragged_modules(config), specs)
    except PessaError as error:  # its message names tensors and shapes, but not the folder
        raise type(error)(f"{folder}: {error.message}", error.hint) from error
    model_type = architecture or str(config.get("model_type", ""))
    return Model(reader, sites, load_spectra(folder, sites), load_channels(folder, sites), model_type)
