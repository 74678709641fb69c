"""What a model's attention is like and what a rank plan does to it, as plain data: the content of `--json`."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from pessa_cli.blocks.site import Site
from pessa_cli.blocks.spec import AttentionSpec
from pessa_cli.blocks.table import ARCHITECTURES, FIRST_RELEASE, PUBLISHED, SINCE, TOWERS
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.spectra import Spectra


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
