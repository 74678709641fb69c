"""Reading the blocks of a checkpoint during one run, each as rarely as memory allows."""

from __future__ import annotations

from typing import overload

from pessa_cli.algebra.channels import Weights
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.surgery.block_io import read_site


class BlockReader:
    """Reads the weights of blocks.

    keep: keep the weights in memory, so that no block is read twice. This is for runs such as calibration, which hold
    the whole model in memory.
    """

    def __init__(self, reader: CheckpointReader, keep: bool = False) -> None:
        self.reader = reader
        self.keeps = keep
        self._weights: dict[str, Weights] = {}

    @overload
    def weights(self, site: AttentionSite) -> HeadWeights: ...

    @overload
    def weights(self, site: Site) -> Weights: ...

    def weights(self, site: Site) -> Weights:
        """Return the block's weights in the dtypes of the file. Raises NotFiniteError when an entry is not finite."""
        if site.name in self._weights:
            return self._weights[site.name]
        weights = read_site(self.reader, site)
        if self.keeps:
            self._weights[site.name] = weights
        return weights
