"""Spectra of attention blocks, and the order in which directions are dropped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pessa_cli.blocks.compact_format import PairRuns

Spectrum = NDArray[np.float64]
LEVELS = (0.125, 0.25, 0.5, 0.75)  # shares of a block's directions that trials cut


@dataclass(frozen=True)
class Trials:
    """What cutting a block does on real inputs, measured.

    qk, vo: the relative squared errors of its output with LEVELS of the directions of one side cut, the smallest first.
    harm: what a relative squared error of 1 would do to the output of the whole model, small errors extrapolated.
    """

    qk: tuple[float, ...]
    vo: tuple[float, ...]
    harm: float


class Size(NamedTuple):
    """Of a whole model."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Spectra:
    """The spectra of one block, (G, d) each and descending; of Q-K what merges, and none where nothing does.

    Singular values of the products, or where `calibrated` what real inputs make of them: in units of the attention
    scores for Q-K, and of what is added to the residual stream for V-O. `pairs`, (G, d/2), only where a rotation keeps
    Q-K from being merged: what each frequency pair adds to the output, squared, in the order of the file; see `rope`.
    """

    qk: Spectrum | None
    vo: Spectrum
    calibrated: bool = False
    trials: Trials | None = None
    pairs: Spectrum | None = None


def largest_pairs(contributions: Spectrum, counts: NDArray[np.int64]) -> tuple[PairRuns, ...]:
    """The `counts`, (G,), pairs of each head that contribute most; contributions: (G, d/2). Of equal ones the first."""
    order = np.argsort(-contributions, axis=-1, kind="stable")
    return tuple(_runs(np.sort(row[:count])) for row, count in zip(order, counts, strict=True))


def pair_shares(contributions: Spectrum) -> Spectrum:
    """What pairs are worth as shares of their heads, (G, d/2).

    They measured better than the contributions: later blocks add more to a larger residual stream.
    """
    whole = contributions.sum(-1, keepdims=True)
    return contributions / np.where(whole > 0, whole, 1.0)


def _runs(places: NDArray[np.int64]) -> PairRuns:
    """Ascending numbers as runs."""
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return tuple(range(int(part[0]), int(part[-1]) + 1) for part in parts if len(part))


def smallest_dropped(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, NDArray[np.int64]]:
    """The smallest `ratio` of all directions dropped wherever they are; of equal ones the later in a head."""
    values = np.concatenate([spectrum.ravel() for spectrum in spectra.values()])
    places = np.concatenate([np.tile(np.arange(s.shape[1]), s.shape[0]) for s in spectra.values()])
    kept = np.ones(values.size, dtype=bool)
    kept[np.lexsort((-places, values))[: int(ratio * values.size)]] = False
    ends = np.cumsum([spectrum.size for spectrum in spectra.values()])[:-1]
    return {
        name: part.reshape(spectrum.shape).sum(-1)
        for (name, spectrum), part in zip(spectra.items(), np.split(kept, ends), strict=True)
    }
