"""The SVD of the product of two projections, for each head.

Everything is batched over the key/value heads (G) and computed in float64. The D x D product itself is never formed:
a thin QR of both factors leaves a d x d core, whose SVD gives the SVD of the product (PESSA/CLOVER, arXiv 2411.17426,
section 3). Stacking the query heads of a group makes this exact for grouped-query attention.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Factors, Pair
from pessa_cli.common.errors import PessaError

WELL_CONDITIONED = 1e-3  # the smallest relative remainder of a column for which Cholesky is used, see `triangular`
MOST_PRODUCT = 1e150  # the square of a larger number could overflow float64


@dataclass(frozen=True)
class Transforms:
    """The matrices that turn a pair into factors, `pair.left @ left` and `pair.right @ right`, (G, d, d) each.

    `spectrum` is that of the factors, (G, d). The matrices are small, so one pass over the checkpoint can compute them
    and another can apply them. `growth`, (G,), is the factor by which cancellation amplifies rounding errors: the norm
    of the terms that add up to a column of a factor, divided by the norm of the column. It is infinite for a head whose
    columns are nearly linearly dependent; `transformed` then decomposes the head's weights anew.
    """

    left: Tensor
    right: Tensor
    growth: Tensor
    spectrum: Tensor


def transformed(pair: Pair, transforms: Transforms) -> Factors:
    """Apply transforms to a pair; returns the factors in the dtype of the pair."""

    def times(factor: Tensor, transform: Tensor) -> Tensor:  # transposed, since files store weights so: it is faster
        return (transform.to(factor.dtype).mT @ factor.mT).mT

    left, right = times(pair.left, transforms.left), times(pair.right, transforms.right)
    ill = transforms.growth.isinf()
    if ill.any():
        exact = _householder_factors(Pair(pair.left[ill].double(), pair.right[ill].double()))
        left[ill], right[ill] = (factor.to(left.dtype) for factor in exact)
    return Factors(left, right, transforms.spectrum)


def svd_transforms(pair: Pair) -> Transforms:
    """Return the SVD of each head's product as transforms; O(D d^2) per head, while the dense product takes O(D^3)."""
    (left, ill_left), (right, ill_right) = triangular(pair.left), triangular(pair.right)
    u, spectrum, vh = torch.linalg.svd(core_product(left, right), full_matrices=False)
    root, ill, width = spectrum.sqrt().unsqueeze(-2), ill_left | ill_right, pair.left.shape[-1]
    spectrum = padded(spectrum, width)
    if ill.all():
        zero = spectrum.new_zeros(len(spectrum), width, width)
        return Transforms(zero, zero, torch.full_like(spectrum[:, 0], torch.inf), spectrum)

    def transform(r: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        solved = torch.linalg.solve_triangular(r, basis * root, upper=True)
        terms = r.norm(dim=-2).unsqueeze(-1) * solved  # norms; the columns of R have the norms of the factor's columns
        growth = terms.norm(dim=-2) / root.squeeze(-2)
        return solved.masked_fill(ill.reshape(-1, 1, 1), 0), growth.nan_to_num(nan=1).amax(-1)

    (t_left, growth_left), (t_right, growth_right) = transform(left, u), transform(right, vh.mT)
    growth = torch.maximum(growth_left, growth_right).masked_fill(ill, torch.inf)
    return Transforms(t_left, t_right, growth, spectrum)


def decompose(pair: Pair) -> Factors:
    """Return the factors of a pair from the SVD of each head's product."""
    return transformed(pair, svd_transforms(pair))


def singular_values(pair: Pair) -> Tensor:
    """Return only the singular values of each head's product, (G, d), descending; a third as costly as `decompose`."""
    (left, _), (right, _) = triangular(pair.left), triangular(pair.right)
    return padded(torch.linalg.svdvals(core_product(left, right)), pair.left.shape[-1])


def norm_products(pair: Pair) -> Tensor:
    """Return the product of the L2 norms of each dimension's two columns, (G, d), descending.

    The paper's baseline, "vanilla" pruning, ranks the original dimensions by these products.
    """
    products: Tensor = pair.left.norm(dim=-2) * pair.right.norm(dim=-2)
    return products.sort(dim=-1, descending=True).values


def norm_transforms(pair: Pair) -> Transforms:
    """Return transforms for "vanilla" pruning, which sort the original dimensions by the product of their L2 norms."""
    left, right = pair.left.norm(dim=-2), pair.right.norm(dim=-2)  # (G, d)
    spectrum, order = (left * right).sort(dim=-1, descending=True, stable=True)
    places = torch.nn.functional.one_hot(order, order.shape[-1]).mT  # (G, d, d): permutation matrices

    def transform(norms: Tensor) -> Tensor:
        scale = (left * right).sqrt() / norms.where(norms > 0, 1.0)
        scaled: Tensor = scale.unsqueeze(-1) * places
        return scaled

    return Transforms(transform(left), transform(right), torch.ones_like(spectrum[:, 0]), spectrum)


def core_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the core `left @ right.mT` of each head, (G, d, d). Raises PessaError if an entry is too large."""
    core = left @ right.mT
    check_product_size(core)
    return core


def check_product_size(product: Tensor) -> None:
    """Raise PessaError if an entry is NaN or at least MOST_PRODUCT; only float64 checkpoints can have such products."""
    if not (product.abs() < MOST_PRODUCT).all():  # the comparison is also false for NaN
        raise PessaError(
            f"a product of attention weights is not below {MOST_PRODUCT:g}, which is too large for float64",
            "rescale the weights; products of float32 weights are never that large",
        )


def triangular(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return R of each head's thin QR, (G, min(L, d), d) in float64, and which heads are ill-conditioned, (G,) bool.

    For an ill-conditioned head Q must not be computed as `factor @ inverse(R)`. R is the Cholesky factor of the Gram
    matrix, or comes from a Householder QR for ill-conditioned heads: Cholesky takes a third of the time, but its error
    grows with the square of the condition number. The test is R_ii / ||a_i||, the remainder of column i after
    projecting out the columns before it: if all are above WELL_CONDITIONED, the spectrum keeps ten digits.

    A factor in a smaller dtype is converted to float64 head by head, so that it stays in the processor's cache.
    """
    length, width = factor.shape[-2:]
    if length < width:
        every = torch.ones(len(factor), dtype=torch.bool, device=factor.device)
        return torch.linalg.qr(factor.double(), mode="r").R, every
    if factor.dtype == torch.float64:
        gram = factor.mT @ factor
    else:
        gram = torch.stack([wide.mT @ wide for wide in (head.double() for head in factor)])
    lower, failed = torch.linalg.cholesky_ex(gram)
    left = lower.diagonal(dim1=-2, dim2=-1) / gram.diagonal(dim1=-2, dim2=-1).sqrt()  # (G, d)
    ill = (failed != 0) | ~(left > WELL_CONDITIONED).all(-1)
    r = lower.mT
    if ill.any():
        r = r.clone()
        r[ill] = torch.linalg.qr(factor[ill].double(), mode="r").R
    return r, ill


def _householder_factors(pair: Pair) -> tuple[Tensor, Tensor]:
    """Return the factors of heads of any condition number, with an explicit Q of both factors."""
    (q_left, left), (q_right, right) = torch.linalg.qr(pair.left), torch.linalg.qr(pair.right)
    u, spectrum, vh = torch.linalg.svd(core_product(left, right), full_matrices=False)
    root, width = spectrum.sqrt().unsqueeze(-2), pair.left.shape[-1]
    return padded(q_left @ (u * root), width), padded(q_right @ (vh.mT * root), width)


def padded(tensor: Tensor, width: int) -> Tensor:
    """Append zero directions up to `width`, needed where the inputs are narrower than the head."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
