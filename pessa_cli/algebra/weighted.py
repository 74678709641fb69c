"""The algebra of calibration: decompositions weighted by the second moments of inputs, and the refit of W_O."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.decompose import Transforms, check_product_size, core_product, padded, triangular

NEGLIGIBLE = 1e-13  # a smaller share of the largest eigenvalue of a Gram matrix is a rounding error
RESOLVED = 1e-6  # the smallest relative singular value of a factor whose square a Gram matrix in float64 resolves


@dataclass(frozen=True)
class Weighting:
    """Gram matrices (G, d, d) that replace those of the two factors A and B of a product in a calibrated decomposition.

    left: the second moment of A's outputs, `A^T E[x x^T] A`, over the inputs x of A.
    right: the same for B; None stands for the plain Gram matrix of B.
    shrinkage: the weight with which the plain Gram matrices `A^T A` and `B^T B`, scaled to the same trace, are added.
    It makes the result approach the plain decomposition if there are too few samples for a head.
    """

    left: Tensor
    right: Tensor | None
    shrinkage: float

    def of_heads(self, heads: slice) -> Weighting:
        """Return the weighting of some of the key/value heads."""
        return Weighting(self.left[heads], None if self.right is None else self.right[heads], self.shrinkage)


def weighted_transforms(pair: Pair, weighting: Weighting) -> Transforms:
    """Return the SVD of each head's weighted product, C_l^(1/2) A B^T C_r^(1/2), as transforms of A and B.

    C_l and C_r are the second moments of the inputs of A and B. An SVD of a product needs only a square root of each
    factor's Gram matrix, so the weighted Gram matrices replace the plain ones: `R_l^T R_l = A^T C_l A`, likewise R_r,
    `R_l R_r^T = U S V^T`, and the factors are `A R_l^-1 U S^(1/2)` and `B R_r^-1 V S^(1/2)`. Their product is A B^T,
    and by Eckart and Young (1936) their first r columns give its best approximation of rank r in the weighted norm; the
    error is the norm of the dropped singular values. The plain norms of the two columns of each direction are balanced,
    so that 16-bit numbers keep their range.

    `R_l^-1 U S^(1/2)` is computed as `R_r^T V S^(-1/2)`, to which it is equal, and likewise the other. So no root is
    inverted, and the product is exact for factors of any condition number.
    """
    left, plain_left = _roots(pair.left, weighting.left, weighting.shrinkage)
    right, plain_right = _roots(pair.right, weighting.right, weighting.shrinkage)
    width = left.shape[-1]
    u, spectrum, vh = torch.linalg.svd(core_product(left, right), full_matrices=False)
    there = spectrum > spectrum[:, :1] * torch.finfo(spectrum.dtype).eps * width
    over = torch.where(there, spectrum.where(there, 1.0).rsqrt(), 0.0).unsqueeze(-2)
    found = [right.mT @ (vh.mT * over), left.mT @ (u * over)]
    plain = [plain_left, plain_right]
    norms = [(r @ t).norm(dim=-2) for t, r in zip(found, plain, strict=True)]  # (G, directions)
    balanced = (norms[0] * norms[1]).sqrt()
    transforms, growth = [], torch.ones_like(spectrum[:, 0])
    for t, r, norm in zip(found, plain, norms, strict=True):
        t = t * (balanced / norm.where(norm > 0, 1.0)).unsqueeze(-2)
        terms = r.norm(dim=-2).unsqueeze(-1) * t
        growth = torch.maximum(growth, (terms.norm(dim=-2) / balanced.where(balanced > 0, torch.inf)).amax(-1))
        transforms.append(padded(t, width))
    return Transforms(transforms[0], transforms[1], growth, padded(spectrum, width))


def shrunk(gram: Tensor, plain: Tensor, shrinkage: float) -> Tensor:
    """Return `gram + shrinkage * plain`, with `plain` scaled to the trace of `gram`; (G, d, d).

    Returns `plain` where the trace of `gram` is zero.
    """
    found, own = traces(gram), traces(plain)
    mixed = gram + shrinkage * found / own.where(own > 0, 1.0) * plain
    return torch.where(found > 0, mixed, plain)  # inputs that are always zero give no weights


def traces(grams: Tensor) -> Tensor:
    """Return the traces of matrices, (G, d, d) -> (G, 1, 1)."""
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1, 1, 1)


def scales(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the column norms that belong to a Gram matrix, (..., d), and their inverses, with zero for zero norms."""
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return scale, torch.where(scale > 0, 1 / scale.where(scale > 0, 1.0), 0.0)


def _roots(factor: Tensor, gram: Tensor | None, shrinkage: float) -> tuple[Tensor, Tensor]:
    """Return R_w with R_w^T R_w = `shrunk(gram, factor^T factor, shrinkage)`, and R of the factor's QR, (G, k, d) each.

    k is the smaller of L and d. R_w is a root of the weights in the orthonormal basis of the factor, times R. So its
    small directions are as exact as those of the factor, while a root of the Gram matrix alone would lose those below
    the square root of the rounding error. Directions of the factor that are too small for the Gram matrix to resolve
    are weighted by the plain Gram matrix. Columns may have any scale, also zero.
    """
    r, ill = triangular(factor)
    if gram is None:
        return r, r
    check_product_size(gram)
    # `within` are the coordinates of the factor's columns in an orthonormal basis, and `whitening` is its inverse.
    within, resolved = r, torch.ones_like(r[..., 0], dtype=torch.bool)
    if ill.any():
        within, whitening, resolved = _singular_basis(r)
    else:
        whitening = torch.linalg.solve_triangular(r, torch.eye(r.shape[-1]).to(r), upper=True)
    found, own = traces(gram), r.square().sum((-2, -1)).reshape(-1, 1, 1)
    ratio = (found / own.where(own > 0, 1.0)).squeeze(-1)
    weights = whitening.mT @ gram @ whitening + torch.diag_embed(ratio * (shrinkage + (~resolved).double()))
    squares, vectors = torch.linalg.eigh(weights)
    root = squares.clamp(min=0).maximum(NEGLIGIBLE * squares[:, -1:]).sqrt()
    weighted = root.unsqueeze(-1) * (vectors.mT @ within)
    return torch.where(found > 0, weighted, r), r  # inputs that are always zero give no weights


def _singular_basis(r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the columns of R, (G, k, d), in the basis of the left singular vectors of R with columns of unit norm.

    Also returns the pseudo-inverse of these columns, (G, d, k), without the directions that a Gram matrix in float64
    does not resolve, and which directions it resolves, (G, k).
    """
    norms = r.norm(dim=-2)
    inverse = torch.where(norms > 0, 1 / norms.where(norms > 0, 1.0), 0.0)
    _, values, vh = torch.linalg.svd(r * inverse.unsqueeze(-2), full_matrices=False)
    resolved = values > RESOLVED * values[:, :1]
    over = torch.where(resolved, 1 / values.where(resolved, 1.0), 0.0)
    return (
        values.unsqueeze(-1) * vh * norms.unsqueeze(-2),
        inverse.unsqueeze(-1) * vh.mT * over.unsqueeze(-2),
        resolved,
    )


def refitted(o: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """Return the output projection of a block, (D_o, N), refitted to the kept directions of all heads jointly.

    moment: (N, N), the second moment of the values of the N directions of all heads. kept: the indices of the kept
    directions. The refit is the least-squares solution for the output of the full projection,
    `O_kept + O_dropped M_dk (M_kk + ridge diag M_kk)^-1`; an infinite ridge changes nothing. Dropped directions are
    uncorrelated with the kept ones of the same head, but not with those of other heads.
    """
    gone = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    gone[kept] = False
    inner = moment[kept][:, kept]
    _, inverse = scales(inner)
    unit = inverse.unsqueeze(-1) * inner * inverse  # correlations, so that the ridge is relative to each direction
    unit = unit + (ridge + NEGLIGIBLE) * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    correction = torch.linalg.solve(unit, inverse.unsqueeze(-1) * moment[kept][:, gone]) * inverse.unsqueeze(-1)
    return o.index_add(1, kept, o[:, gone] @ correction.mT)
