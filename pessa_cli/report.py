"""What a model's attention is like and what a rank plan does to it, as plain data: the content of `--json`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from math import prod
from typing import Any

from pessa_cli.architectures import ARCHITECTURES, FIRST_RELEASE, PUBLISHED, SINCE, TOWERS, AttentionSpec
from pessa_cli.checkpoint import ITEM_BYTES, Header
from pessa_cli.ranks import RankPlan, Spectra
from pessa_cli.sites import Site


def block(site: Site, spectra: Spectra, plan: RankPlan) -> dict[str, Any]:
    """One attention block: spectra as lists (G x d, descending), and the ranks.

    Where something keeps Q-K from being merged its spectrum is null, or that of the other directions; where that is
    RoPE of whole heads, `qk_pairs` are the contributions of the frequency pairs (G x d/2, squared, in the order of the
    file).
    """
    return {
        "kind": site.spec.kind,
        "layer": site.layer,
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "qk_spectrum": None if spectra.qk is None else spectra.qk.tolist(),
        "qk_pairs": None if spectra.pairs is None else spectra.pairs.tolist(),
        "vo_spectrum": spectra.vo.tolist(),
        "qk_ranks": list(plan.qk[site.name]),
        "vo_ranks": list(plan.vo[site.name]),
    }


def totals(header: Header, sites: Iterable[Site], chosen: Iterable[Site], plan: RankPlan) -> dict[str, Any]:
    """What the plan removes, counted as the paper does; `chosen` are the blocks that it covers.

    Shares are of the directions of Q-K and of V-O (of the chosen blocks), of the parameters of their attention,
    and of all the model's parameters. Bytes are those of the weights.
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
    """Parameters and bytes of tensors in the given shapes and the dtypes of the file."""
    shapes = {name: prod(shape) for tensors in blocks for name, shape in tensors.items()}
    return sum(shapes.values()), sum(ITEM_BYTES[header[name].dtype] * count for name, count in shapes.items())


def _dropped(plan: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> float:
    before = sum(sum(ranks) for ranks in stored.values())
    return _share(before - sum(sum(plan[name]) for name in stored), before)


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 0.0


def architectures() -> list[dict[str, Any]]:
    """The table: for each `model_type` what merges in which blocks, the layouts, since when, and on what checked.

    A kind of "text.*" is there for each of those that the model inside has.
    """
    kinds = {name: _kinds(specs) for name, specs in ARCHITECTURES.items()}
    for name, towers in TOWERS.items():
        kinds[name] = {}
        for tower in towers:
            own = _kinds(tower.specs(tower.rows)) or {f"{tower.kind}.*": f"as {tower.config} says"}
            kinds[name] |= own
    return [
        {
            "model_type": name,
            "merges": merges,
            "layouts": ["compact", "dense"] if all(s.compact for s in ARCHITECTURES.get(name, ())) else ["dense"],
            "since": SINCE.get(name, FIRST_RELEASE),
            "checked": ["tiny model", *([PUBLISHED[name]] if name in PUBLISHED else [])],
        }
        for name, merges in kinds.items()
    ]


def architectures_table() -> str:
    """The same in Markdown, with those in one row that differ by their names alone."""
    lines = ["| `model_type` | what merges in which blocks |", "|---|---|"]
    rows: dict[str, list[str]] = {}
    for row in architectures():
        by_merges: dict[str, list[str]] = {}
        for kind, merges in row["merges"].items():
            by_merges.setdefault(merges, []).append(kind)
        words = "; ".join(f"{', '.join(kinds)}: {merges}" for merges, kinds in by_merges.items())
        rows.setdefault(words + ("" if "compact" in row["layouts"] else " (dense layout only)"), []).append(
            f"`{row['model_type']}`"
        )
    return "\n".join([*lines, *(f"| {', '.join(names)} | {words} |" for words, names in rows.items())])


def _kinds(specs: tuple[AttentionSpec, ...]) -> dict[str, str]:
    """What merges in each kind of block, in all variants of it."""
    ordered = sorted(specs, key=lambda spec: [s.kind for s in specs].index(spec.kind))
    return {
        kind: " or ".join(dict.fromkeys(spec.merges for spec in of_kind))
        for kind, of_kind in groupby(ordered, lambda spec: spec.kind)
    }
