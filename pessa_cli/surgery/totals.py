"""Counting parameters and bytes before and after pruning to a rank plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any

from pessa_cli.blocks.seam import TITLES
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.dtypes import ITEM_BYTES
from pessa_cli.checkpoint.reader import Header
from pessa_cli.ranks.plan import RankPlan

BLOCKS = {"attention": "attention blocks", "mlp": "MLPs"}  # the kinds of blocks, and what messages call them


def totals(header: Header, sites: Iterable[Site], chosen: Iterable[Site], plan: RankPlan) -> dict[str, Any]:
    """Count blocks, parameters and bytes before and after the plan, and the shares from 0 to 1 that it removes.

    chosen: the blocks that the plan covers. Shares are of the directions of Q-K and of V-O and of the channels of the
    MLPs in the chosen blocks, of the parameters of the attention blocks and of the MLPs among them, and of all
    parameters of the model. Bytes are those of compact weights. Source of the way of counting: PESSA/CLOVER, arXiv
    2411.17426.
    """
    chosen = list(chosen)
    now, nbytes_now = _count(header, (site.tensors for site in chosen))
    left, left_bytes = _count(header, (site.shapes(plan.ranks[site.name]) for site in chosen))
    kinds: dict[str, Any] = {}
    for what, own in (
        ("attention", [site for site in chosen if "mlp" not in site.ranks]),
        ("mlp", [site for site in chosen if "mlp" in site.ranks]),
    ):
        before, _ = _count(header, (site.tensors for site in own))
        after, _ = _count(header, (site.shapes(plan.ranks[site.name]) for site in own))
        share = "attention_pruned" if what == "attention" else "mlp_parameters_pruned"
        kinds |= {
            f"{what}_parameters": before,
            f"{what}_parameters_after": after,
            share: _share(before - after, before),
        }
    parameters = sum(info.count for info in header.values())
    nbytes = sum(info.nbytes for info in header.values())
    return {
        "blocks": len(list(sites)),
        "blocks_chosen": len(chosen),
        **{f"{seam}_pruned": _dropped(chosen, plan, seam) for seam in TITLES},
        **kinds,
        "parameters": parameters,
        "parameters_after": parameters - now + left,
        "model_pruned": _share(now - left, parameters),
        "bytes": nbytes,
        "bytes_after": nbytes - nbytes_now + left_bytes,
    }


def chosen_kinds(totals: Mapping[str, Any]) -> list[str]:
    """Return which of the two kinds of blocks are among the chosen ones, as in BLOCKS."""
    return [kind for kind in BLOCKS if totals[f"{kind}_parameters"]]


def cut_kinds(totals: Mapping[str, Any]) -> list[str]:
    """Return the kinds of blocks that have lost parameters, as in BLOCKS; if none has, those that were chosen."""
    smaller = [kind for kind in BLOCKS if totals[f"{kind}_parameters_after"] < totals[f"{kind}_parameters"]]
    return smaller or chosen_kinds(totals)


def kinds_text(kinds: Sequence[str]) -> str:
    """Name kinds of blocks in a sentence: "attention", "MLPs", or "attention and MLPs"."""
    return " and ".join({"attention": "attention", "mlp": "MLPs"}[kind] for kind in kinds)


def pruned_parts(totals: Mapping[str, Any], of_attention: str) -> list[str]:
    """Say which shares of the attention and of the MLPs among the chosen blocks are removed.

    of_attention: puts the share of the attention's parameters into words, such as "= {} of this attention".
    """
    parts = []
    if totals["attention_parameters"]:
        share = of_attention.format(f"{totals['attention_pruned']:.2%}")
        parts.append(f"{totals['qk_pruned']:.2%} of Q-K and {totals['vo_pruned']:.2%} of V-O {share}")
    if totals["mlp_parameters"]:
        parts.append(f"{totals['mlp_pruned']:.2%} of the channels of these MLPs")
    return parts


def _count(header: Header, blocks: Iterable[Mapping[str, tuple[int, ...]]]) -> tuple[int, int]:
    """Return the numbers of parameters and of bytes of tensors of the given shapes, in the dtypes of the file."""
    shapes = {name: prod(shape) for tensors in blocks for name, shape in tensors.items()}
    return sum(shapes.values()), sum(ITEM_BYTES[header[name].dtype] * count for name, count in shapes.items())


def _dropped(chosen: Iterable[Site], plan: RankPlan, seam: str) -> float:
    places = [site for site in chosen if seam in site.ranks]
    before = sum(sum(site.ranks[seam]) for site in places)
    return _share(before - sum(sum(plan.ranks[site.name][seam]) for site in places), before)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
