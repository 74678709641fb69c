"""The table of supported architectures, as plain data and in Markdown."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from pessa_cli.blocks.spec import AttentionSpec
from pessa_cli.blocks.table import ARCHITECTURES, FIRST_RELEASE, PUBLISHED, SINCE, TOWERS


def architectures() -> list[dict[str, Any]]:
    """Return a row for each `model_type`: what merges by kind of block, the layouts, first release and tested models.

    A kind such as "text.*" stands for all kinds of blocks of a nested model.
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
    """Return the table in Markdown; architectures with the same blocks share a row."""
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
    """Return which products are merged in each kind of block, over all of its variants."""
    ordered = sorted(specs, key=lambda spec: [s.kind for s in specs].index(spec.kind))
    return {
        kind: " or ".join(dict.fromkeys(spec.merges for spec in of_kind))
        for kind, of_kind in groupby(ordered, lambda spec: spec.kind)
    }
