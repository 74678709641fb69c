"""Merging of two projections of a head into their product, and the way back from factors to projections.

The method is PESSA/CLOVER (arXiv 2411.17426), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import AttentionSite


@dataclass(frozen=True)
class Pair:
    """Two factors of a product `left @ right.mT` for each key/value head: (G, L, d) and (G, R, d).

    The attention block depends on the factors only through their product.
    """

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Factors(Pair):
    """A factorisation whose directions (columns) are sorted by importance; `spectrum` is (G, d), descending.

    In `decompose` the spectrum holds the singular values s and the columns of each factor are orthogonal. The spectrum
    is split evenly over both factors, so that 16-bit numbers keep their range: both columns have the norm sqrt(s).
    """

    spectrum: Tensor


@dataclass(frozen=True)
class Absorbed:
    """An attention block as the products Q-K and V-O, and its output bias.

    qk: None if W_Q and W_K cannot be merged. qk.left stacks the m query heads of a group, each with its bias as one
    more input row: (G, m (D_q + 1), c), for the c directions of each head that can be merged. qk.right is W_K,
    (G, D_k, c), with the key bias as one more row if it must be kept.
    vo.left is W_V, (G, D_k, d), with the value bias as one more row if it cannot move into the output bias; vo.right
    stacks W_O of the group's query heads, (G, m D_o, d).
    o_bias: (D_o,) in float64, or None if the block has none.
    """

    qk: Pair | None
    vo: Pair
    o_bias: Tensor | None


def absorb(weights: HeadWeights, site: AttentionSite, dtype: torch.dtype = torch.float64) -> Absorbed:
    """Return the block's products in `dtype`, with the key and value biases removed where that is exact.

    The key bias adds the same number to the scores of a query with all keys, which softmax removes. It is dropped,
    unless the architecture also multiplies keys with something other than queries. Attention weights sum to one (except
    with attention sinks), so the value bias adds `sum_h b_V,h W_O,h` to the output for every input. It moves into the
    output bias, if there is one.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    qk = None
    if site.merges_qk:
        q = _with_bias(weights.q.to(dtype), weights.q_bias)[:, :, site.unmerged :]  # (G, M, c, D_q or D_q + 1)
        k = _with_bias(weights.k.to(dtype), weights.k_bias if site.spec.key_bias_stays else None)[:, site.unmerged :]
        qk = Pair(q.mT.reshape(g, -1, d - site.unmerged), k.mT)
    v, o = weights.v.to(dtype), weights.o  # (G, d, D_k) and (D_o, G, M, d)
    o_bias = None if weights.o_bias is None else weights.o_bias.double()
    if o_bias is None or not site.moves_v_bias:
        v = _with_bias(v, weights.v_bias)
    elif weights.v_bias is not None:
        o_bias = o_bias + value_bias_effect(weights)
    o = o.to(dtype).permute(1, 2, 0, 3).reshape(g, m * site.output_width, d)
    return Absorbed(qk, Pair(v.mT, o), o_bias)


def value_bias_effect(weights: HeadWeights) -> Tensor:
    """Return what the value biases add to the output where attention weights sum to one, (D_o,) in float64.

    It is `sum_h b_V,h W_O,h`, and zero for a block without value biases.
    """
    o = weights.o.double()  # (D_o, G, M, d)
    if weights.v_bias is None:
        return o.new_zeros(len(o))
    each = weights.v_bias.double().unsqueeze(1).expand(o.shape[1:])  # shared by the query heads of a group
    return o.reshape(len(o), -1) @ each.reshape(-1)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Append the bias as one more input column: (..., d, D) -> (..., d, D + 1)."""
    return weight if bias is None else torch.cat([weight, bias.to(weight.dtype).unsqueeze(-1)], dim=-1)


def recompose(
    weights: HeadWeights,
    absorbed: Absorbed,
    qk: Factors | None,
    vo: Factors,
    site: AttentionSite,
    mean: Tensor | None = None,
) -> HeadWeights:
    """Return weights of the block that compute the same function from the factors of its products, in float64.

    Biases that `absorb` removed are kept as zeros, since the model's code expects to load them. `mean`, (G, d), is the
    mean of each V-O direction's values over the calibration data, for blocks with value and output biases: the value
    bias subtracts it and the output bias adds its effect, so that cutting a direction replaces it by its mean.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    q, k, q_bias, k_bias = weights.q, weights.k, weights.q_bias, weights.k_bias
    if qk is not None:
        stacked = qk.left.reshape(g, m, -1, d - site.unmerged).mT  # (G, M, c, D_q or D_q + 1)
        keys = qk.right.mT  # (G, c, D_k or D_k + 1)
        q = _replace_merged(q, stacked[..., : site.query_width], 2)
        k = _replace_merged(k, keys[..., : site.key_width], 1)
        q_bias = None if q_bias is None else _replace_merged(q_bias, stacked[..., site.query_width], 2)
        if k_bias is not None:
            own = keys[..., site.key_width] if site.spec.key_bias_stays else torch.zeros_like(keys[..., 0])
            k_bias = _replace_merged(k_bias, own, 1)
    rows = vo.left.mT  # (G, d, D_k or D_k + 1)
    v_bias, o_bias = weights.v_bias, absorbed.o_bias
    if v_bias is not None:
        v_bias = torch.zeros_like(v_bias) if site.moves_v_bias else rows[..., site.key_width]
    if mean is not None and v_bias is not None and o_bias is not None:
        v_bias = -mean
        o_bias = o_bias + (vo.right.double() @ mean.unsqueeze(-1)).reshape(-1, site.output_width).sum(0)
    return HeadWeights(
        q=q,
        k=k,
        v=rows[..., : site.key_width],
        o=vo.right.reshape(g, m, site.output_width, d).permute(2, 0, 1, 3),
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        o_bias=o_bias,
    )


def _replace_merged(whole: Tensor, merged: Tensor, axis: int) -> Tensor:
    """Replace the last directions along `axis` by `merged`, and keep the leading ones that cannot be merged."""
    others = whole.narrow(axis, 0, whole.shape[axis] - merged.shape[axis])
    return torch.cat([others.to(merged.dtype), merged], axis) if others.numel() else merged
