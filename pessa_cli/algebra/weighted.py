"""The algebra of calibration: decompositions weighted by the second moments of inputs, and the refit of W_O."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.decompose import Transforms, check_product_size, core_product

NEGLIGIBLE = 1e-13  # a smaller eigenvalue, divided by d, of a Gram matrix with unit diagonal counts as a rounding error


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
    """
    plain = [factor.mT @ factor for factor in (pair.left, pair.right)]
    grams = [
        shrunk(gram, own, weighting.shrinkage)
        for gram, own in zip((weighting.left, weighting.right), plain, strict=True)
    ]
    (left, inverse_left), (right, inverse_right) = (_roots(gram) for gram in grams)
    u, spectrum, vh = torch.linalg.svd(core_product(left, right))
    root = spectrum.sqrt().unsqueeze(-2)
    found = [inverse_left @ (u * root), inverse_right @ (vh.mT * root)]
    norms = [(t * (own @ t)).sum(-2).clamp(min=0).sqrt() for t, own in zip(found, plain, strict=True)]  # (G, d)
    balanced = (norms[0] * norms[1]).sqrt()
    transforms, growth = [], torch.ones_like(spectrum[:, 0])
    for t, own, norm in zip(found, plain, norms, strict=True):
        t = t * (balanced / norm.where(norm > 0, 1.0)).unsqueeze(-2)
        terms = own.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt().unsqueeze(-1) * t
        growth = torch.maximum(growth, (terms.norm(dim=-2) / balanced.where(balanced > 0, torch.inf)).amax(-1))
        transforms.append(t)
    return Transforms(transforms[0], transforms[1], growth, spectrum)


def shrunk(gram: Tensor | None, plain: Tensor, shrinkage: float) -> Tensor:
    """Return `gram + shrinkage * plain`, with `plain` scaled to the trace of `gram`; (G, d, d).

    Returns `plain` where there is no weighted Gram matrix, or where its trace is zero.
    """
    if gram is None:
        return plain
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


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with R^T R = gram, and its pseudo-inverse, (G, d, d) each.

    The eigenvalue decomposition is that of the matrix scaled to a unit diagonal, so that columns may have any scale,
    also zero.
    """
    check_product_size(gram)
    scale, inverse = scales(gram)
    values, vectors = torch.linalg.eigh(inverse.unsqueeze(-1) * gram * inverse.unsqueeze(-2))
    there = values > NEGLIGIBLE * gram.shape[-1]
    root = values.where(there, 0.0).sqrt()
    over = torch.where(there, 1 / root.where(there, 1.0), 0.0)
    return root.unsqueeze(-1) * vectors.mT * scale.unsqueeze(-2), inverse.unsqueeze(-1) * vectors * over.unsqueeze(-2)


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
