"""Q-K under RoPE: what each frequency pair is worth, which to keep, and how those make up for the others.

Rotary embeddings turn directions i and i + d/2 of a head together, pair i by its own frequency (Su et al., RoFormer,
arXiv 2104.09864; the halves as in transformers). So W_Q and W_K cannot be mixed, but whole pairs can go, and what
commutes with every rotation may be put between the two: A_p = a_p I + b_p J, a scaling and a turn of each kept pair.

For rotated queries q and keys k a score is the sum over pairs of a_p q_p^T k_p + b_p q_p^T J k_p, linear in the
coefficients: (1, 0) for every pair makes the original scores, (0, 0) drops one. What softmax, values and W_O make of
small errors of scores is linear, too. So the squared error of a head's output is a quadratic form, and its Gram matrix,
(d, d) for each key/value head, is all that has to be known of the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.algebra.weighted import NOTHING, scales, shrunk
from pessa_cli.blocks.compact_format import PairRuns


@dataclass(frozen=True)
class PairWeighting:
    """What real inputs make of the pairs: `output_gram`, (G, d, d), and how much of the plain one is mixed in."""

    gram: Tensor
    shrinkage: float


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries or keys (positions, ..., d) as RoPE turns them; cos and sin: (positions, d)."""
    first, second = x.chunk(2, -1)
    cos, sin = (angle.reshape(len(x), *[1] * (x.dim() - 2), -1).to(x.dtype) for angle in (cos, sin))
    return x * cos + torch.cat([-second, first], -1) * sin


def contributions(weights: HeadWeights, weighting: PairWeighting | None = None) -> Tensor:
    """What each pair is worth to a key/value head's queries, squared: (G, d/2) float64, unsorted.

    By the weights alone ||W_Q,p||^2 ||W_K,p||^2 / 2, the mean over all rotations. With `weighting` it is the error that
    dropping the pair adds to the block's output, once all that are worth less are gone and the others make up for it:
    backward elimination, which measured better than what each pair adds by itself.
    """
    gram = _gram(weights, weighting)
    if weighting is None:
        return gram.diagonal(dim1=-2, dim2=-1)[:, ::2].contiguous()
    return _eliminated(gram)


def compensated(weights: HeadWeights, pairs: Sequence[PairRuns], weighting: PairWeighting) -> HeadWeights:
    """The block with each kept pair of its queries scaled and turned so that the output changes least (least squares).

    What is not kept is zero.
    """
    gram = _gram(weights, weighting)
    kept = torch.zeros(gram.shape[:2], dtype=torch.bool)
    half = kept.shape[1] // 2
    for row, runs in zip(kept, pairs, strict=True):
        for run in runs:
            row[2 * run.start : 2 * run.stop] = True
    change = _coefficients(gram, kept.to(gram.device)).reshape(-1, 1, half, 2)  # the same for all query heads
    scale, turn = change[..., 0], change[..., 1]

    def multiplied(q: Tensor, by: tuple[Tensor, Tensor]) -> Tensor:  # (a I + b J)^T, of columns q_p
        first, second = q.double().chunk(2, 2)
        a, b = (c.reshape(*c.shape, *[1] * (q.dim() - 3)) for c in by)
        return torch.cat([a * first + b * second, a * second - b * first], 2).to(q.dtype)

    q_bias = None if weights.q_bias is None else multiplied(weights.q_bias, (scale, turn))
    return replace(weights, q=multiplied(weights.q, (scale, turn)), q_bias=q_bias)


def output_gram(queries: Tensor, keys: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    """The Gram matrix of what pairs add to a block's output through its scores, (G, d, d): a_0, b_0, a_1, b_1, ...

    Rotated queries (G, M, n, d) and keys (G, N, d), attention (G, M, n, N), and values of each query head behind W_O,
    or anything of the same inner products, (G, M, N, w). Summed over queries; to the first order: errors s of a query's
    scores change its output by sum_j p_j (s_j - sum_i p_i s_i) v_j. For scores before the division by the root of d.
    To weigh errors of scores by attention and leave out the values measured worse, and second moments of queries and
    keys, each on its own, much worse.
    """
    groups, width, dtype = len(keys), keys.shape[-1], attention.dtype
    total = torch.zeros(groups, width, width, dtype=torch.float64, device=keys.device)
    # What is common to all keys or values has no effect, and would only cost digits.
    keys, values = (x - x.mean(-2, keepdim=True) for x in (keys, values))
    for g in range(groups):  # one query head at a time: n N d numbers
        k1, k2 = keys[g].to(dtype).chunk(2, -1)
        for m in range(queries.shape[1]):
            q1, q2 = queries[g, m].to(dtype).unsqueeze(1).chunk(2, -1)
            scores = torch.stack([q1 * k1 + q2 * k2, q2 * k1 - q1 * k2], -1).flatten(2)  # (n, N, d)
            falls = attention[g, m].unsqueeze(-1)
            change = falls * (scores - (falls * scores).sum(1, keepdim=True))
            outputs = (change.mT @ values[g, m].to(dtype)).transpose(0, 1).flatten(1)  # (d, n w)
            total[g] += (outputs @ outputs.mT).double()
    return total


def _gram(weights: HeadWeights, weighting: PairWeighting | None) -> Tensor:
    """The Gram matrix of each key/value head with the plain one mixed in, (G, d, d).

    The plain one is diagonal, since two frequencies are never in step. So it is no more than a ridge: what few data say
    of pairs together counts for little, and no data leave the plain rule.
    """
    norms = _norms(weights.q, weights.q_bias).sum(1) * _norms(weights.k, weights.k_bias) / 2  # (G, d/2)
    plain = torch.diag_embed(norms.repeat_interleave(2, -1))
    return plain if weighting is None else shrunk(weighting.gram, plain, weighting.shrinkage)


def _norms(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The squared norm of each pair, (..., d, D) -> (..., d/2), a bias as one more input."""
    squares = torch.linalg.vector_norm(weight, dim=-1, dtype=torch.float64).square()
    if bias is not None:
        squares = squares + bias.double().square()
    first, second = squares.chunk(2, -1)
    both: Tensor = first + second
    return both


def _unit(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram matrix with a diagonal of ones, (G, d, d), also where it was zero, and the roots of what it was."""
    scale, inverse = scales(gram)
    unit = inverse.unsqueeze(-1) * gram * inverse.unsqueeze(-2)
    return unit + torch.diag_embed(1 + NOTHING - unit.diagonal(dim1=-2, dim2=-1)), scale


def _coefficients(gram: Tensor, kept: Tensor) -> Tensor:
    """a and b of the kept pairs by least squares, (G, d), zero for the others; kept: (G, d) bool."""
    unit, scale = _unit(gram)
    both = kept.unsqueeze(-1) & kept.unsqueeze(-2)
    identity = torch.zeros_like(scale)
    identity[:, ::2] = 1
    gone = (unit @ (identity * scale * ~kept).unsqueeze(-1)).masked_fill(~kept.unsqueeze(-1), 0)
    system = torch.where(both, unit, torch.diag_embed(torch.ones_like(scale)))
    change = torch.linalg.solve(system, gone).squeeze(-1)
    return identity * kept + torch.where(scale > 0, change / scale.where(scale > 0, 1.0), 0.0)


def _eliminated(gram: Tensor) -> Tensor:
    """What dropping each pair adds to the error, in the order of least error, (G, d/2), never falling on the way.

    With S the inverse of G among the pairs that are left and x their coefficients, dropping pair p adds
    x_p^T S_pp^-1 x_p, and the others become x - S_.p S_pp^-1 x_p (optimal brain surgeon, Hassibi and Stork, 1993).
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
        last = torch.maximum(last * (1 + 1e-12), costs[every, p])  # so that their order says in which to drop them
        found[every, p] = last
        at = torch.stack([2 * p, 2 * p + 1], -1)  # (G, 2)
        columns = inverse.gather(2, at.unsqueeze(1).expand(-1, 2 * half, -1))  # (G, d, 2)
        factor = torch.linalg.solve(columns.gather(1, at.unsqueeze(-1).expand(-1, -1, 2)), columns.mT)  # (G, 2, d)
        x = x - (factor.mT @ x.gather(1, at).unsqueeze(-1)).squeeze(-1)
        inverse = inverse - columns @ factor
        rest = torch.ones_like(x).scatter_(1, at, 0.0)  # what is gone: no more than a place
        x, inverse = x * rest, inverse * rest.unsqueeze(-1) * rest.unsqueeze(-2) + torch.diag_embed(1 - rest)
    return found
