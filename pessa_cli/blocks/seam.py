"""Seams: the hidden widths of a block, which some of its matrices write and others read.

Only what the writers and readers compute together matters. What may be done to the width without changing that is the
seam's symmetry, and it decides what is cut: directions after a change of basis, frequency pairs, or whole channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pessa_cli.blocks.compact_format import PairRuns, Ranks

Symmetry = Literal["linear", "pairs", "permutation", "fixed"]
TITLES = {"qk": "Q-K", "vo": "V-O", "mlp": "MLP"}  # as tables and messages name the seams


@dataclass(frozen=True)
class Seam:
    """One hidden width of one block.

    name: "qk", "vo" or "mlp". width: the original number of directions or channels of each group. ranks: how many of
    them the file stores for each group; the groups of attention are its key/value heads, and an MLP is one group.
    symmetry: "linear" if any invertible matrix may be inserted, so that an SVD sorts the directions; "pairs" if RoPE
    rotates directions i and i + width/2 together, so that whole frequency pairs are cut; "permutation" if a function of
    each channel alone stands between, so that whole channels are cut; "fixed" if nothing can be cut.
    always_kept: how many leading directions of each group cannot be cut. pairs: the stored frequency pairs of each
    group, if they are not all.
    """

    name: str
    width: int
    ranks: Ranks
    symmetry: Symmetry
    always_kept: int = 0
    pairs: tuple[PairRuns, ...] | None = None

    @property
    def title(self) -> str:
        """The name of the seam in tables and messages."""
        return TITLES[self.name]

    @property
    def full(self) -> Ranks:
        """The ranks of an unpruned block."""
        return (self.width,) * len(self.ranks)
