"""Parts of a block, joined again; entries that are not finite; and the places of kept directions."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from attention import GROUPED, weights_of

from pessa_cli.algebra import heads
from pessa_cli.algebra.heads import HeadWeights, all_finite, joined, live

SITE = replace(GROUPED, heads=10, kv_heads=5, biases=frozenset("qkvo"))
# Bytes of one key/value head in float64: 2 query heads, the key, the value and the columns of W_O of both query heads.
ONE = 8 * (2 * 3 * 5 + 3 * 6 + 3 * 6 + 7 * 2 * 3)


def same(a: HeadWeights, b: HeadWeights) -> bool:
    return all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in ((getattr(a, field.name), getattr(b, field.name)) for field in fields(HeadWeights))
    )


@pytest.mark.parametrize(
    ("allowed", "counts"),
    [(1, [1] * 5), (ONE, [1] * 5), (2 * ONE - 1, [1] * 5), (2 * ONE, [2, 2, 1]), (3 * ONE, [3, 2]), (9 * ONE, [5])],
)
@pytest.mark.parametrize("biases", ["", "qkvo"])
def test_parts_have_as_many_heads_as_fit_and_join_to_the_block(
    allowed: int, counts: list[int], biases: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "PART_BYTES", allowed)
    weights = weights_of(replace(SITE, biases=frozenset(biases)))
    parts = list(weights.parts())
    assert [len(part.v) for part in parts] == counts
    assert [part.o.shape[1] for part in parts] == counts
    assert torch.equal(parts[-1].q, weights.q[-counts[-1] :])
    assert torch.equal(parts[0].o, weights.o[:, : counts[0]])
    assert all((part.o_bias is None) == (not biases) for part in parts)
    assert same(joined(parts, weights), weights)


def test_a_block_of_one_head_is_one_part() -> None:
    weights = weights_of(replace(SITE, heads=2, kv_heads=1))
    assert len(parts := list(weights.parts())) == 1
    assert same(parts[0], weights)


def test_joined_has_the_dtypes_of_the_block_and_the_last_output_bias() -> None:
    weights = weights_of(SITE, dtype=torch.float16)
    parts = [weights_of(replace(SITE, heads=4, kv_heads=2), seed) for seed in (1, 2)]
    whole = joined(parts, weights)
    assert {
        t.dtype for t in (whole.q, whole.k, whole.v, whole.o, whole.q_bias, whole.k_bias, whole.v_bias) if t is not None
    } == {torch.float16}
    assert whole.o_bias is parts[1].o_bias
    assert torch.equal(whole.o, torch.cat([part.o for part in parts], 1).half())
    assert torch.equal(whole.k, torch.cat([part.k for part in parts]).half())


def test_on_another_device_the_weights_are_the_same() -> None:
    weights = weights_of(replace(SITE, biases=frozenset("qo")))
    assert same(weights.to("cpu"), weights)
    moved = weights.to("meta")
    assert moved.q.device.type == moved.o.device.type == "meta"
    assert moved.o_bias is not None
    assert moved.o_bias.device.type == "meta"
    assert moved.k_bias is None


@pytest.mark.parametrize(("entry", "finite"), [(0.0, True), (1e300, True), (math.inf, False), (-math.inf, False)])
def test_one_entry_that_is_not_finite(entry: float, finite: bool) -> None:
    tensor = torch.ones(3, 4, dtype=torch.float64)
    tensor[1, 2] = entry
    assert all_finite(tensor) == finite
    tensor[0, 0] = math.nan
    assert not all_finite(tensor)
    assert all_finite(tensor[:0])


def test_places_of_kept_directions() -> None:
    assert live((2, 0, 4), 4).tolist() == [0, 1, 8, 9, 10, 11]
    assert live((1, 2), 3, 2).tolist() == [0, 3, 6, 7, 9, 10]
    pairs = ((range(0, 1), range(2, 3)), (range(1, 3),))
    assert live((), 6, pairs=pairs).tolist() == [0, 2, 3, 5, 7, 8, 10, 11]
    assert live((), 6, 2, pairs).tolist() == [0, 2, 3, 5, 6, 8, 9, 11, 13, 14, 16, 17, 19, 20, 22, 23]
    with torch.device("meta"):  # as while a model is loaded
        assert live((2, 1), 2).tolist() == [0, 1, 2]
        assert live((), 4, pairs=((range(1, 2),),)).tolist() == [1, 3]
