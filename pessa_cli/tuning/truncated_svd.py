"""The truncated SVD of a weight, from which most of the adapter methods start."""

from __future__ import annotations

import torch
from torch import Tensor


def triplets(
    weight: Tensor, rank: int | None = None, *, smallest: bool = False, niter: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U (out, r), s (r,) and V^T (r, in) of the r largest singular values of a weight (out, in), descending.

    rank: None, or more than min(out, in), gives all triplets. smallest: gives those of the r smallest singular values.
    niter: use that many iterations of a randomised SVD (Halko et al. 2011, arXiv:0909.4061) instead of an exact SVD. It
    is much faster and approximate, which suffices when the basis is stored with the adapter. On the meta device only
    the shapes of the result are defined.
    """
    most = min(weight.shape)
    rank = most if rank is None else min(rank, most)
    if weight.is_meta:
        return weight.new_empty(len(weight), rank), weight.new_empty(rank), weight.new_empty(rank, weight.shape[1])
    if niter is not None and not smallest and rank < most:
        u, s, v = torch.svd_lowrank(weight, q=min(rank + 8, most), niter=niter)
        return u[:, :rank].contiguous(), s[:rank].contiguous(), v[:, :rank].mT.contiguous()
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    kept = slice(most - rank, most) if smallest else slice(rank)
    return u[:, kept].contiguous(), s[kept].contiguous(), v[kept].contiguous()
