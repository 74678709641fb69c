"""The spectra of blocks, and the choice of the smallest or largest entries across heads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pessa_cli.blocks.compact_format import PairRuns

Spectrum = NDArray[np.float64]
LEVELS = (0.125, 0.25, 0.5, 0.75)  # the shares of a block's directions that trials drop


@dataclass(frozen=True)
class Trials:
    """Errors measured on calibration data with a part of one block dropped.

    errors: by the name of the seam, the relative squared errors of the block's output with each share in LEVELS of its
    directions dropped, the smallest first.
    harm: the change of the model's output per relative squared error of the block's output, extrapolated from small
    errors: the KL divergence in nats for a model with logits, else the relative squared error of the hidden states.
    """

    errors: Mapping[str, tuple[float, ...]]
    harm: float


class Size(NamedTuple):
    """The number of parameters and of bytes of a whole model, and its `model_type`, which says how it reads audio."""

    parameters: int
    nbytes: int
    model_type: str = ""


@dataclass(frozen=True)
class Spectra:
    """The spectra of one block.

    seams: by the name of the seam, (G, c), descending, for the c directions of each group that can be cut; a seam of
    which no single direction can be cut has none. Of attention, they are the singular values of the products.
    calibrated: whether the spectra are weighted by calibration data, in units of attention scores for Q-K and of the
    block's output for the others.
    trials: the measured errors, if there are any.
    pairs: (G, d/2), the squared contribution of each frequency pair in the order of the file (see
    `algebra.rope.contributions`), if Q-K is pruned by pairs; otherwise None.
    order: (F,), the places in the file of the channels of an MLP, the most important first; None if they are in this
    order already, or for an attention block.
    norms: (F,), of an MLP with a calibrated spectrum, the products of the norms of each channel's weights in the order
    of the spectrum, by which changed weights are noticed.
    """

    seams: Mapping[str, Spectrum]
    calibrated: bool = False
    trials: Trials | None = None
    pairs: Spectrum | None = None
    order: NDArray[np.int64] | None = None
    norms: Spectrum | None = None


def largest_pairs(contributions: Spectrum, counts: NDArray[np.int64]) -> tuple[PairRuns, ...]:
    """Return the `counts`, (G,), frequency pairs of each head with the largest contributions, (G, d/2).

    Of equal contributions the first is preferred.
    """
    order = np.argsort(-contributions, axis=-1, kind="stable")
    return tuple(_runs(np.sort(row[:count])) for row, count in zip(order, counts, strict=True))


def pair_shares(contributions: Spectrum) -> Spectrum:
    """Return the contributions of frequency pairs as shares of their head's total, (G, d/2).

    Comparing shares measured better than comparing contributions: later blocks contribute more, but to a larger
    residual stream.
    """
    whole = contributions.sum(-1, keepdims=True)
    return contributions / np.where(whole > 0, whole, 1.0)


def _runs(places: NDArray[np.int64]) -> PairRuns:
    """Convert ascending numbers to ranges of consecutive numbers."""
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return tuple(range(int(part[0]), int(part[-1]) + 1) for part in parts if len(part))


def smallest_dropped(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, NDArray[np.int64]]:
    """Return how many directions each head keeps, (G,) per block, if the smallest share `ratio` of all is dropped.

    Directions are compared across all heads and blocks; of equal ones the later in a head is dropped first.
    """
    values = np.concatenate([spectrum.ravel() for spectrum in spectra.values()])
    places = np.concatenate([np.tile(np.arange(s.shape[1]), s.shape[0]) for s in spectra.values()])
    kept = np.ones(values.size, dtype=bool)
    kept[np.lexsort((-places, values))[: int(ratio * values.size)]] = False
    ends = np.cumsum([spectrum.size for spectrum in spectra.values()])[:-1]
    return {
        name: part.reshape(spectrum.shape).sum(-1)
        for (name, spectrum), part in zip(spectra.items(), np.split(kept, ends), strict=True)
    }
