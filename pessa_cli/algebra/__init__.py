"""The mathematics on tensors: head weights, products, decompositions and rotary pairs. It reads and writes no files."""

from __future__ import annotations

from pessa_cli.algebra.absorb import Absorbed, Pair, recompose, value_bias_effect
from pessa_cli.algebra.channels import ChannelWeights, Weights, channel_norms, removal_order
from pessa_cli.algebra.compare import kl_divergence, product_norm, relative_difference
from pessa_cli.algebra.decompose import (
    Transforms,
    norm_products,
    norm_transforms,
    singular_values,
    svd_transforms,
    transformed,
    triangular,
)
from pessa_cli.algebra.heads import HeadWeights, all_finite, joined, live
from pessa_cli.algebra.rope import PairWeighting, compensated, contributions, output_gram, rotated
from pessa_cli.algebra.weighted import Weighting, refitted, scales, traces, weighted_transforms

__all__ = [
    "Absorbed",
    "ChannelWeights",
    "HeadWeights",
    "Pair",
    "PairWeighting",
    "Transforms",
    "Weighting",
    "Weights",
    "all_finite",
    "channel_norms",
    "compensated",
    "contributions",
    "joined",
    "kl_divergence",
    "live",
    "norm_products",
    "norm_transforms",
    "output_gram",
    "product_norm",
    "recompose",
    "refitted",
    "relative_difference",
    "removal_order",
    "rotated",
    "scales",
    "singular_values",
    "svd_transforms",
    "traces",
    "transformed",
    "triangular",
    "value_bias_effect",
    "weighted_transforms",
]
