"""Singular triplets of a weight: where most of the methods that adapt a decomposition start."""

from __future__ import annotations

import torch
from torch import Tensor


def triplets(
    weight: Tensor, rank: int | None = None, *, smallest: bool = False, niter: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), s (r,) and V (r, in) of a weight (out, in): those of the largest singular values, descending.

    `rank` None, or more than there are, takes all; `smallest` the other end. With `niter` they come from a randomised
    subspace iteration (Halko et al. 2011) instead of an exact SVD: much faster and only about right, which does no harm
    where the basis is stored with what was trained in it. On the meta device only the shapes mean something.
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
