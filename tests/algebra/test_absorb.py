"""Merging the projections of a block and taking them apart again, compared with attention written out in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from attention import GROUPED, arrays, attention, inputs_of, weights_of

from pessa_cli.algebra.absorb import absorb, recompose
from pessa_cli.algebra.decompose import decompose
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import AttentionSite

BIASES = ("", "q", "k", "v", "o", "qk", "vo", "qkvo")
OTHER = replace(GROUPED.spec, key_bias_stays=True, sums_to_one=False)  # with sinks, and keys that are used elsewhere


def site_of(biases: str, unmerged: int = 0, site: AttentionSite = GROUPED) -> AttentionSite:
    return replace(site, biases=frozenset(biases), unmerged=unmerged)


def rewritten(weights: HeadWeights, site: AttentionSite) -> HeadWeights:
    """Return the block from the factors of its products, all directions kept."""
    absorbed = absorb(weights, site)
    qk = None if absorbed.qk is None else decompose(absorbed.qk)
    return recompose(weights, absorbed, qk, decompose(absorbed.vo), site)


@pytest.mark.parametrize("biases", BIASES)
@pytest.mark.parametrize("unmerged", [0, 1, 3])
def test_the_factors_are_the_same_function(biases: str, unmerged: int) -> None:
    site = site_of(biases, unmerged)
    weights, inputs = weights_of(site), inputs_of(site)
    found = rewritten(weights, site)
    expected = attention(weights, *inputs)
    assert np.allclose(attention(found, *inputs), expected, atol=1e-10)
    assert torch.equal(found.q[:, :, :unmerged], weights.q[:, :, :unmerged])
    assert torch.equal(found.k[:, :unmerged], weights.k[:, :unmerged])
    assert (unmerged == 3) == torch.equal(found.q, weights.q)
    assert not torch.allclose(found.v, weights.v)
    for name in biases:  # the negative control: each bias matters, apart from that of the keys, which softmax removes
        cleared = replace(weights, **{f"{name}_bias": torch.zeros_like(getattr(weights, f"{name}_bias"))})
        assert np.allclose(attention(cleared, *inputs), expected) == (name == "k")


@pytest.mark.parametrize("biases", ["v", "vo", "qkvo"])
def test_with_attention_sinks_the_value_bias_stays(biases: str) -> None:
    site = replace(site_of(biases), spec=OTHER)
    weights, inputs = weights_of(site), inputs_of(site)
    found = rewritten(weights, site)
    assert np.allclose(attention(found, *inputs, sink=2.0), attention(weights, *inputs, sink=2.0), atol=1e-10)
    moved = rewritten(weights, site_of(biases))
    same = np.allclose(attention(moved, *inputs, sink=2.0), attention(weights, *inputs, sink=2.0))
    assert same == ("o" not in biases)


def test_each_product_holds_the_biases_that_stay() -> None:
    """One row of W_Q and of W_K for each bias, compared with products of the weights of single heads."""
    site = replace(site_of("qkvo", 1), spec=OTHER)
    weights = weights_of(site)
    w = arrays(weights)
    absorbed = absorb(weights, site)
    assert absorbed.qk is not None
    assert absorbed.qk.left.shape == (2, 2 * (5 + 1), 2)
    assert absorbed.qk.right.shape == (2, 6 + 1, 2)
    assert absorbed.vo.left.shape == (2, 6 + 1, 3)
    assert absorbed.vo.right.shape == (2, 2 * 7, 3)
    q, k, v, o, q_bias, k_bias, v_bias = (w[name] for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias"))
    assert q is not None and k is not None and v is not None and o is not None  # noqa: PT018
    assert q_bias is not None and k_bias is not None and v_bias is not None  # noqa: PT018
    scores = (absorbed.qk.left @ absorbed.qk.right.mT).numpy().reshape(2, 2, 6, 7)
    outputs = (absorbed.vo.left @ absorbed.vo.right.mT).numpy().reshape(2, 7, 2, 7)
    for g in range(2):
        keys = np.vstack([k[g, 1:].T, k_bias[g, 1:]])
        values = np.vstack([v[g].T, v_bias[g]])
        for m in range(2):
            queries = np.vstack([q[g, m, 1:].T, q_bias[g, m, 1:]])
            assert np.allclose(scores[g, m], queries @ keys.T)
            assert np.allclose(outputs[g, :, m], values @ o[:, g, m].T)
    assert absorbed.o_bias is not None
    assert torch.equal(absorbed.o_bias, weights.o_bias if weights.o_bias is not None else absorbed.o_bias[:0])
    found = rewritten(weights, site)
    assert found.k_bias is not None
    assert found.q_bias is not None
    again = np.einsum("gmd,gd->gm", found.q_bias.numpy(), found.k_bias.numpy())  # the product of both biases
    assert np.allclose(again, np.einsum("gmd,gd->gm", q_bias, k_bias))


def test_biases_that_were_removed_are_zeros_and_the_others_are_absent() -> None:
    found = rewritten(weights_of(site_of("qkvo")), site_of("qkvo"))
    for bias in (found.k_bias, found.v_bias):
        assert bias is not None
        assert torch.equal(bias, torch.zeros(2, 3, dtype=torch.float64))
    none = rewritten(weights_of(site_of("")), site_of(""))
    assert (none.q_bias, none.k_bias, none.v_bias, none.o_bias) == (None, None, None, None)
    half = rewritten(weights_of(site_of("k", 1)), site_of("k", 1))
    assert half.k_bias is not None
    assert half.k_bias[:, 1:].abs().max() == 0 < half.k_bias[:, :1].abs().min()


def test_the_dtype_is_that_asked_for_and_biases_are_added_in_float64() -> None:
    site = site_of("qkvo")
    weights = weights_of(site, dtype=torch.float16)
    single, double = absorb(weights, site, torch.float32), absorb(weights, site)
    for absorbed, dtype in ((single, torch.float32), (double, torch.float64)):
        assert absorbed.qk is not None
        assert {absorbed.qk.left.dtype, absorbed.qk.right.dtype, absorbed.vo.left.dtype, absorbed.vo.right.dtype} == {
            dtype
        }
        assert absorbed.o_bias is not None
        assert absorbed.o_bias.dtype == torch.float64
    stays = absorb(weights_of(site), replace(site, spec=OTHER), torch.float32)  # with biases as rows
    assert stays.vo.left.dtype == torch.float32
    assert double.qk is not None
    assert double.qk.right.shape == (2, 6, 3)  # without a row for the key bias
    o, v_bias, o_bias = (arrays(weights)[name] for name in ("o", "v_bias", "o_bias"))
    assert o is not None and v_bias is not None and o_bias is not None  # noqa: PT018
    assert double.o_bias is not None
    assert np.allclose(double.o_bias.numpy(), o_bias + np.einsum("ogmd,gd->o", o, v_bias), rtol=1e-14)


def test_a_direction_that_is_cut_is_replaced_by_its_mean() -> None:
    """With the mean of each direction in the biases, the output for inputs with these means is unchanged by any cut."""
    site = site_of("vo")
    weights, (queries, keys) = weights_of(site), inputs_of(site)
    keys = np.repeat(keys[:1], 4, 0)  # every value equals its mean
    expected = attention(weights, queries, keys)
    absorbed = absorb(weights, site)
    vo = decompose(absorbed.vo)
    mean = torch.einsum("gdn,n->gd", vo.left.mT, torch.from_numpy(keys[0]))
    found = recompose(weights, absorbed, None, vo, replace(site, unmerged=3), mean)
    assert np.allclose(attention(found, queries, keys), expected)
    assert found.v_bias is not None
    assert torch.equal(found.v_bias, -mean)
    for rank in range(3):
        v, o, v_bias = found.v.clone(), found.o.clone(), found.v_bias.clone()
        v[:, rank:], o[..., rank:], v_bias[:, rank:] = 0, 0, 0
        assert np.allclose(attention(replace(found, v=v, o=o, v_bias=v_bias), queries, keys), expected)
    for biases in ("v", "o", ""):  # without both biases the mean has no place
        one = site_of(biases)
        weights = weights_of(one)
        parts = absorb(weights, one)
        kept = [recompose(weights, parts, None, decompose(parts.vo), replace(one, unmerged=3), m) for m in (mean, None)]
        outputs = [attention(each, queries, keys) for each in kept]
        assert np.array_equal(outputs[0], outputs[1])
