"""Absorb the two projections of a head into their product, and go back from factors to projections."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import Site


@dataclass(frozen=True)
class Pair:
    """Two factors that only matter through their product `left @ right.mT`: (G, L, d) and (G, R, d)."""

    left: Tensor
    right: Tensor


@dataclass(frozen=True)
class Factors(Pair):
    """The same product with its directions sorted by what they are worth, the spectrum (G, d), descending.

    The spectrum is split evenly over both sides, so that 16-bit numbers keep their range: both columns of a direction
    have the norm sqrt(s). From `decompose` the columns are orthogonal and the spectrum holds the singular values.
    """

    spectrum: Tensor


@dataclass(frozen=True)
class Absorbed:
    """An attention block as its products: Q-K where nothing stands between W_Q and W_K, V-O, and the output bias.

    qk.left stacks the m query heads of a group, each with its bias as one more input row: (G, m (D_q + 1), c), for the
    c directions of each head that merge. qk.right is W_K, (G, D_k, c), with a key bias that must stay as one more row.
    vo.left is W_V (G, D_k, d), with the value bias as one more row where it cannot move into an output bias; vo.right
    stacks the outputs of the group, (G, m D_o, d).
    """

    qk: Pair | None
    vo: Pair
    o_bias: Tensor | None


def absorb(weights: HeadWeights, site: Site, dtype: torch.dtype = torch.float64) -> Absorbed:
    """The block's products in `dtype`, with both bias rules of a plain softmax applied where they hold.

    The key bias adds the same number to every key's score of a query, which softmax removes: it is dropped, unless it
    meets something else than queries. The rows of attention sum to one (but with attention sinks), so a value bias
    adds `sum_h b_V,h W_O,h` to the output whatever the input: it moves into the output bias, if there is one, which is
    float64 always.
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
        each = weights.v_bias.double().unsqueeze(1).expand(g, m, d)  # the same for a group's query heads
        o_bias = o_bias + o.double().reshape(len(o), -1) @ each.reshape(-1)
    o = o.to(dtype).permute(1, 2, 0, 3).reshape(g, m * site.output_width, d)
    return Absorbed(qk, Pair(v.mT, o), o_bias)


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """The bias as one more input."""
    return weight if bias is None else torch.cat([weight, bias.to(weight.dtype).unsqueeze(-1)], dim=-1)


def recompose(
    weights: HeadWeights,
    absorbed: Absorbed,
    qk: Factors | None,
    vo: Factors,
    site: Site,
    mean: Tensor | None = None,
) -> HeadWeights:
    """The block's weights with its products in factored form: the same function of its inputs, in float64.

    Biases that the algebra has moved elsewhere stay as zeros, since the model's code expects to load them. `mean`,
    (G, d), is what the directions of V-O carry on average, for blocks with both biases: the value bias takes it off
    and the output bias gives it back, so that a direction that is cut leaves its mean behind.
    """
    g, m, d = len(weights.v), site.group, site.head_dim
    q, k, q_bias, k_bias = weights.q, weights.k, weights.q_bias, weights.k_bias
    if qk is not None:
        stacked = qk.left.reshape(g, m, -1, d - site.unmerged).mT  # (G, M, c, D_q or D_q + 1)
        keys = qk.right.mT  # (G, c, D_k or D_k + 1)
        q, k = _behind(q, stacked[..., : site.query_width], 2), _behind(k, keys[..., : site.key_width], 1)
        q_bias = None if q_bias is None else _behind(q_bias, stacked[..., site.query_width], 2)
        if k_bias is not None:
            own = keys[..., site.key_width] if site.spec.key_bias_stays else torch.zeros_like(keys[..., 0])
            k_bias = _behind(k_bias, own, 1)
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


def _behind(whole: Tensor, merged: Tensor, axis: int) -> Tensor:
    """The directions of each head that merge in their new form, behind the others as they were."""
    others = whole.narrow(axis, 0, whole.shape[axis] - merged.shape[axis])
    return torch.cat([others.to(merged.dtype), merged], axis) if others.numel() else merged
