"""The table of supported architectures, as plain data and in Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import groupby
from operator import attrgetter
from typing import Any

from pessa_cli.blocks.mlp_table import MLPS, TOWER_MLPS
from pessa_cli.blocks.spec import Row
from pessa_cli.blocks.table import ARCHITECTURES, FIRST_RELEASE, PUBLISHED, SINCE, TOWERS

MERGES, FORM = attrgetter("merges"), attrgetter("form")  # what the table says about a row of attention, of an MLP


def architectures() -> list[dict[str, Any]]:
    """Return a row for each `model_type`: what merges in which blocks, its MLPs, layouts, first release, tested models.

    A kind such as "text.*" stands for all kinds of blocks of a nested model.
    """
    merges = {name: _kinds(specs, MERGES) for name, specs in ARCHITECTURES.items()}
    mlps = {name: _kinds(specs, FORM) for name, specs in MLPS.items()}
    for name, towers in TOWERS.items():
        merges[name], mlps[name] = {}, {}
        for tower in towers:
            unknown = {f"{tower.kind}.*": f"as {tower.config} says"}
            merges[name] |= _kinds(tower.specs(tower.rows), MERGES) or unknown
            mlps[name] |= _kinds(tower.specs(TOWER_MLPS.get(name, {}).get(tower.kind, ())), FORM) or unknown
    return [
        {
            "model_type": name,
            "merges": merges[name],
            "mlps": mlps[name],
            "layouts": ["compact", "dense"] if all(s.compact for s in ARCHITECTURES.get(name, ())) else ["dense"],
            "since": SINCE.get(name, FIRST_RELEASE),
            "checked": ["tiny model", *([PUBLISHED[name]] if name in PUBLISHED else [])],
        }
        for name in merges
    ]


def architectures_table() -> str:
    """Return the table in Markdown; architectures with the same blocks share a row."""
    lines = ["| `model_type` | what merges in which attention blocks | MLPs |", "|---|---|---|"]
    rows: dict[tuple[str, str], list[str]] = {}
    for row in architectures():
        merges = by_words(row["merges"]) + ("" if "compact" in row["layouts"] else " (dense layout only)")
        rows.setdefault((merges, by_words(row["mlps"])), []).append(f"`{row['model_type']}`")
    return "\n".join([*lines, *(f"| {', '.join(names)} | {' | '.join(words)} |" for words, names in rows.items())])


def by_words(of_kinds: Mapping[str, str]) -> str:
    """Return the words for all kinds of blocks in one line; kinds with the same words are named together."""
    kinds: dict[str, list[str]] = {}
    for kind, words in of_kinds.items():
        kinds.setdefault(words, []).append(kind)
    return "; ".join(f"{', '.join(names)}: {words}" for words, names in kinds.items())


def _kinds(specs: tuple[Row, ...], words: Callable[[Row], str]) -> dict[str, str]:
    """Return the words for each kind of block, such as which products are merged, over all of its variants."""
    ordered = sorted(specs, key=lambda spec: [s.kind for s in specs].index(spec.kind))
    return {
        kind: " or ".join(dict.fromkeys(words(spec) for spec in of_kind))
        for kind, of_kind in groupby(ordered, lambda spec: spec.kind)
    }
