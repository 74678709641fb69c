"""The algebra of calibration: decompositions in the norm of real inputs, and the least-squares refit of W_O."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.decompose import Transforms, check_product_size, core_product

NOTHING = 1e-13  # an eigenvalue of a Gram matrix of unit columns that is rounding and no direction


@dataclass(frozen=True)
class Weighting:
    """What real inputs make of the two factors of a product, as Gram matrices (G, d, d) that stand for their own.

    `left` is the second moment of `x^T pair.left` over the inputs x that the left factor meets, `A^T E[x x^T] A`: what
    comes out of a projection says all that is needed of what goes into it. `right` is the same for the other side,
    None where what comes out of it counts as it is. Both are mixed with `shrinkage` times the plain Gram matrices,
    brought to the same trace, so that samples too few to fill a head leave the plain rule and not noise.
    """

    left: Tensor
    right: Tensor | None
    shrinkage: float

    def of_heads(self, heads: slice) -> Weighting:
        """The same for some of the key/value heads."""
        return Weighting(self.left[heads], None if self.right is None else self.right[heads], self.shrinkage)


def weighted_transforms(pair: Pair, weighting: Weighting) -> Transforms:
    """The SVD of each head's product as real inputs see it, C_l^(1/2) A B^T C_r^(1/2), as transforms of A and B.

    A root of a Gram matrix is all that an SVD needs of a factor, so the weighted one takes the place of the plain
    one: `R_l^T R_l = A^T C_l A`, `R_l R_r^T = U S V^T`, and the factors are `A R_l^-1 U S^(1/2)`, `B R_r^-1 V S^(1/2)`.
    They make the same product, and by Eckart and Young their first r columns are its best approximation of rank r in
    the weighted norm; what that loses is the norm of the spectrum's tail. Balanced are the plain norms of the columns,
    which is what 16-bit numbers have to hold.
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
    """A weighted Gram matrix with so many times the plain one mixed in, brought to its trace; (G, d, d)."""
    if gram is None:
        return plain
    found, own = traces(gram), traces(plain)
    mixed = gram + shrinkage * found / own.where(own > 0, 1.0) * plain
    return torch.where(found > 0, mixed, plain)  # inputs that were zero always say nothing


def traces(grams: Tensor) -> Tensor:
    """Those of Gram matrices, (G, d, d) -> (G, 1, 1)."""
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(-1, 1, 1)


def scales(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The norms of the columns that a Gram matrix is of, (..., d), and one over them, zero for those that are zero."""
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    return scale, torch.where(scale > 0, 1 / scale.where(scale > 0, 1.0), 0.0)


def _roots(gram: Tensor) -> tuple[Tensor, Tensor]:
    """R with R^T R = gram, and its pseudo-inverse, (G, d, d) each: for columns of any scale, some of them zero."""
    check_product_size(gram)
    scale, inverse = scales(gram)
    values, vectors = torch.linalg.eigh(inverse.unsqueeze(-1) * gram * inverse.unsqueeze(-2))
    there = values > NOTHING * gram.shape[-1]
    root = values.where(there, 0.0).sqrt()
    over = torch.where(there, 1 / root.where(there, 1.0), 0.0)
    return root.unsqueeze(-1) * vectors.mT * scale.unsqueeze(-2), inverse.unsqueeze(-1) * vectors * over.unsqueeze(-2)


def refitted(o: Tensor, moment: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The output projection of a block, (D_o, N), fitted anew to the directions that are kept, for all heads jointly.

    moment: (N, N), the second moment of what the N directions of all heads carry. Least squares for what the full
    projection makes of them: `O_kept + O_dropped M_dk (M_kk + ridge diag M_kk)^-1`; an infinite ridge changes nothing.
    What is dropped of a head is uncorrelated to what it keeps, but not to what the others keep.
    """
    gone = torch.ones(len(moment), dtype=torch.bool, device=moment.device)
    gone[kept] = False
    inner = moment[kept][:, kept]
    _, inverse = scales(inner)
    unit = inverse.unsqueeze(-1) * inner * inverse  # correlations, so that directions of any size count alike
    unit = unit + (ridge + NOTHING) * torch.eye(len(unit), dtype=unit.dtype, device=unit.device)
    correction = torch.linalg.solve(unit, inverse.unsqueeze(-1) * moment[kept][:, gone]) * inverse.unsqueeze(-1)
    return o.index_add(1, kept, o[:, gone] @ correction.mT)
