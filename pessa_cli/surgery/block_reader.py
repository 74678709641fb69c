"""The attention blocks of a checkpoint as one run reads them: each as rarely as memory allows, and hashed once."""

from __future__ import annotations

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.statistics.file import fingerprint
from pessa_cli.surgery.block_io import read_site


class BlockReader:
    """Reads blocks, and remembers the fingerprints of their weights.

    keep: hold the weights in memory, so that no block is read twice. That is for runs that have the whole model in
    memory anyway, as calibration has.
    """

    def __init__(self, reader: CheckpointReader, keep: bool = False) -> None:
        self.reader = reader
        self.keeps = keep
        self._weights: dict[str, HeadWeights] = {}
        self._fingerprints: dict[str, str] = {}

    def weights(self, site: Site) -> HeadWeights:
        """The block's weights in the dtype of the file. Raises NotFiniteError when an entry is not finite."""
        if site.name in self._weights:
            return self._weights[site.name]
        weights = read_site(self.reader, site)
        if self.keeps:
            self._weights[site.name] = weights
        return weights

    def fingerprint(self, site: Site, weights: HeadWeights) -> str:
        """The fingerprint of the block's weights, which are hashed when it is asked for the first time."""
        if site.name not in self._fingerprints:
            self._fingerprints[site.name] = fingerprint(weights)
        return self._fingerprints[site.name]
