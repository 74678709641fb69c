"""Bootstrap intervals, against quantiles of known distributions, and of differences on the same resamples."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pessa_cli.evaluation.figures import Figure, ratio


def test_the_interval_of_a_proportion_is_that_of_the_binomial_distribution() -> None:
    """The 2.5 % and 97.5 % quantiles of a binomial variable of 100 draws at 0.5 are 40 and 60, by its table."""
    figure = ratio([0, 1] * 50, [1] * 100)
    assert figure.value == 0.5
    assert figure.interval == pytest.approx((0.40, 0.60), abs=0.011)
    assert figure.interval == ratio([0, 1] * 50, [1] * 100).interval  # nothing is left to chance


def test_items_count_by_their_size() -> None:
    """A rate over clips is a ratio of sums: a long clip counts more than a short one."""
    figure = ratio([3, 1], [10, 90])
    assert figure.value == pytest.approx(4 / 100)
    assert figure.interval == pytest.approx((1 / 90, 3 / 10))  # one of two clips twice has a probability of 1/4


def test_a_paired_difference_is_narrower() -> None:
    """Clips differ much from each other, and the second model is a little worse on each of them."""
    generator = np.random.default_rng(1)
    first = generator.gamma(1.0, size=60)
    second = first + generator.normal(0.02, 0.01, size=60)
    mine, other = ratio(second, np.ones(60)), ratio(first, np.ones(60))
    difference = mine.less(other)
    assert difference.value == pytest.approx(float((second - first).mean()))
    apart, together = mine.interval, difference.interval
    assert apart is not None
    assert together is not None
    assert 0 < together[0] < difference.value < together[1]
    # Normal approximation: twice 1.96 standard errors of the mean.
    assert together[1] - together[0] == pytest.approx(2 * 1.96 * (second - first).std() / math.sqrt(60), rel=0.1)
    assert together[1] - together[0] < 0.05 * (apart[1] - apart[0])
    # Negative control: the same numbers in another order belong to other clips, so pairing helps no longer.
    unpaired = mine.less(ratio(first[::-1].copy(), np.ones(60))).interval
    assert unpaired is not None
    assert unpaired[1] - unpaired[0] > apart[1] - apart[0]


def test_figures_that_are_not_always_defined() -> None:
    assert ratio([1], [2]).interval is None  # one item tells nothing about others
    assert ratio([0, 1], [0, 1]).interval == (1.0, 1.0)  # the first item alone has no rate
    assert ratio([0, 0], [0, 0]).interval is None
    assert Figure(2, lambda _: math.inf).interval == (math.inf, math.inf)
