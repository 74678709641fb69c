"""The decomposition of random heads: exact at full rank, optimal when truncated, and safe for degenerate heads."""

from __future__ import annotations

import pytest
import torch
from products import KINDS, degenerate, product, random_pair, truncated

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.compare import relative_difference
from pessa_cli.algebra.decompose import decompose, norm_products, norm_transforms, singular_values, transformed


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
