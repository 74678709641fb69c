"""Pruning of Q-K under RoPE: the importance of each frequency pair, and how kept pairs compensate for dropped ones.

Rotary embeddings rotate directions i and i + d/2 of a head together, as pair i with its own frequency (Su et al.,
RoFormer, arXiv 2104.09864; the halves as in transformers). Therefore W_Q and W_K cannot be merged, but whole pairs can
be dropped, and a matrix that commutes with every rotation may be inserted between them: A_p = a_p I + b_p J for each
kept pair p, a scaling and a rotation by 90 degrees (J).

For rotated queries q and keys k a score is the sum over pairs of a_p q_p^T k_p + b_p q_p^T J k_p, which is linear in
the coefficients: (1, 0) for every pair gives the original scores, and (0, 0) drops a pair. The effect of small score
errors on the output, through softmax, values and W_O, is linear to first order. So the squared error of a head's output
is a quadratic form in the coefficients, and calibration needs only its Gram matrix, (d, d) for each key/value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.algebra.weighted import NEGLIGIBLE, scales, shrunk
from pessa_cli.blocks.compact_format import PairRuns


@dataclass(frozen=True)
class PairWeighting:
    """The calibration of frequency pairs: the matrix of `output_gram`, (G, d, d), and the weight of shrinkage.

    `shrinkage` is the weight of the plain Gram matrix, that of the weights alone, which is added after scaling it to
    the same trace.
    """

    gram: Tensor
    shrinkage: float


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to queries or keys, (positions, ..., d); cos and sin are (positions, d)."""
    first, second = x.chunk(2, -1)
    cos, sin = (angle.reshape(len(x), *[1] * (x.dim() - 2), -1).to(x.dtype) for angle in (cos, sin))
    return x * cos + torch.cat([-second, first], -1) * sin


def contributions(weights: HeadWeights, weighting: PairWeighting | None = None) -> Tensor:
    """Return the squared error that dropping each frequency pair causes, (G, d/2) float64, unsorted.

    Without `weighting` it is the error of the scores, ||W_Q,p||^2 ||W_K,p||^2 / 2, the mean over all rotations. With
    `weighting` it is the error that dropping the pair adds to the block's output, after all less important pairs were
    dropped and the kept ones compensate for them. This backward elimination measured better than the error of dropping
    each pair alone.
    """
    gram = _gram(weights, weighting)
    if weighting is None:
        return gram.diagonal(dim1=-2, dim2=-1)[:, ::2].contiguous()
    return _eliminated(gram)


def compensated(weights: HeadWeights, pairs: Sequence[PairRuns], weighting: PairWeighting) -> HeadWeights:
    """Scale and rotate each kept pair of the queries such that the output changes least, in the least-squares sense.

    `pairs` are the kept pairs of each key/value head. The query weights of dropped pairs become zero.
    """
    gram = _gram(weights, weighting)
    kept = torch.zeros(gram.shape[:2], dtype=torch.bool)
    half = kept.shape[1] // 2
    for row, runs in zip(kept, pairs, strict=True):
        for run in runs:
            row[2 * run.start : 2 * run.stop] = True
    change = _coefficients(gram, kept.to(gram.device)).reshape(-1, 1, half, 2)  # shared by a group's query heads
    scale, turn = change[..., 0], change[..., 1]

    def multiplied(q: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:  # (a I + b J)^T times the columns q_p
        first, second = q.double().chunk(2, 2)
        a, b = (c.reshape(*c.shape, *[1] * (q.dim() - 3)) for c in by)
        return torch.cat([a * first + b * second, a * second - b * first], 2).to(q.dtype)

    q_bias = None if weights.q_bias is None else multiplied(weights.q_bias, (scale, turn))
    return replace(weights, q=multiplied(weights.q, (scale, turn)), q_bias=q_bias)


def output_gram(queries: Tensor, keys: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    """Return the Gram matrix of the pairs' contributions to the block's output, (G, d, d), ordered a_0, b_0, a_1, ...

    queries: rotated, (G, M, n, d). keys: rotated, (G, N, d). attention: the attention weights p, (G, M, n, N).
    values: of each query head after W_O, or vectors with the same inner products, (G, M, N, w).
    The matrix is summed over queries and correct to first order: score errors s of a query change its output by
    sum_j p_j (s_j - sum_i p_i s_i) v_j. Scores are those before the division by sqrt(d).
    Alternatives measured worse: score errors weighted by attention without the values; and, much worse, the separate
    second moments of queries and keys.
    """
    groups, width, dtype = len(keys), keys.shape[-1], attention.dtype
    total = torch.zeros(groups, width, width, dtype=torch.float64, device=keys.device)
    # A component that all keys or all values share has no effect, and would only cost digits.
    keys, values = (x - x.mean(-2, keepdim=True) for x in (keys, values))
    # One query head at a time, and always in the same memory: n N d numbers are too many to be allocated for each.
    shape = (queries.shape[2], keys.shape[1], width // 2)
    scores = torch.empty(*shape, 2, dtype=dtype, device=keys.device)
    product, change = scores.new_empty(shape), scores.new_empty(*shape[:2], width)
    for g in range(groups):
        k1, k2 = keys[g].to(dtype).chunk(2, -1)
        for m in range(queries.shape[1]):
            q1, q2 = queries[g, m].to(dtype).unsqueeze(1).chunk(2, -1)
            torch.mul(q1, k1, out=scores[..., 0]).add_(torch.mul(q2, k2, out=product))
            torch.mul(q2, k1, out=scores[..., 1]).sub_(torch.mul(q1, k2, out=product))
            pairs = scores.flatten(2)  # (n, N, d)
            weights = attention[g, m].unsqueeze(-1)
            mean = torch.mul(weights, pairs, out=change).sum(1, keepdim=True)
            torch.sub(pairs, mean, out=change).mul_(weights)
            outputs = (change.mT @ values[g, m].to(dtype)).transpose(0, 1).flatten(1)  # (d, n w)
            total[g] += (outputs @ outputs.mT).double()
    return total


def _gram(weights: HeadWeights, weighting: PairWeighting | None) -> Tensor:
    """Return the Gram matrix of each key/value head, shrunk towards the plain one, (G, d, d).

    The plain Gram matrix, of the weights alone, is diagonal, because rotations of two frequencies are uncorrelated. So
    shrinkage acts as a ridge: with little data correlations between pairs count less, and without data the plain Gram
    matrix is used.
    """
    norms = _norms(weights.q, weights.q_bias).sum(1) * _norms(weights.k, weights.k_bias) / 2  # (G, d/2)
    plain = torch.diag_embed(norms.repeat_interleave(2, -1))
    return plain if weighting is None else shrunk(weighting.gram, plain, weighting.shrinkage)


def _norms(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the squared norm of each pair, (..., d, D) -> (..., d/2); a bias counts as one more input."""
    squares = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64).square()
    if bias is not None:
        squares = squares + bias.double().square()
    first, second = squares.chunk(2, -1)
    both: Tensor = first + second
    return both


def _unit(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Return the Gram matrix scaled to a unit diagonal, (G, d, d), and the square roots of its diagonal, (G, d).

    Zeros on the diagonal also become ones, and NEGLIGIBLE is added to the diagonal so that the matrix is invertible.
    """
    scale, inverse = scales(gram)
    unit = inverse.unsqueeze(-1) * gram * inverse.unsqueeze(-2)
    return unit + torch.diag_embed(1 + NEGLIGIBLE - unit.diagonal(dim1=-2, dim2=-1)), scale


def _coefficients(gram: Tensor, kept: Tensor) -> Tensor:
    """Return least-squares coefficients a and b of the kept pairs, (G, d), with zeros elsewhere; kept: (G, d) bool."""
    unit, scale = _unit(gram)
    both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
    identity = torch.zeros_like(scale)
    identity[:, ::2] = 1
    gone = (unit @ (identity * scale * ~kept).unsqueeze(-1)).masked_fill(~kept.unsqueeze(-1), 0)
    system = torch.where(both, unit, torch.diag_embed(torch.ones_like(scale)))
    change = torch.linalg.solve(system, gone).squeeze(-1)
    return identity * kept + torch.where(scale > 0, change / scale.where(scale > 0, 1.0), 0.0)


def _eliminated(gram: Tensor) -> Tensor:
    """Return the error that dropping each pair adds, in backward elimination by least error, (G, d/2).

    The values never decrease in the order of elimination, so that sorting them gives that order. With S the inverse of
    the Gram matrix of the remaining pairs and x their coefficients, dropping pair p adds x_p^T S_pp^-1 x_p to the
    error, and the coefficients become x - S_.p S_pp^-1 x_p (optimal brain surgeon, Hassibi and Stork, 1993).
    """
    unit, scale = _unit(gram)
    groups, half = len(gram), gram.shape[-1] // 2
    inverse = torch.linalg.inv(unit)
    x = torch.zeros_like(scale)
    x[:, ::2] = scale[:, ::2]
    found = torch.full((groups, half), torch.inf, dtype=gram.dtype, device=gram.device)
    last = found.new_zeros(groups)
    every = torch.arange(groups, device=gram.device)
    for _ in range(half):
        own = inverse.reshape(groups, half, 2, half, 2).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)  # (G, d/2, 2, 2)
        pairs = x.reshape(groups, half, 2, 1)
        costs = (pairs.mT @ torch.linalg.solve(own, pairs)).reshape(groups, half)
        p = costs.masked_fill(found.isfinite(), torch.inf).argmin(-1)
        last = torch.maximum(last * (1 + 1e-12), costs[every, p])  # increasing, so that sorting gives the order
        found[every, p] = last
        at = torch.stack([2 * p, 2 * p + 1], -1)  # (G, 2)
        columns = inverse.gather(2, at.unsqueeze(1).expand(-1, 2 * half, -1))  # (G, d, 2)
        factor = torch.linalg.solve(columns.gather(1, at.unsqueeze(-1).expand(-1, -1, 2)), columns.mT)  # (G, 2, d)
        x = x - (factor.mT @ x.gather(1, at).unsqueeze(-1)).squeeze(-1)
        inverse = inverse - columns @ factor
        rest = torch.ones_like(x).scatter_(1, at, 0.0)  # dropped pairs keep their place, with an identity block
        x, inverse = x * rest, inverse * rest.unsqueeze(-1) * rest.unsqueeze(-2) + torch.diag_embed(1 - rest)
    return found
