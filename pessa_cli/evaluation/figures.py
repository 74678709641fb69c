"""Figures of a model on a data set, and how much they would vary with other data: bootstrap intervals.

A figure is computed anew on RESAMPLES data sets, each drawn from the items with replacement, as many as there are. The
interval spans the middle LEVEL of the results (the percentile bootstrap; Efron and Tibshirani, An Introduction to the
Bootstrap, 1993, chapter 13). Figures over the same items are computed on the same resamples, so that what differs
between two models is not hidden by how much the items differ from each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0
Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Figure:
    """A figure over a number of items: clips, windows, pairs or questions.

    of: computes it from some of the items, given their indices; an index may come up more than once.
    """

    items: int
    of: Callable[[Indices], float]

    @cached_property
    def value(self) -> float:
        """The figure of all items, each once."""
        return self.of(np.arange(self.items))

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """The ends of the bootstrap interval; None for a single item, which tells nothing about others.

        Resamples in which the figure is not defined, such as a correlation of equal values, are left out.
        """
        if self.items < 2:
            return None
        generator = np.random.default_rng(SEED)
        drawn = (generator.integers(self.items, size=self.items) for _ in range(RESAMPLES))
        found = np.array([self.of(indices) for indices in drawn])
        found = found[~np.isnan(found)]
        if not len(found):
            return None
        # An order statistic, and no mean of two, because a perplexity may be infinite.
        low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], method="inverted_cdf")
        return float(low), float(high)

    def less(self, other: Figure) -> Figure:
        """The difference to another figure over the same items."""
        return Figure(self.items, lambda indices: self.of(indices) - other.of(indices))

    def to_dict(self) -> dict[str, Any]:
        return {"value": self.value, "interval": self.interval}


def ratio(parts: Sequence[float] | NDArray[Any], wholes: Sequence[float] | NDArray[Any]) -> Figure:
    """The sum of the first over the sum of the second, each with one number per item; NaN where that is 0."""
    above, below = np.asarray(parts), np.asarray(wholes)

    def of(indices: Indices) -> float:
        with np.errstate(invalid="ignore", divide="ignore"):
            return float(above[indices].sum() / below[indices].sum())

    return Figure(len(above), of)
