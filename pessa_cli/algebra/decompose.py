"""The algebra: absorb two projections of a head into their product, decompose it, cut it, and go back.

Everything is batched over the key/value heads (G) and in float64. The D x D product itself is never formed:
thin QR of both factors leaves a d x d core, whose SVD is the SVD of the product (PESSA/CLOVER, arXiv 2411.17426,
section 3; the stacking of a group's query heads makes grouped queries exact).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Factors, Pair
from pessa_cli.common.errors import PessaError

WELL_CONDITIONED = 1e-3
MOST_PRODUCT = 1e150  # whose square is still a number


@dataclass(frozen=True)
class Transforms:
    """What makes factors out of a pair, `pair.left @ left` and `pair.right @ right`: (G, d, d) each, and the spectrum.

    They are as small as the heads are narrow, so that one pass can find them and another apply them. `growth`, (G,):
    the numbers that add up to an entry of a factor are so many times larger than its column, and so are their
    rounding errors. Infinite for a head whose columns are nearly dependent: `transformed` starts from its weights.
    """

    left: Tensor
    right: Tensor
    growth: Tensor
    spectrum: Tensor


def transformed(pair: Pair, transforms: Transforms) -> Factors:
    """The factors of a pair whose transforms are known, in the dtype of the pair."""

    def times(factor: Tensor, transform: Tensor) -> Tensor:  # by rows, as files store weights: it is faster, too
        return (transform.to(factor.dtype).mT @ factor.mT).mT

    left, right = times(pair.left, transforms.left), times(pair.right, transforms.right)
    ill = transforms.growth.isinf()
    if ill.any():
        exact = _by_householder(Pair(pair.left[ill].double(), pair.right[ill].double()))
        left[ill], right[ill] = (factor.to(left.dtype) for factor in exact)
    return Factors(left, right, transforms.spectrum)


def svd_transforms(pair: Pair) -> Transforms:
    """The SVD of each head's product, as transforms: O(D d^2) for each head, where the dense product takes O(D^3)."""
    (left, ill_left), (right, ill_right) = triangular(pair.left), triangular(pair.right)
    u, spectrum, vh = torch.linalg.svd(core_product(left, right), full_matrices=False)
    root, ill, width = spectrum.sqrt().unsqueeze(-2), ill_left | ill_right, pair.left.shape[-1]
    spectrum = _padded(spectrum, width)
    if ill.all():
        zero = spectrum.new_zeros(len(spectrum), width, width)
        return Transforms(zero, zero, torch.full_like(spectrum[:, 0], torch.inf), spectrum)

    def transform(r: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
        solved = torch.linalg.solve_triangular(r, basis * root, upper=True)
        terms = r.norm(dim=-2).unsqueeze(-1) * solved  # of each column; those of R are as long as those of the factor
        growth = terms.norm(dim=-2) / root.squeeze(-2)
        return solved.masked_fill(ill.reshape(-1, 1, 1), 0), growth.nan_to_num(nan=1).amax(-1)

    (t_left, growth_left), (t_right, growth_right) = transform(left, u), transform(right, vh.mT)
    growth = torch.maximum(growth_left, growth_right).masked_fill(ill, torch.inf)
    return Transforms(t_left, t_right, growth, spectrum)


def decompose(pair: Pair) -> Factors:
    """The factors of a pair by the SVD of each head's product."""
    return transformed(pair, svd_transforms(pair))


def singular_values(pair: Pair) -> Tensor:
    """The spectrum of each head's product alone, (G, d), descending; at a third of the cost of `decompose`."""
    (left, _), (right, _) = triangular(pair.left), triangular(pair.right)
    return _padded(torch.linalg.svdvals(core_product(left, right)), pair.left.shape[-1])


def norm_products(pair: Pair) -> Tensor:
    """The L2 norms of each dimension's two columns multiplied, (G, d), descending: what "vanilla" pruning goes by."""
    products: Tensor = pair.left.norm(dim=-2) * pair.right.norm(dim=-2)
    return products.sort(dim=-1, descending=True).values


def norm_transforms(pair: Pair) -> Transforms:
    """The baseline of the paper, "vanilla": the original dimensions in the order of the product of their L2 norms."""
    left, right = pair.left.norm(dim=-2), pair.right.norm(dim=-2)  # (G, d)
    spectrum, order = (left * right).sort(dim=-1, descending=True, stable=True)
    places = torch.nn.functional.one_hot(order, order.shape[-1]).mT  # (G, d, d): one column for each place

    def transform(norms: Tensor) -> Tensor:
        scale = (left * right).sqrt() / norms.where(norms > 0, 1.0)
        weighed: Tensor = scale.unsqueeze(-1) * places
        return weighed

    return Transforms(transform(left), transform(right), torch.ones_like(spectrum[:, 0]), spectrum)


def core_product(left: Tensor, right: Tensor) -> Tensor:
    """The d x d core of each head. Raises PessaError for numbers that only float64 checkpoints can hold."""
    core = left @ right.mT
    check_product_size(core)
    return core


def check_product_size(product: Tensor) -> None:
    if not (product.abs() < MOST_PRODUCT).all():  # nor NaN
        raise PessaError(
            f"a product of attention weights is too large for float64 ({MOST_PRODUCT:g})",
            "rescale the weights; no float32 checkpoint is that large",
        )


def triangular(factor: Tensor) -> tuple[Tensor, Tensor]:
    """R of each head's thin QR, (G, min(L, d), d), and where Q must not be taken as `factor @ inverse(R)`, (G,) bool.

    R is float64. A factor in a smaller dtype is converted head by head: that stays in the cache.

    R is the Cholesky factor of the Gram matrix, and Householder's where that is not safe. Cholesky costs a third, but
    its error grows with the square of the condition number. R_ii / ||a_i|| is what is left of a column once those
    before it are projected out: above WELL_CONDITIONED the spectrum keeps ten digits.
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


def _by_householder(pair: Pair) -> tuple[Tensor, Tensor]:
    """The factors of heads of any condition, from the bases of both sides."""
    (q_left, left), (q_right, right) = torch.linalg.qr(pair.left), torch.linalg.qr(pair.right)
    u, spectrum, vh = torch.linalg.svd(core_product(left, right), full_matrices=False)
    root, width = spectrum.sqrt().unsqueeze(-2), pair.left.shape[-1]
    return _padded(q_left @ (u * root), width), _padded(q_right @ (vh.mT * root), width)


def _padded(tensor: Tensor, width: int) -> Tensor:
    """Zero directions added where the inputs are narrower than the head, so that there are always d of them."""
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))
