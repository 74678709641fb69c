"""The decomposition of random heads: exact at full rank, optimal when truncated, and safe for degenerate heads."""

from __future__ import annotations

import math

import pytest
import torch
from products import KINDS, degenerate, product, random_pair, truncated

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.compare import relative_difference
from pessa_cli.algebra.decompose import (
    MOST_PRODUCT,
    WELL_CONDITIONED,
    check_product_size,
    decompose,
    norm_products,
    norm_transforms,
    singular_values,
    svd_transforms,
    transformed,
    triangular,
)
from pessa_cli.common.errors import PessaError


@pytest.mark.parametrize("kind", ["well-conditioned", *KINDS])
def test_full_rank_gives_the_product_and_the_spectrum_of_the_dense_svd(kind: str) -> None:
    pair = degenerate(kind)
    factors = decompose(pair)
    dense = torch.linalg.svdvals(product(pair))[:, :8]
    dense = torch.nn.functional.pad(dense, (0, 8 - dense.shape[1]))
    scale = dense.max().clamp(min=1e-300)
    assert (product(factors) - product(pair)).norm() <= 1e-12 * product(pair).norm()
    assert (factors.spectrum - dense).abs().max() <= 1e-12 * scale
    assert (singular_values(pair) - dense).abs().max() <= 1e-12 * scale
    assert relative_difference(pair, factors).max() < 1e-12


def test_small_singular_values_are_accurate_where_the_gram_matrix_loses_them() -> None:
    pair = degenerate("nearly parallel columns")
    small = decompose(pair).spectrum[1, -1]
    exact = torch.linalg.svdvals(product(pair))[1, 7]
    assert abs(small - exact) < 1e-6 * exact
    # Cholesky of the Gram matrix is accurate for the well-conditioned head, but not for the other.
    squared = torch.linalg.svdvals(torch.linalg.cholesky(pair.left[0].mT @ pair.left[0]).mT)
    assert (squared / torch.linalg.svdvals(pair.left[0]) - 1).abs().max() < 1e-12
    gram = pair.left[1].mT @ pair.left[1]
    assert abs(torch.linalg.eigvalsh(gram)[0].clamp(min=0).sqrt() / torch.linalg.svdvals(pair.left[1])[-1] - 1) > 1e-6


@pytest.mark.parametrize("rank", range(9))
def test_truncation_error_is_the_norm_of_the_dropped_singular_values(rank: int) -> None:
    pair = random_pair()
    factors = decompose(pair)
    error = torch.linalg.matrix_norm(product(pair) - product(truncated(factors, rank)))
    dropped = factors.spectrum[:, rank:].norm(dim=-1)
    assert torch.allclose(error, dropped, rtol=1e-6, atol=1e-12)


def test_the_leading_directions_are_the_best_choice() -> None:
    pair = random_pair()
    best = torch.linalg.matrix_norm(product(pair) - product(truncated(decompose(pair), 4)))
    vanilla = torch.linalg.matrix_norm(product(pair) - product(truncated(transformed(pair, norm_transforms(pair)), 4)))
    assert (best < 0.98 * vanilla).all()


def test_balanced_factors_have_equal_norms_on_both_sides() -> None:
    pair = decompose(Pair(random_pair().left * 1e4, random_pair().right * 1e-4))
    assert torch.allclose(pair.left.norm(dim=-2), pair.right.norm(dim=-2))


def test_vanilla_reorders_the_original_dimensions_and_loses_nothing_at_full_rank() -> None:
    pair = random_pair()
    factors = transformed(pair, norm_transforms(pair))
    assert torch.allclose(factors.spectrum, norm_products(pair))
    assert (factors.spectrum.diff(dim=-1) <= 0).all()
    assert torch.allclose(product(factors), product(pair))
    order = (pair.left.norm(dim=-2) * pair.right.norm(dim=-2)).argsort(dim=-1, descending=True)
    kept = truncated(factors, 3)
    for head in range(3):
        chosen = order[head, :3]
        expected = pair.left[head][:, chosen] @ pair.right[head][:, chosen].mT
        assert torch.allclose(product(kept)[head], expected)


def test_vanilla_handles_a_zero_dimension() -> None:
    pair = random_pair()
    pair.left[0, :, 2] = 0
    factors = transformed(pair, norm_transforms(pair))
    assert factors.spectrum[0, -1] == 0
    assert factors.left.isfinite().all()


def test_relative_difference_detects_changes_but_ignores_the_basis() -> None:
    pair = random_pair()
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64)).Q
    assert relative_difference(pair, Pair(pair.left @ rotation, pair.right @ rotation)).max() < 1e-14
    changed = Pair(pair.left.clone(), pair.right)
    changed.left[1, 0, 0] += 1e-6
    expected = torch.linalg.matrix_norm(product(changed) - product(pair)) / torch.linalg.matrix_norm(product(pair))
    found = relative_difference(pair, changed)
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-15)
    assert found[1] > 1e-9


def test_relative_difference_of_zero_products() -> None:
    zero = degenerate("zero everywhere")
    assert relative_difference(zero, zero).tolist() == [0, 0, 0]
    assert relative_difference(zero, random_pair()).isinf().all()


@pytest.mark.parametrize("share", [0.9, 1.1])
def test_columns_with_too_small_a_remainder_are_ill_conditioned(share: float) -> None:
    """The test is the remainder of a column after projecting out the columns before it, by the norm of the column."""
    q = torch.linalg.qr(torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    remainder = share * WELL_CONDITIONED
    factor = q.clone()
    factor[1, :, 2] = 5 * (q[1, :, 0] * (1 - remainder**2) ** 0.5 + q[1, :, 2] * remainder)
    r, ill = triangular(factor)
    assert ill.tolist() == [False, share < 1]
    assert torch.allclose(r.mT @ r, factor.mT @ factor)
    assert r.tril(-1).abs().max() == 0
    single, of_single = triangular(factor.float())
    assert single.dtype == torch.float64
    assert of_single.tolist() == ill.tolist()
    assert torch.allclose(single, triangular(factor.float().double())[0])
    square, of_square = triangular(q[:, :3])
    assert of_square.dtype == torch.bool
    assert torch.allclose(square.mT @ square, q[:, :3].mT @ q[:, :3])
    assert not triangular(torch.eye(3, dtype=torch.float64).unsqueeze(0))[1].any()  # as long as it is wide
    assert triangular(torch.eye(3, dtype=torch.float64).unsqueeze(0)[:, :2])[1].all()


def test_growth_is_the_norm_of_the_terms_by_that_of_the_column() -> None:
    pair = random_pair()
    pair.left[1] = pair.left[1, :, :1] + 1e-2 * pair.left[1]
    transforms = svd_transforms(pair)
    factors = transformed(pair, transforms)
    worst = torch.zeros(3, dtype=torch.float64)
    for factor, transform, made in (
        (pair.left, transforms.left, factors.left),
        (pair.right, transforms.right, factors.right),
    ):
        terms = (factor.norm(dim=-2).unsqueeze(-1) * transform).norm(dim=-2)
        worst = torch.maximum(worst, (terms / made.norm(dim=-2)).amax(-1))
    assert torch.allclose(transforms.growth, worst, rtol=1e-6)
    assert worst[1] > 10 * worst[0]
    pair.right[2] = 0
    assert svd_transforms(pair).growth[2].isinf()
    every = svd_transforms(degenerate("zero everywhere"))
    assert every.growth.isinf().all()
    assert every.left.shape == every.right.shape == (3, 8, 8)
    assert not every.left.any()
    mixed = svd_transforms(degenerate("rank-deficient"))
    assert not mixed.left[1].any()
    assert not mixed.right[1].any()
    assert mixed.growth.isinf().tolist() == [False, True, False]


def test_heads_of_one_direction() -> None:
    pair = random_pair(heads=2, width=1)
    norms = pair.left.norm(dim=-2) * pair.right.norm(dim=-2)
    for transforms in (svd_transforms(pair), norm_transforms(pair)):
        assert torch.allclose(transforms.spectrum, norms)
        assert torch.allclose(transforms.growth, torch.ones(2, dtype=torch.float64))
    zero = svd_transforms(Pair(torch.zeros_like(pair.left), pair.right))
    assert zero.growth.isinf().all()


def test_transforms_are_applied_in_the_dtype_of_the_weights() -> None:
    pair = degenerate("rank-deficient")
    single = Pair(pair.left.float(), pair.right.float())
    factors = transformed(single, svd_transforms(pair))
    assert factors.left.dtype == factors.right.dtype == torch.float32
    assert torch.allclose(product(factors).double(), product(pair), atol=1e-3)
    assert factors.spectrum.dtype == torch.float64


def test_vanilla_keeps_the_order_of_equal_dimensions_and_balances_both_sides() -> None:
    left, right = torch.zeros(1, 6, 4, dtype=torch.float64), torch.zeros(1, 5, 4, dtype=torch.float64)
    for place, (a, b) in enumerate([(0.5, 2.0), (3.0, 4.0), (2.0, 0.5), (0.25, 0.0)]):
        left[0, place, place], right[0, place, place] = a, b
    transforms = norm_transforms(Pair(left, right))
    assert transforms.spectrum.tolist() == [[12.0, 1.0, 1.0, 0.0]]
    assert transforms.growth.tolist() == [1.0]
    factors = transformed(Pair(left, right), transforms)
    assert torch.allclose(factors.left.norm(dim=-2), transforms.spectrum.sqrt())
    assert torch.allclose(factors.right.norm(dim=-2), transforms.spectrum.sqrt())
    assert transforms.left[0].nonzero().tolist()[:3] == [[0, 1], [1, 0], [2, 2]]  # equal ones stay in their order
    many = random_pair(heads=1, left=70, right=70, width=64)
    ones = Pair(torch.ones_like(many.left), torch.ones_like(many.right))
    assert norm_transforms(ones).left[0].nonzero().tolist() == [[place, place] for place in range(64)]


def test_the_largest_product() -> None:
    for size, refused in ((0.99 * MOST_PRODUCT, False), (MOST_PRODUCT, True), (math.nan, True), (math.inf, True)):
        product_of = torch.tensor([[1.0, -size]], dtype=torch.float64)
        if refused:
            with pytest.raises(PessaError, match="1e\\+150"):
                check_product_size(product_of)
        else:
            check_product_size(product_of)
