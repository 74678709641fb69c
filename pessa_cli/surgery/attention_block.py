"""The decomposition of one attention block, from weights to factors.

`decompose_attention` computes the spectra and the transforms that turn the block's projections into factors.
`attention_factors` applies the transforms at full rank. `cut_attention` adapts the factors to the kept directions, and
`surgery.block_io.write_site` then drops the other directions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Absorbed, Pair, absorb, recompose
from pessa_cli.algebra.decompose import (
    Transforms,
    norm_products,
    norm_transforms,
    singular_values,
    svd_transforms,
    transformed,
)
from pessa_cli.algebra.heads import HeadWeights, joined
from pessa_cli.algebra.rope import PairWeighting, compensated, contributions
from pessa_cli.algebra.weighted import refitted, weighted_transforms
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.ranks.spectra import Spectra, Spectrum
from pessa_cli.statistics.sums import AttentionStatistics
from pessa_cli.statistics.weighing import Refit, Weighed, kept_directions, refit_moment, weigh
from pessa_cli.surgery.rewrite import Ranking


@dataclass(frozen=True)
class Order:
    """One way to rank the directions of a head.

    values: returns only the values to rank by, (G, d). transforms: returns them together with the transforms.
    """

    values: Callable[[Pair], Tensor]
    transforms: Callable[[Pair], Transforms]


_SVD = Order(singular_values, svd_transforms)
# A calibrated model that is pruned again without statistics is decomposed by its weights alone.
ORDERS: Mapping[Ranking, Order] = {
    "svd": _SVD,
    "vanilla": Order(norm_products, norm_transforms),
    "calibrated": _SVD,
}


@dataclass(frozen=True)
class BlockTransforms:
    """The transforms from the projections of a block to factors, for all of its key/value heads.

    qk: None if W_Q and W_K cannot be merged. refit: the statistics for the refit after cutting; None without
    calibration.
    """

    qk: Transforms | None
    vo: Transforms
    refit: Refit | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all values as float64 tensors by name, for a file."""
        sides = {"qk": self.qk, "vo": self.vo}
        found = {
            f"{side}.{field.name}": getattr(of, field.name)
            for side, of in sides.items()
            if of is not None
            for field in fields(Transforms)
        }
        if self.refit is not None:
            found |= {"moment": self.refit.moment, "ridge": torch.tensor(self.refit.ridge, dtype=torch.float64)}
            if self.refit.center is not None:
                found["center"] = self.refit.center
            if self.refit.pairs is not None:
                found["pairs.gram"] = self.refit.pairs.gram
                found["pairs.shrinkage"] = torch.tensor(self.refit.pairs.shrinkage, dtype=torch.float64)
        return found

    def to(self, device: torch.device) -> BlockTransforms:
        """Return the same transforms on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.tensors().items()}
        return BlockTransforms.of(moved)

    @staticmethod
    def of(tensors: Mapping[str, Tensor]) -> BlockTransforms:
        """Rebuild the transforms from the result of `tensors`."""
        qk, vo = (
            Transforms(*(tensors[f"{side}.{field.name}"] for field in fields(Transforms)))
            if f"{side}.left" in tensors
            else None
            for side in ("qk", "vo")
        )
        assert vo is not None
        if "moment" not in tensors:
            return BlockTransforms(qk, vo)
        pairs = None
        if "pairs.gram" in tensors:
            pairs = PairWeighting(tensors["pairs.gram"], float(tensors["pairs.shrinkage"]))
        refit = Refit(tensors.get("center"), tensors["moment"], float(tensors["ridge"]), pairs)
        return BlockTransforms(qk, vo, refit)


def attention_spectra(weights: HeadWeights, site: AttentionSite, ranking: Ranking) -> Spectra:
    """Compute the spectra of a block from its weights alone; this is a third of the work of `decompose_attention`."""
    parts = ([ORDERS[ranking].values(pair) for pair in _products(part, site)] for part in weights.parts())
    return _spectra([torch.cat(side) for side in zip(*parts, strict=True)], pair_contributions(weights, site))


def decompose_attention(
    weights: HeadWeights, site: AttentionSite, ranking: Ranking, found: AttentionStatistics | None = None
) -> tuple[Spectra, BlockTransforms]:
    """Decompose the products W_Q W_K^T and W_V W_O of a block, in float64.

    found: the calibration statistics of the block, by which the products are weighted; None to use the weights alone.
    """
    weighed = None if found is None else weigh(found.to(weights.v.device), site, weights.v_bias)
    products = (_products(part, site) for part in weights.parts())
    if weighed is None:
        parts: Iterable[list[Transforms]] = ([ORDERS[ranking].transforms(p) for p in pairs] for pairs in products)
    else:
        parts = _weighted(products, weighed)
    sides = [_joined(side) for side in zip(*parts, strict=True)]
    refit = None if weighed is None else weighed.refit
    pairs = pair_contributions(weights, site, None if refit is None else refit.pairs)
    spectra = _spectra([side.spectrum for side in sides], pairs)
    if found is not None:
        spectra = replace(spectra, calibrated=True, trials=found.trials)
    return spectra, BlockTransforms(sides[0] if len(sides) == 2 else None, sides[-1], refit)


def pair_contributions(
    weights: HeadWeights, site: AttentionSite, weighting: PairWeighting | None = None
) -> Spectrum | None:
    """Return the contributions of the frequency pairs under RoPE, (G, d/2); None if Q-K is not pruned by pairs."""
    return contributions(weights, weighting).cpu().numpy() if site.by_pairs else None


def attention_factors(weights: HeadWeights, site: AttentionSite, transforms: BlockTransforms) -> HeadWeights:
    """Return the block as factors at full rank, in the dtypes of `weights`: the same function of its inputs."""
    transforms = transforms.to(weights.v.device)
    parts, start, o_bias = list[HeadWeights](), 0, weights.o_bias
    center = None if transforms.refit is None else transforms.refit.center
    for part in weights.parts():
        part = replace(part, o_bias=o_bias)  # each part adds its value biases to the output bias
        heads = slice(start, start := start + len(part.v))
        known = [_of_heads(side, heads) for side in (transforms.qk, transforms.vo) if side is not None]
        absorbed = absorb(part, site, _precision(part, known))
        factors = [transformed(pair, side) for pair, side in zip(_pairs(absorbed), known, strict=True)]
        mean = None if center is None else (center[heads].unsqueeze(1) @ known[-1].left).squeeze(1)
        rewritten = recompose(part, absorbed, factors[0] if len(factors) == 2 else None, factors[-1], site, mean)
        o_bias = rewritten.o_bias
        parts.append(joined([rewritten], weights))
    return joined(parts, weights)


def cut_attention(weights: HeadWeights, kept: AttentionSite, transforms: BlockTransforms) -> HeadWeights:
    """Refit a block in factored form to the directions that `kept` keeps; without calibration, return it unchanged.

    W_O is refitted to the kept directions of V-O, and under RoPE the kept frequency pairs compensate for the pairs that
    are cut.
    """
    if transforms.refit is None:
        return weights
    transforms = transforms.to(weights.o.device)
    refit = transforms.refit
    assert refit is not None
    if refit.pairs is not None and kept.pairs is not None:
        weights = compensated(weights, kept.pairs, refit.pairs)
    if kept.vo_ranks == kept.full:
        return weights
    moment = refit_moment(refit, transforms.vo.left, kept)
    directions = kept_directions(kept, kept.vo_ranks).to(moment.device)
    o = refitted(weights.o.double().reshape(kept.output_width, -1), moment, directions, refit.ridge)
    return replace(weights, o=o.reshape(weights.o.shape).to(weights.o.dtype))


def _products(part: HeadWeights, site: AttentionSite) -> list[Pair]:
    return _pairs(absorb(part, site))


def _pairs(absorbed: Absorbed) -> list[Pair]:
    """Return the products of a block that are decomposed: Q-K, if it can be merged, and V-O."""
    return [absorbed.vo] if absorbed.qk is None else [absorbed.qk, absorbed.vo]


def _weighted(parts: Iterable[list[Pair]], weighed: Weighed) -> Iterator[list[Transforms]]:
    """Yield the weighted transforms of each part of a block; the parts hold consecutive heads."""
    start = 0
    for pairs in parts:
        heads = slice(start, start := start + len(pairs[-1].left))
        sides = (weighed.qk, weighed.vo)[-len(pairs) :]
        yield [weighted_transforms(pair, side.of_heads(heads)) for pair, side in zip(pairs, sides, strict=True)]


def _joined(parts: Iterable[Transforms]) -> Transforms:
    """Concatenate the transforms of consecutive heads, on the CPU."""
    parts = list(parts)
    return Transforms(*(torch.cat([getattr(p, f.name).cpu() for p in parts]).contiguous() for f in fields(Transforms)))


def _of_heads(transforms: Transforms, heads: slice) -> Transforms:
    return Transforms(*(getattr(transforms, field.name)[heads] for field in fields(Transforms)))


def _spectra(sides: list[Tensor], pairs: Spectrum | None) -> Spectra:
    names = ("qk", "vo")[-len(sides) :]
    return Spectra({name: side.cpu().numpy() for name, side in zip(names, sides, strict=True)}, pairs=pairs)


def _precision(weights: HeadWeights, transforms: list[Transforms]) -> torch.dtype:
    """Return the dtype in which the transforms are applied to these weights.

    It is float32 for 16-bit weights if the rounding errors of float32 stay below an eighth of those of the weights'
    dtype, because that halves the work; otherwise float64. The transforms themselves are computed in float64.
    """
    dtypes = {tensor.dtype for tensor in (weights.q, weights.k, weights.v, weights.o)}
    if not dtypes <= {torch.float16, torch.bfloat16}:
        return torch.float64
    finest = min(torch.finfo(dtype).eps for dtype in dtypes)
    growth = max(float(t.growth.where(t.growth.isfinite(), 0.0).max()) for t in transforms)
    return torch.float32 if 8 * growth * torch.finfo(torch.float32).eps <= finest else torch.float64
