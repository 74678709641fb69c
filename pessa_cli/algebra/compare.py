"""Norms and differences of products of two factors, computed without forming the products."""

from __future__ import annotations

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair


def relative_difference(reference: Pair, candidate: Pair) -> Tensor:
    """Return ||A B^T - A' B'^T||_F / ||A B^T||_F of each head, (G,), from thin QR factorisations of width 2d.

    If the reference product is zero, the result is 0 if the candidate product is also zero, and infinity otherwise.
    """
    left = torch.linalg.qr(torch.cat([reference.left, candidate.left], dim=-1), mode="r").R
    right = torch.linalg.qr(torch.cat([reference.right, -candidate.right], dim=-1), mode="r").R
    difference = torch.linalg.matrix_norm(left @ right.mT)
    norm = product_norm(reference)
    return torch.where(difference == 0, 0.0, difference / norm)


def product_norm(pair: Pair) -> Tensor:
    """Return ||A B^T||_F of each head, (G,)."""
    left = torch.linalg.qr(pair.left, mode="r").R
    right = torch.linalg.qr(pair.right, mode="r").R
    norm: Tensor = torch.linalg.matrix_norm(left @ right.mT)
    return norm
