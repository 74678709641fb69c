"""The algebra of frequency pairs under RoPE, compared with autograd and least squares on explicit outputs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from pessa_cli.algebra import rope
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.compact_format import PairRuns

HALF, DIRECTIONS = 4, 8


def weights(seed: int = 0, groups: int = 2, members: int = 2) -> HeadWeights:
    """Return the weights of a block with heads of eight directions; only queries and keys matter here."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    k = normal(groups, DIRECTIONS, 12)
    return HeadWeights(normal(groups, members, DIRECTIONS, 12), k, k, k.mT)


def sample(seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return strongly correlated rotated queries (2, 2, 30, 8) and keys (2, 50, 8), their attention weights, and values
    after W_O, (2, 2, 50, 5)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    queries = normal(2, 2, 30, DIRECTIONS) @ normal(2, 1, DIRECTIONS, DIRECTIONS)
    keys = normal(2, 50, DIRECTIONS) @ normal(2, DIRECTIONS, DIRECTIONS) + 3
    return queries, keys, (queries @ keys.unsqueeze(1).mT / 10).softmax(-1), normal(2, 2, 50, 5) + 2


def features(queries: Tensor, keys: Tensor, attention: Tensor, values: Tensor) -> Tensor:
    """Return the derivatives of every output of one group by the coefficients of each pair, (M n w, pairs, 2), computed
    with autograd through softmax."""
    (q1, q2), (k1, k2) = queries.chunk(2, -1), keys.chunk(2, -1)
    scaled = torch.einsum("mip,jp->pmij", q1, k1) + torch.einsum("mip,jp->pmij", q2, k2)
    turned = torch.einsum("mip,jp->pmij", q2, k1) - torch.einsum("mip,jp->pmij", q1, k2)

    def outputs(scores: Tensor) -> Tensor:
        return scores.softmax(-1) @ values

    columns = [torch.func.jvp(outputs, (attention.log(),), (each,))[1].flatten() for each in [*scaled, *turned]]
    return torch.stack(columns, -1).reshape(-1, 2, HALF).mT


def weighting(shrinkage: float = 1e-10) -> tuple[rope.PairWeighting, list[Tensor]]:
    """Return a weighting, and the features of each group from which it is computed."""
    inputs = sample()
    return rope.PairWeighting(rope.output_gram(*inputs), shrinkage), [
        features(*one) for one in zip(*inputs, strict=True)
    ]


def residual(features: Tensor, kept: list[int]) -> float:
    """Return the squared error of the least-squares fit of all pairs' output by the kept pairs."""
    scores = features[..., 0].sum(-1)
    if not kept:
        return float(scores.square().sum())
    fit = features[:, kept].flatten(1)
    return float((scores - fit @ torch.linalg.lstsq(fit, scores).solution).square().sum())


def test_rotated_agrees_with_transformers() -> None:
    x = torch.randn(5, 3, DIRECTIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    angle = torch.rand(5, HALF, generator=torch.Generator().manual_seed(1), dtype=torch.float64).repeat(1, 2)
    heads = x.transpose(0, 1).unsqueeze(0)
    expected, _ = apply_rotary_pos_emb(heads, heads, angle.cos().unsqueeze(0), angle.sin().unsqueeze(0))
    assert torch.allclose(rope.rotated(x, angle.cos(), angle.sin()), expected[0].transpose(0, 1))


def test_compensation_is_least_squares() -> None:
    """The coefficients equal those of torch.linalg.lstsq on the explicit outputs of every query."""
    block, (weighed, by_group) = weights(), weighting()
    pairs: tuple[PairRuns, ...] = ((range(0, 2), range(3, 4)), (range(1, 3),))
    found = rope.compensated(block, pairs, weighed)
    for g, kept in enumerate(([0, 1, 3], [1, 2])):
        each = by_group[g]
        best = torch.linalg.lstsq(each[:, kept].flatten(1), each[..., 0].sum(-1)).solution.reshape(-1, 2)
        first, second = block.q[g].chunk(2, -2)
        a, b = best[:, :1], best[:, 1:]
        expected = torch.cat([a * first[:, kept] + b * second[:, kept], a * second[:, kept] - b * first[:, kept]], 1)
        got = found.q[g][:, kept + [HALF + p for p in kept]]
        assert torch.allclose(got, expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(found.k, block.k)


@pytest.mark.parametrize("shrinkage", [1e-10, 1e-2, 0.3, 10.0])
def test_compensation_is_never_worse_than_none_on_its_data(shrinkage: float) -> None:
    block, (weighed, by_group) = weights(), weighting(shrinkage)
    found = rope.compensated(block, ((range(0, 2),), (range(1, 4),)), weighed)
    for g, kept in enumerate(([0, 1], [1, 2, 3])):
        each = by_group[g]
        scores = each[..., 0].sum(-1)
        # The factor of each kept pair, from its two rows as complex numbers.
        old, new = (torch.complex(q[g, 0, kept], q[g, 0, [HALF + p for p in kept]]) for q in (block.q, found.q))
        factor = (new / old).mean(-1)  # a - i b, for the transpose of the matrix between W_Q and W_K
        x = torch.stack([factor.real, -factor.imag], -1)
        compensated = scores - torch.einsum("npc,pc->n", each[:, kept], x)
        plain = scores - each[:, kept, 0].sum(-1)
        assert compensated.norm() <= plain.norm()
        if shrinkage < 1e-3:
            assert compensated.norm() < 0.95 * plain.norm()
            assert float(compensated.square().sum()) == pytest.approx(residual(each, kept))


def test_contributions_are_the_errors_of_backward_elimination() -> None:
    """In each step no other pair adds a smaller error, and the contribution of a pair is what it adds."""
    weighed, by_group = weighting()
    worth = rope.contributions(weights(), weighed)
    for each, row in zip(by_group, worth, strict=True):
        kept, last = list(range(HALF)), 0.0
        for p in row.argsort().tolist():
            before = residual(each, kept)
            least = min(residual(each, [o for o in kept if o != other]) for other in kept)
            kept.remove(p)
            assert residual(each, kept) == pytest.approx(least, rel=1e-5)
            last = max(last, least - before)  # contributions never decrease in the order of elimination
            assert float(row[p]) == pytest.approx(last, rel=1e-5)


def test_without_data_contributions_are_products_of_norms() -> None:
    """The contribution is the mean over rotations of the squared norm of the pair's part of W_Q R W_K^T."""
    block = weights()
    worth = rope.contributions(block)
    g, p = 1, 2
    both = [p, p + HALF]
    turns = torch.linspace(0, 2 * torch.pi, 9, dtype=torch.float64)[:-1]
    total = 0.0
    for turn in turns:
        c, s = turn.cos(), turn.sin()
        rotation = torch.stack([torch.stack([c, -s]), torch.stack([s, c])])
        total += sum(float((q[both].mT @ rotation @ block.k[g][both]).square().sum()) for q in block.q[g]) / len(turns)
    assert float(worth[g, p]) == pytest.approx(total)
    biased = replace(block, k_bias=torch.ones(2, DIRECTIONS, dtype=torch.float64))
    assert (rope.contributions(biased) > worth).all()  # under RoPE the key bias affects the scores


@pytest.mark.parametrize("kind", ["zero queries", "zero keys", "one pair", "no data", "one query", "one key"])
def test_degenerate_heads_and_data_give_finite_results(kind: str) -> None:
    block, (queries, keys, attention, values) = weights(), sample()
    q, k = block.q.clone(), block.k.clone()
    if kind == "zero queries":
        q, queries = torch.zeros_like(q), torch.zeros_like(queries)
    if kind == "zero keys":
        k[0], keys[0] = 0, 0
    if kind == "one pair":
        gone = [1, 2, 3, 5, 6, 7]
        q[..., gone, :], k[..., gone, :], queries[..., gone], keys[..., gone] = 0, 0, 0, 0
    if kind == "no data":
        queries = torch.zeros_like(queries)
    if kind == "one query":
        queries, attention = queries[:, :, :1], attention[:, :, :1]
    if kind == "one key":
        keys, values, attention = keys[:, :1], values[:, :, :1], torch.ones_like(attention[..., :1])
    block = replace(block, q=q, k=k)
    weighed = rope.PairWeighting(rope.output_gram(queries, keys, attention, values), 1e-2)
    worth = rope.contributions(block, weighed)
    assert worth.isfinite().all()
    assert (worth >= 0).all()
    found = rope.compensated(block, ((range(0, 2),), ()), weighed)
    assert found.q.isfinite().all()
    if kind in ("no data", "one key"):
        assert torch.allclose(worth, rope.contributions(block))
        assert torch.allclose(found.q[0][:, [0, 1, 4, 5]], block.q[0][:, [0, 1, 4, 5]])


def test_the_gram_matrix_is_that_of_the_features() -> None:
    """Each entry is the inner product of the effects of two coefficients on all outputs of a group, in float64."""
    inputs = sample()
    found = rope.output_gram(*inputs)
    for gram, one in zip(found, zip(*inputs, strict=True), strict=True):
        flat = features(*one).flatten(1)  # (M n w, d), ordered a_0, b_0, a_1, ...
        assert torch.allclose(gram, flat.mT @ flat, rtol=1e-9, atol=1e-9 * float(gram.abs().max()))
    queries, keys, attention, values = inputs
    moved = rope.output_gram(queries, keys + 100, attention, values - 100)  # constants have no effect
    assert torch.allclose(moved, found, rtol=1e-9, atol=1e-9 * float(found.abs().max()))
    single = rope.output_gram(queries.float(), keys.float() + 100, attention.float(), values.float() - 100)
    assert single.dtype == torch.float64
    assert torch.allclose(single, found, rtol=1e-3, atol=1e-3 * float(found.abs().max()))
    shift = 1e6 * torch.arange(DIRECTIONS)
    digits = rope.output_gram(queries, keys + shift, attention.float(), values - 1e6)  # subtracted in float64
    assert torch.allclose(digits, found, rtol=1e-3, atol=1e-3 * float(found.abs().max()))
    half = rope.output_gram(queries.half(), keys, attention.float(), values)  # computed in the dtype of the attention
    assert torch.allclose(half, found, rtol=1e-2, atol=1e-2 * float(found.abs().max()))


@pytest.mark.parametrize("shrinkage", [0.02, 3.0])
def test_shrinkage_is_a_ridge_by_the_norms_of_the_weights(shrinkage: float) -> None:
    """As if each pair also had an effect of its own, whose square is its share of the weights times the shrinkage."""
    weighed, by_group = weighting(shrinkage)
    block = replace(weights(), q_bias=torch.randn(2, 2, DIRECTIONS, dtype=torch.float64))
    kept = [0, 1, 3]
    pairs: tuple[PairRuns, ...] = ((range(0, 2), range(3, 4)),) * 2
    found = rope.compensated(block, pairs, weighed)
    smaller = rope.compensated(block, pairs, replace(weighed, gram=1e-12 * weighed.gram))  # the unit does not matter
    assert torch.allclose(smaller.q, found.q, rtol=1e-6)
    assert found.q_bias is not None
    assert block.q_bias is not None
    for g, each in enumerate(by_group):
        norms = torch.zeros(HALF, dtype=torch.float64)
        for p in range(HALF):
            both = [p, p + HALF]
            queries = block.q[g][:, both].square().sum() + block.q_bias[g][:, both].square().sum()
            norms[p] = queries * block.k[g][both].square().sum() / 2
        scale = shrinkage * each.square().sum() / (2 * norms.sum())
        ridge = torch.diag((scale * norms).sqrt().repeat_interleave(2)).reshape(DIRECTIONS, HALF, 2)
        rows = torch.cat([each, ridge])
        target = rows[..., 0].sum(-1)
        best = torch.linalg.lstsq(rows[:, kept].flatten(1), target).solution.reshape(-1, 2)
        for old, new in ((block.q[g], found.q[g]), (block.q_bias[g].unsqueeze(-1), found.q_bias[g].unsqueeze(-1))):
            for row, p in enumerate(kept):
                a, b = best[row]
                first, second = old[:, p], old[:, p + HALF]
                assert torch.allclose(new[:, p], a * first + b * second, rtol=1e-6)
                assert torch.allclose(new[:, p + HALF], a * second - b * first, rtol=1e-6)
            assert not new[:, [2, 2 + HALF]].any()


def test_compensation_keeps_the_dtype_and_all_else() -> None:
    block, (weighed, _) = weights(), weighting()
    half = replace(block, q=block.q.half())
    found = rope.compensated(half, ((range(0, 2),), (range(0, 4),)), weighed)
    assert found.q.dtype == torch.float16
    assert found.q_bias is None
    assert found.v is half.v
    assert torch.allclose(found.q[1], half.q[1], atol=1e-3)  # all pairs are kept
    with pytest.raises(ValueError, match="shorter"):
        rope.compensated(block, ((range(0, 2),),), weighed)


def test_a_pair_without_effect_is_left_alone() -> None:
    """A pair of zeros has no scale: its coefficients stay those of the original, and the others do not notice it."""
    block, (queries, keys, attention, values) = weights(), sample()
    q = block.q.clone()
    q[:, :, [1, 1 + HALF]] = 0
    queries = queries.clone()
    queries[..., [1, 1 + HALF]] = 0
    block = replace(block, q=q * 1e-3)
    weighed = rope.PairWeighting(rope.output_gram(queries * 1e-3, keys, attention, values), 1e-6)
    worth = rope.contributions(block, weighed)
    assert (worth.argmin(-1) == 1).all()
    assert (worth[:, 1] < 1e-9 * worth.amax(-1)).all()
    every = rope.compensated(block, ((range(0, 3),), (range(0, 3),)), weighed)
    without = rope.compensated(block, ((range(0, 1), range(2, 3)),) * 2, weighed)
    rest = [0, 2, HALF, 2 + HALF]
    k, seen = weights().k.clone(), keys.clone()
    k[:, [1, 1 + HALF]], seen[..., [1, 1 + HALF]] = 0, 0
    unseen = replace(weights(), k=k)
    gram = rope.output_gram(sample()[0], seen, attention, values)
    left = rope.compensated(unseen, ((range(0, 3),),) * 2, rope.PairWeighting(gram, 1e-6))
    assert torch.equal(left.q[:, :, [1, 1 + HALF]], unseen.q[:, :, [1, 1 + HALF]])
    assert torch.allclose(every.q[:, :, rest], without.q[:, :, rest], rtol=1e-6, atol=1e-12)


def test_contributions_without_data_by_hand() -> None:
    """||W_Q,p||^2 ||W_K,p||^2 / 2, with biases as one more input, in float64 whatever the dtype."""
    block = weights()
    q_bias = torch.randn(2, 2, DIRECTIONS, dtype=torch.float64)
    k_bias = torch.randn(2, DIRECTIONS, dtype=torch.float64)
    biased = replace(block, q_bias=q_bias, k_bias=k_bias)
    found = rope.contributions(biased)
    assert found.shape == (2, HALF)
    for g in range(2):
        for p in range(HALF):
            both = [p, p + HALF]
            q = sum(float(block.q[g, m, both].square().sum() + q_bias[g, m, both].square().sum()) for m in range(2))
            k = float(block.k[g, both].square().sum() + k_bias[g, both].square().sum())
            assert float(found[g, p]) == pytest.approx(q * k / 2)
    half = HeadWeights(1e3 * block.q.half(), 1e3 * block.k.half(), block.v, block.o)
    assert torch.allclose(rope.contributions(half), 1e12 * rope.contributions(block), rtol=1e-2)


def test_rotated_in_half_precision() -> None:
    x = torch.randn(5, DIRECTIONS).half()
    angle = torch.rand(5, HALF).repeat(1, 2)
    found = rope.rotated(x, angle.cos(), angle.sin())
    assert found.dtype == torch.float16
    exact = rope.rotated(x.double(), angle.cos().double(), angle.sin().double())
    assert torch.allclose(found.double(), exact, atol=5e-3)
