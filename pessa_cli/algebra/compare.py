"""Differences: of products of two factors, without forming the products, and of predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair

ROWS = 64  # positions whose predictions are compared at a time; in float64 they take 80 MB for 150,000 tokens


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


def kl_divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """Return the KL divergence of one prediction from another over the whole vocabulary, at each position, in nats.

    reference, logits: (positions, vocabulary). The result is sum p (log p - log q) with p by `reference` and q by
    `logits`, (positions,), computed in float64 (in float32 on MPS, which has no float64). Tokens that p excludes count
    as 0.
    """
    wide = torch.float32 if logits.device.type == "mps" else torch.float64
    found = []
    for ours, theirs in zip(torch.split(reference, ROWS), torch.split(logits, ROWS), strict=True):
        p, q = (rows.log_softmax(-1, dtype=wide) for rows in (ours, theirs))
        found.append(torch.where(p == -torch.inf, 0.0, p.exp() * (p - q)).sum(-1))
    return torch.cat(found)
