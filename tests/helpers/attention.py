"""An attention block written out in NumPy, and random weights for it, for tests of the right outcome."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from sites import SITE
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.statistics.sums import AttentionStatistics
from pessa_cli.surgery.attention_block import BlockTransforms, decompose_attention
from pessa_cli.surgery.rewrite import Ranking

Array = NDArray[np.float64]

# Two key/value heads, each for two query heads, and a different size for every axis, so that no two can be confused.
GROUPED = replace(
    SITE,
    heads=4,
    kv_heads=2,
    head_dim=3,
    query_width=5,
    key_width=6,
    output_width=7,
    qk_ranks=(3, 3),
    vo_ranks=(3, 3),
    dtype="F64",
)


def weights_of(site: AttentionSite, seed: int = 0, dtype: torch.dtype = torch.float64) -> HeadWeights:
    """Return random weights of a block, with the biases that the site names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    g, m, d = site.kv_heads, site.group, site.head_dim
    shapes = {"q": (g, m, d), "k": (g, d), "v": (g, d), "o": (site.output_width,)}
    biases: dict[str, Any] = {
        f"{side}_bias": normal(*shape) if side in site.biases else None for side, shape in shapes.items()
    }
    return HeadWeights(
        normal(g, m, d, site.query_width),
        normal(g, d, site.key_width),
        normal(g, d, site.key_width),
        normal(site.output_width, g, m, d),
        **biases,
    )


def arrays(weights: HeadWeights) -> dict[str, Array | None]:
    """Return the weights as NumPy arrays in float64."""
    found = {field.name: getattr(weights, field.name) for field in fields(weights)}
    return {name: None if tensor is None else tensor.double().numpy() for name, tensor in found.items()}


def attention(weights: HeadWeights, queries: Array, keys: Array, sink: float = 0.0) -> Array:
    """Return the outputs of the block, (n, D_o), for inputs (n, D_q) and (N, D_k), one head after the other.

    sink: a number that is added to the sum of the attention weights, which then do not sum to one.
    """
    w = arrays(weights)
    q, k, v, o = w["q"], w["k"], w["v"], w["o"]
    assert q is not None
    assert k is not None
    assert v is not None
    assert o is not None
    groups, members = q.shape[:2]
    total = np.zeros((len(queries), len(o)))
    for g in range(groups):
        for m in range(members):
            left, right, values = queries @ q[g, m].T, keys @ k[g].T, keys @ v[g].T
            if (bias := w["q_bias"]) is not None:
                left = left + bias[g, m]
            if (bias := w["k_bias"]) is not None:
                right = right + bias[g]
            if (bias := w["v_bias"]) is not None:
                values = values + bias[g]
            scores = left @ right.T
            powers = np.exp((scores - scores.max(-1, keepdims=True)) / 2)
            total += powers / (powers.sum(-1, keepdims=True) + sink) @ values @ o[:, g, m].T
    return total if (bias := w["o_bias"]) is None else total + bias


def inputs_of(site: AttentionSite, count: int = 9) -> tuple[Array, Array]:
    """Return inputs of the queries and of the keys of a block."""
    generator = np.random.default_rng(3)
    return generator.normal(size=(5, site.query_width)), generator.normal(size=(count, site.key_width)) + 0.5


class Decomposed(NamedTuple):
    """The spectra of an attention block, and the transforms to its factors."""

    spectra: Spectra
    form: BlockTransforms


def decomposed(
    weights: HeadWeights, site: AttentionSite, ranking: Ranking, found: AttentionStatistics | None = None
) -> Decomposed:
    """Decompose an attention block."""
    return Decomposed(*decompose_attention(weights, site, ranking, found))
