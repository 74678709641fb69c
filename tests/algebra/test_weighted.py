"""Decompositions weighted by second moments, and the refit of W_O, compared with dense algebra on explicit inputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from products import product, random_pair, truncated
from torch import Tensor

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.decompose import decompose, transformed
from pessa_cli.algebra.weighted import Weighting, refitted, scales, shrunk, traces, weighted_transforms
from pessa_cli.common.errors import PessaError


def normal(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return correlated inputs of both factors of unequal sizes, (G, 200, L) and (G, 200, R)."""
    heads, left, _ = pair.left.shape
    right = pair.right.shape[1]
    x = normal(heads, 200, left) @ normal(heads, left, left, seed=6) * torch.logspace(0, -2, left)
    return x, normal(heads, 200, right, seed=7) @ normal(heads, right, right, seed=8)


def moments(pair: Pair, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    a, b = x @ pair.left, y @ pair.right
    return a.mT @ a, b.mT @ b


@pytest.mark.parametrize("sides", ["both", "left"])
def test_a_weighted_decomposition_is_optimal_for_its_inputs(sides: str) -> None:
    """The spectrum is that of X A B^T Y^T, and the leading directions are its best approximation of their rank."""
    pair = random_pair(heads=2, left=20, right=15, width=5)
    x, y = inputs(pair)
    left, right = moments(pair, x, y)
    if sides == "left":
        y, right_or_none = torch.eye(15, dtype=torch.float64).expand(2, 15, 15), None
    else:
        right_or_none = right
    factors = transformed(pair, weighted_transforms(pair, Weighting(left, right_or_none, 0.0)))
    assert torch.allclose(product(factors), product(pair), rtol=1e-8, atol=1e-8)
    scores = x @ product(pair) @ y.mT
    dense = torch.linalg.svdvals(scores)[:, :5]
    assert torch.allclose(factors.spectrum, dense, rtol=1e-8)
    for rank in range(5):
        error = torch.linalg.matrix_norm(scores - x @ product(truncated(factors, rank)) @ y.mT)
        assert torch.allclose(error, dense[:, rank:].norm(dim=-1), rtol=1e-6)
        plain = torch.linalg.matrix_norm(scores - x @ product(truncated(decompose(pair), rank)) @ y.mT)
        assert rank == 0 or (error < 0.98 * plain).all()  # the negative control
    assert torch.allclose(factors.left.norm(dim=-2), factors.right.norm(dim=-2))  # balanced


def test_shrinkage_adds_inputs_of_unit_variance() -> None:
    """With shrinkage s the weighting is that of the data and of unit inputs, scaled to s times the same trace."""
    pair = random_pair(heads=2, left=20, right=15, width=5)
    x, y = inputs(pair)
    left, right = moments(pair, x, y)
    more = []
    for data, factor, gram in ((x, pair.left, left), (y, pair.right, right)):
        size = factor.shape[1]
        ratio = gram.diagonal(dim1=-2, dim2=-1).sum(-1) / factor.square().sum((-1, -2))
        unit = torch.eye(size, dtype=torch.float64) * (0.7 * ratio).sqrt().reshape(-1, 1, 1)
        more.append(torch.cat([data, unit], 1))
    found = weighted_transforms(pair, Weighting(left, right, 0.7))
    assert torch.allclose(found.spectrum, torch.linalg.svdvals(more[0] @ product(pair) @ more[1].mT)[:, :5], rtol=1e-8)
    plain = weighted_transforms(pair, Weighting(torch.zeros_like(left), torch.zeros_like(right), 0.7))
    assert torch.allclose(plain.spectrum, torch.linalg.svdvals(product(pair))[:, :5], rtol=1e-8)


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_growth_bounds_the_terms_of_each_column(scale: float) -> None:
    """The norm of the terms `|a_i| t_ij`, by that of the column j, for the worst column of both factors."""
    pair = random_pair(heads=2, left=20, right=15, width=5)
    pair.left[1] = pair.left[1, :, :1] + 1e-2 * pair.left[1]  # nearly parallel columns cancel
    pair = Pair(scale * pair.left, scale * pair.right)
    x, y = inputs(pair)
    found = weighted_transforms(pair, Weighting(*moments(pair, x, y), 0.1))
    factors = transformed(pair, found)
    worst = torch.ones(2, dtype=torch.float64)
    for factor, transform, made in (
        (pair.left, found.left, factors.left),
        (pair.right, found.right, factors.right),
    ):
        terms = (factor.norm(dim=-2).unsqueeze(-1) * transform).norm(dim=-2)
        worst = torch.maximum(worst, (terms / made.norm(dim=-2)).amax(-1))
    assert torch.allclose(found.growth, worst, rtol=1e-6)
    assert found.growth[1] > 10 * found.growth[0] > 10


def test_heads_without_inputs_or_weights() -> None:
    pair = random_pair(heads=3, left=20, right=15, width=5)
    pair.left[1] = 0
    pair.right[2, :, 3] = 0
    x, y = inputs(pair)
    found = weighted_transforms(pair, Weighting(*moments(pair, x, y), 0.1))
    factors = transformed(pair, found)
    assert torch.allclose(product(factors), product(pair), rtol=1e-8, atol=1e-8)
    assert found.spectrum[1].tolist() == [0] * 5
    assert found.growth[1] == 1
    assert found.spectrum[2, 4] < 1e-6 * found.spectrum[2, 3]
    assert all(t.isfinite().all() for t in (found.left, found.right, found.growth))


def test_dependent_columns() -> None:
    pair = random_pair(heads=2, left=20, right=15, width=5)
    pair.left[1, :, 4] = pair.left[1, :, 0] - 2 * pair.left[1, :, 1]
    x, y = inputs(pair)
    for weighting in (Weighting(*moments(pair, x, y), 0.0), Weighting(moments(pair, x, y)[0], None, 0.3)):
        found = weighted_transforms(pair, weighting)
        assert torch.allclose(product(transformed(pair, found)), product(pair), rtol=1e-6, atol=1e-6)
        assert found.spectrum[1, 4] < 1e-6 * found.spectrum[1, 3]
    single = random_pair(heads=2, left=20, right=15, width=1)
    one = weighted_transforms(single, Weighting(*moments(single, *inputs(single)), 0.0))
    assert torch.allclose(one.growth, torch.ones(2, dtype=torch.float64))


def test_products_that_would_overflow_are_refused() -> None:
    pair = random_pair(heads=1, left=6, right=6, width=2)
    huge = torch.full((1, 2, 2), 1e151, dtype=torch.float64)
    with pytest.raises(PessaError, match="too large"):
        weighted_transforms(pair, Weighting(huge, None, 0.0))
    exactly = torch.eye(2, dtype=torch.float64).unsqueeze(0) * 1e150
    with pytest.raises(PessaError, match="too large"):
        weighted_transforms(pair, Weighting(exactly, None, 0.0))


def test_the_weighting_of_some_heads() -> None:
    left, right = normal(4, 3, 3), normal(4, 3, 3, seed=9)
    part = Weighting(left, right, 0.3).of_heads(slice(1, 3))
    assert torch.equal(part.left, left[1:3])
    assert part.right is not None
    assert torch.equal(part.right, right[1:3])
    assert part.shrinkage == 0.3
    assert Weighting(left, None, 0.3).of_heads(slice(1, 3)).right is None


def test_traces_and_scales_by_hand() -> None:
    grams = torch.tensor([[[4.0, 1.0], [1.0, 0.25]], [[0.0, 0.0], [0.0, -1e-20]]], dtype=torch.float64)
    assert traces(grams).flatten().tolist() == [4.25, -1e-20]
    assert traces(grams).shape == (2, 1, 1)
    scale, inverse = scales(grams)
    assert scale.tolist() == [[2.0, 0.5], [0.0, 0.0]]
    assert inverse.tolist() == [[0.5, 2.0], [0.0, 0.0]]
    assert scales(grams[0])[1].tolist() == [0.5, 2.0]


def test_shrunk_by_hand() -> None:
    gram = torch.tensor([[[0.3, 0.1], [0.1, 0.1]], [[0.0, 0.0], [0.0, 0.0]], [[0.6, 0.0], [0.0, 0.2]]])
    plain = torch.tensor([[[0.2, 0.0], [0.0, 0.6]], [[2.0, 0.0], [0.0, 6.0]], [[0.0, 0.0], [0.0, 0.0]]])
    gram, plain = gram.double(), plain.double()
    found = shrunk(gram, plain, 0.5)
    assert torch.allclose(found[0], torch.tensor([[0.35, 0.1], [0.1, 0.25]], dtype=torch.float64))
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[2], gram[2])


def least_squares(o: NDArray[np.float64], values: NDArray[np.float64], kept: list[int], ridge: float) -> Tensor:
    """Return the output projection whose kept columns fit `values @ o.T`, with extra rows for the ridge."""
    inner = values[:, kept]
    target = values @ o.T - inner @ o[:, kept].T
    rows = np.sqrt(ridge) * np.diag(np.sqrt((inner**2).sum(0)))
    change = np.linalg.lstsq(np.vstack([inner, rows]), np.vstack([target, np.zeros((len(kept), len(o)))]), rcond=None)
    fitted = o.copy()
    fitted[:, kept] += change[0].T
    return torch.from_numpy(fitted)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
def test_the_refit_is_least_squares(ridge: float) -> None:
    kept = [0, 1, 4]
    o, values = normal(7, 6), normal(50, 6, seed=9) @ normal(6, 6, seed=10) * torch.logspace(1, -1, 6)
    moment = values.mT @ values
    found = refitted(o, moment, torch.tensor(kept), ridge)
    assert torch.allclose(found, least_squares(o.numpy(), values.numpy(), kept, ridge), rtol=1e-10)
    before, after = ((values @ o.mT - values[:, kept] @ each[:, kept].mT).norm() for each in (o, found))
    assert after < 0.95 * before  # the refit matters
    assert torch.equal(found[:, [2, 3, 5]], o[:, [2, 3, 5]])
    assert torch.allclose(refitted(o, moment, torch.tensor(kept), 1e30), o)
    assert torch.equal(refitted(o, moment, torch.arange(6), ridge), o)


def test_the_refit_ignores_directions_that_are_always_zero() -> None:
    o, values = normal(7, 4), normal(50, 4, seed=9) @ normal(4, 4, seed=10)
    values[:, 1] = 0
    found = refitted(o, values.mT @ values, torch.tensor([0, 1]), 0.1)
    expected = least_squares(o[:, [0, 2, 3]].numpy(), values[:, [0, 2, 3]].numpy(), [0], 0.1)
    assert torch.allclose(found[:, 0], expected[:, 0], rtol=1e-6)
    assert torch.equal(found[:, 1], o[:, 1])
