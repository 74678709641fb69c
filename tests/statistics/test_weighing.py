"""How the statistics of a block weigh its decomposition and its refit, from explicit frames, written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention import GROUPED
from numpy.typing import NDArray
from torch import Tensor

from pessa_cli.algebra.rope import PairWeighting
from pessa_cli.algebra.weighted import traces
from pessa_cli.blocks.site import ROPE, AttentionSite
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.statistics.sums import AttentionStatistics, shapes_of
from pessa_cli.statistics.weighing import (
    RIDGE,
    SHRINKAGE,
    UNIFORM,
    Refit,
    independent,
    kept_directions,
    refit_moment,
    weigh,
)

FRAMES = 40
BIASED = replace(GROUPED, biases=frozenset("vo"))
ROTATED = replace(GROUPED, spec=ARCHITECTURES["llama"][0], between=ROPE, unmerged=3)
G, M, D, H = 2, 2, 3, 4


def values_of(site: AttentionSite, seed: int = 2) -> NDArray[np.float64]:
    """Return inputs of W_O, (FRAMES, H d), correlated over the heads and with a mean."""
    generator = np.random.default_rng(seed)
    width = site.heads * site.head_dim
    return generator.normal(size=(FRAMES, width)) @ generator.normal(size=(width, width)) + generator.normal(size=width)


def positive(generator: np.random.Generator, *shape: int) -> Tensor:
    root = generator.normal(size=shape)
    return torch.from_numpy(root @ np.swapaxes(root, -1, -2))


def statistics_of(site: AttentionSite, values: NDArray[np.float64] | None = None, **more: Any) -> AttentionStatistics:
    generator = np.random.default_rng(4)
    values = values_of(site) if values is None else values
    empty = torch.zeros(0, D, D, dtype=torch.float64)
    found = {
        "frames": torch.tensor(float(len(values)), dtype=torch.float64),
        "queries": positive(generator, G, D, D),
        "keys": positive(generator, G, D, D),
        "influence": empty if site.by_pairs else 7 * positive(generator, G, D, D),
        "mixtures": torch.from_numpy(values.T @ values),
        "mixture": torch.from_numpy(values.sum(0)),
        "pairs": positive(generator, G, D, D) if site.by_pairs else empty,
        "output": torch.tensor(50.0, dtype=torch.float64),
        "tried": torch.tensor([[1.0, 2, 3, 4], [5.0, 6, 7, 8]], dtype=torch.float64),
        "harm": torch.tensor([6.0, 30.0, 2.0], dtype=torch.float64),
    }
    return AttentionStatistics(**(found | more))


def test_each_weighting_is_a_mean_over_the_frames() -> None:
    found, values = statistics_of(GROUPED), values_of(GROUPED)
    weighed = weigh(found, GROUPED, None)
    assert torch.allclose(weighed.qk.left, found.queries / FRAMES)
    assert weighed.vo.right is None
    assert weighed.qk.shrinkage == weighed.vo.shrinkage == pytest.approx(SHRINKAGE + D / FRAMES)
    by_head = values.reshape(FRAMES, G, M, D)
    for g in range(G):
        own = sum(by_head[:, g, m].T @ by_head[:, g, m] for m in range(M)) / M / FRAMES
        assert np.allclose(weighed.vo.left[g], own)
    assert weighed.refit.center is None
    assert np.allclose(weighed.refit.moment, values.T @ values / FRAMES)
    assert weighed.refit.ridge == pytest.approx(RIDGE + H * D / FRAMES)
    assert weighed.refit.pairs is None


def test_keys_are_weighed_by_their_influence_and_partly_all_alike() -> None:
    """Each side with unit trace; the trace of a head is the geometric mean of both, scaled to the same sum."""
    found = statistics_of(GROUPED)
    right = weigh(found, GROUPED, None).qk.right
    assert right is not None
    keys, influence = found.keys.numpy(), found.influence.numpy()
    seen, counts = np.trace(keys, axis1=1, axis2=2), np.trace(influence, axis1=1, axis2=2)
    for g in range(G):
        size = np.sqrt(seen[g] * counts[g] * seen.sum() / counts.sum())
        mixed = UNIFORM * keys[g] / seen[g] + (1 - UNIFORM) * influence[g] / counts[g]
        assert np.allclose(right[g], size * mixed / (FRAMES * D))
    # Influence matters, and most of all: keys that have none weigh nearly nothing.
    others = replace(found, influence=found.influence * torch.tensor([1.0, 1e-12]).reshape(2, 1, 1))
    less = weigh(others, GROUPED, None).qk.right
    assert less is not None
    assert torch.trace(less[1]) < 1e-4 * torch.trace(right[1])
    none = weigh(replace(found, influence=0 * found.influence), GROUPED, None).qk.right
    assert none is not None
    assert torch.allclose(none, found.keys / (FRAMES * D))
    turned = weigh(replace(found, influence=found.influence.flip(-1, -2)), GROUPED, None).qk.right  # of the same traces
    assert turned is not None
    assert torch.allclose(traces(turned), traces(right))
    assert (turned - right).norm() > 0.3 * right.norm()
    half = replace(found, influence=found.influence * torch.tensor([1.0, 0.0]).reshape(2, 1, 1))
    one = weigh(half, GROUPED, None).qk.right
    assert one is not None
    assert not one[1].any()
    assert one.isfinite().all()
    assert torch.trace(one[0]) > 0
    tiny = weigh(replace(found, influence=1e-6 * found.influence), GROUPED, None).qk.right
    assert tiny is not None
    assert torch.allclose(tiny, right)  # the unit of the influence does not matter


def test_under_rope_the_pairs_are_weighed() -> None:
    found = statistics_of(ROTATED)
    weighed = weigh(found, ROTATED, None)
    assert weighed.qk.right is not None
    assert torch.allclose(weighed.qk.right, found.keys / (FRAMES * D))
    assert isinstance(weighed.refit.pairs, PairWeighting)
    assert torch.allclose(weighed.refit.pairs.gram, found.pairs / (FRAMES * D))
    assert weighed.refit.pairs.shrinkage == pytest.approx(RIDGE + D / FRAMES)


def test_only_directions_that_are_merged_are_weighed() -> None:
    partial = replace(GROUPED, unmerged=1)
    found = statistics_of(partial)
    weighed, whole = weigh(found, partial, None), weigh(found, GROUPED, None)
    assert torch.equal(weighed.qk.left, whole.qk.left[:, 1:, 1:])
    assert weighed.qk.right is not None
    assert weighed.qk.right.shape == (G, D - 1, D - 1)


@pytest.mark.parametrize("with_bias", [True, False])
def test_the_mean_of_a_group_is_subtracted_where_biases_can_hold_it(with_bias: bool) -> None:
    """The query heads of a group share the value bias, so the mean over the frames and over the group is subtracted."""
    site = BIASED if with_bias else replace(BIASED, biases=frozenset("v"))
    found, values = statistics_of(site), values_of(site)
    v_bias = torch.from_numpy(np.random.default_rng(8).normal(size=(G, D)))
    weighed = weigh(found, site, v_bias)
    if not with_bias:
        assert weighed.refit.center is None
        assert np.allclose(weighed.refit.moment, values.T @ values / FRAMES)
        return
    mean = values.mean(0).reshape(G, M, D).mean(1)
    centered = values - np.repeat(mean[:, None], M, 1).reshape(-1)
    assert weighed.refit.center is not None
    assert np.allclose(weighed.refit.center, mean - v_bias.numpy())
    assert np.allclose(weighed.refit.moment, centered.T @ centered / FRAMES)
    by_head = centered.reshape(FRAMES, G, M, D)
    for g in range(G):
        assert np.allclose(
            weighed.vo.left[g], sum(by_head[:, g, m].T @ by_head[:, g, m] for m in range(M)) / M / FRAMES
        )
    half = weigh(found, site, v_bias.half()).refit.center
    assert half is not None
    assert half.dtype == torch.float64
    absent = weigh(found, site, None).refit.center
    assert absent is not None
    assert np.allclose(absent, mean)


def test_constant_inputs_leave_no_noise() -> None:
    """If all inputs are the same, their second moment after the mean is rounding noise, and becomes zero."""
    shared = np.tile(np.random.default_rng(1).normal(size=(1, G, 1, D)), (FRAMES, 1, M, 1)).reshape(FRAMES, -1) * 1e3
    weighed = weigh(statistics_of(BIASED, shared), BIASED, None)
    assert not weighed.refit.moment.any()
    assert not weighed.vo.left.any()
    little = shared + 0.1 * np.random.default_rng(2).normal(size=shared.shape)  # a variance of 1e-8 of the moment
    kept = weigh(statistics_of(BIASED, little), BIASED, None).refit.moment
    assert torch.trace(kept) == pytest.approx(0.01 * H * D, rel=0.2)
    alone = weigh(statistics_of(GROUPED, shared), GROUPED, None)  # without biases the mean is not subtracted
    assert torch.trace(alone.refit.moment) > 1e4


def test_without_frames_nothing_is_divided_by_zero() -> None:
    empty = AttentionStatistics.of({n: torch.zeros(s, dtype=torch.float64) for n, s in shapes_of(GROUPED).items()})
    weighed = weigh(empty, GROUPED, None)
    assert weighed.qk.shrinkage == SHRINKAGE + D
    assert weighed.vo.left.isfinite().all()
    assert not weighed.refit.moment.any()


def test_the_number_of_independent_terms() -> None:
    values = np.random.default_rng(1).normal(size=(4, 6)) * np.array([1.0, 1e3, 1e-3, 1.0, 1.0, 0.0])
    assert independent(torch.from_numpy(values.T @ values)) == 4
    assert independent(torch.from_numpy(values[:1].T @ values[:1])) == 1
    assert independent(1e9 * torch.from_numpy(values.T @ values)) == 4
    small = torch.eye(2, dtype=torch.float64) + (1 - 1e-9) * (1 - torch.eye(2, dtype=torch.float64))
    assert independent(small) == 2  # the share of the smaller eigenvalue is 5e-10
    assert independent(torch.eye(6, dtype=torch.float64)) == 6
    assert independent(torch.zeros(3, 3, dtype=torch.float64)) == 0


def test_the_moment_of_the_new_directions() -> None:
    """Equal to the second moment of the frames, each head turned by the transform of its group."""
    values = values_of(GROUPED)
    transform = torch.from_numpy(np.random.default_rng(6).normal(size=(G, D, D)))
    refit = Refit(None, torch.from_numpy(values.T @ values), 0.1, None)
    turned = np.einsum("fgmd,gde->fgme", values.reshape(FRAMES, G, M, D), transform.numpy()).reshape(FRAMES, -1)
    assert np.allclose(refit_moment(refit, transform, GROUPED), turned.T @ turned)
    assert kept_directions(GROUPED, (2, 1)).tolist() == [0, 1, 3, 4, 6, 9]


def test_statistics_add_up_and_trials_are_shares_of_the_output() -> None:
    first, second = statistics_of(GROUPED), statistics_of(GROUPED, values_of(GROUPED, 9))
    both = first + second
    for name in AttentionStatistics.names():
        assert torch.equal(getattr(both, name), getattr(first, name) + getattr(second, name))
    moved = first.to("meta")
    assert {getattr(moved, name).device.type for name in AttentionStatistics.names()} == {"meta"}
    trials = first.trials
    assert trials is not None
    assert trials.errors["qk"] == pytest.approx((0.02, 0.04, 0.06, 0.08))
    assert trials.errors["vo"] == pytest.approx((0.1, 0.12, 0.14, 0.16))
    # 6 nats over 30 tokens for a difference whose square is 2 of 50: 0.2 for a relative squared error of 0.04.
    assert trials.harm == pytest.approx(0.2 / 0.04)
    for harm in ([6.0, 0.0, 2.0], [6.0, 30.0, 0.0]):
        unknown = replace(first, harm=torch.tensor(harm, dtype=torch.float64)).trials
        assert unknown is not None
        assert unknown.harm == 0.0
    assert replace(first, output=torch.tensor(0.0)).trials is None
    assert replace(first, output=torch.tensor(0.5)).trials is not None


@pytest.mark.parametrize("site", [GROUPED, ROTATED])
def test_shapes_are_those_of_the_statistics(site: AttentionSite) -> None:
    found = statistics_of(site)
    assert {name: tuple(getattr(found, name).shape) for name in found.names()} == shapes_of(site)
