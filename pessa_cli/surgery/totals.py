"""Counting parameters and bytes before and after pruning to a rank plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.dtypes import ITEM_BYTES
from pessa_cli.checkpoint.reader import Header
from pessa_cli.ranks.plan import RankPlan


def totals(header: Header, sites: Iterable[Site], chosen: Iterable[Site], plan: RankPlan) -> dict[str, Any]:
    """Count blocks, parameters and bytes before and after the plan, and the shares from 0 to 1 that it removes.

    chosen: the blocks that the plan covers. Shares are of the directions of Q-K and of V-O in the chosen blocks, of the
    parameters of these blocks, and of all parameters of the model. Bytes are those of compact weights. Source of the
    way of counting: PESSA/CLOVER, arXiv 2411.17426.
    """
    chosen = list(chosen)
    attention, attention_bytes = _count(header, (site.tensors for site in chosen))
    left, left_bytes = _count(header, (site.shapes(plan.qk[site.name], plan.vo[site.name]) for site in chosen))
    parameters = sum(info.count for info in header.values())
    nbytes = sum(info.nbytes for info in header.values())
    return {
        "blocks": len(list(sites)),
        "blocks_chosen": len(chosen),
        "qk_pruned": _dropped(plan.qk, {site.name: site.qk_ranks for site in chosen}),
        "vo_pruned": _dropped(plan.vo, {site.name: site.vo_ranks for site in chosen}),
        "attention_parameters": attention,
        "attention_parameters_after": left,
        "attention_pruned": _share(attention - left, attention),
        "parameters": parameters,
        "parameters_after": parameters - attention + left,
        "model_pruned": _share(attention - left, parameters),
        "bytes": nbytes,
        "bytes_after": nbytes - attention_bytes + left_bytes,
    }


def _count(header: Header, blocks: Iterable[Mapping[str, tuple[int, ...]]]) -> tuple[int, int]:
    """Return the numbers of parameters and of bytes of tensors of the given shapes, in the dtypes of the file."""
    shapes = {name: prod(shape) for tensors in blocks for name, shape in tensors.items()}
    return sum(shapes.values()), sum(ITEM_BYTES[header[name].dtype] * count for name, count in shapes.items())


def _dropped(plan: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> float:
    before = sum(sum(ranks) for ranks in stored.values())
    return _share(before - sum(sum(plan[name]) for name in stored), before)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
