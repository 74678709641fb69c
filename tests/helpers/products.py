"""Pairs of factors for tests of the algebra, including degenerate ones."""

from __future__ import annotations

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Factors, Pair

KINDS = (
    "rank-deficient",
    "zero head",
    "zero everywhere",
    "scales from 1e4 to 1e-8",
    "nearly parallel columns",
    "narrower than the head",
    "narrower on both sides",
    "one head",
)


def product(pair: Pair) -> Tensor:
    return pair.left @ pair.right.mT


def random_pair(heads: int = 3, left: int = 40, right: int = 30, width: int = 8) -> Pair:
    generator = torch.Generator().manual_seed(0)
    return Pair(
        torch.randn(heads, left, width, generator=generator, dtype=torch.float64),
        torch.randn(heads, right, width, generator=generator, dtype=torch.float64),
    )


def truncated(factors: Factors, rank: int) -> Pair:
    return Pair(factors.left[..., :rank], factors.right[..., :rank])


def degenerate(kind: str) -> Pair:
    """Return heads for which the Gram matrix alone would lose the small directions, or all of them."""
    pair = random_pair()
    left, right = pair.left.clone(), pair.right.clone()
    if kind == "rank-deficient":
        left[1, :, 4:] = left[1, :, :4] @ torch.ones(4, 4, dtype=torch.float64)
    elif kind == "zero head":
        left[1] = 0
    elif kind == "zero everywhere":
        left[:] = 0
        right[:] = 0
    elif kind == "scales from 1e4 to 1e-8":
        left[1] *= torch.logspace(4, -8, 8, dtype=torch.float64)
    elif kind == "nearly parallel columns":
        left[1] = left[1, :, :1] + 1e-7 * left[1]
    elif kind == "narrower than the head":
        left = left[:, :5]
    elif kind == "narrower on both sides":
        left, right = left[:, :5], right[:, :3]
    elif kind == "one head":
        left, right = left[:1], right[:1]
    return Pair(left, right)


def of_condition(number: float, both: bool) -> Pair:
    """Return heads whose left factor, or both factors, have singular values from 1 down to 1 / number."""
    generator = torch.Generator().manual_seed(0)

    def factor(length: int, smallest: float) -> Tensor:
        shapes = ((3, length, 8), (3, 8, 8))
        left, right = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        values = torch.logspace(0, torch.tensor(smallest).log10().item(), 8, dtype=torch.float64)
        made: Tensor = torch.linalg.qr(left).Q * values @ torch.linalg.qr(right).Q
        return made

    return Pair(factor(40, 1 / number), factor(30, 1 / number if both else 1.0))
