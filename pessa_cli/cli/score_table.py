"""The table of `eval`: a row for each model, and below each but the first a row of its differences to the first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from pessa_cli.cli.quantities import PERCENT, measured, within

if TYPE_CHECKING:
    from pessa_cli.evaluation.evaluate import Scores

# What is resampled, by the kind of data. Tasks have a narrow column each, and their intervals only in --json.
UNITS = {"speech": "clips", "text": "windows", "pairs": "pairs"}
Column = tuple[str, int, str]  # the kind of data, the number of the score, and the heading


def captions(scores: Sequence[Scores]) -> Iterator[str]:
    """Yield lines on the metrics, the data and their amounts, and on what was not measured."""
    found: dict[str, dict[str, None]] = {}
    for score in (score for model in scores for some in model.found.values() for score in some):
        (unit, amount), percent = next(iter(score.counts.items())), " in %" if score.metric in PERCENT else ""
        found.setdefault(f"{score.metric}{percent}, {score.how}; {unit}", {})[f"{score.data} {amount:,}"] = None
        if score.about_nats:
            found.setdefault("nats per token", {})[score.about_nats] = None
    yield from (f"{what}: {', '.join(data)}" for what, data in found.items())
    if units := [UNITS[kind] for kind in scores[0].found if kind in UNITS]:
        paired = "; differences to the first model on the same resamples" if len(scores) > 1 else ""
        yield f"in brackets: 95 % intervals by the bootstrap over {' and '.join(units)}{paired}"
    yield from (note for model in scores for note in model.notes)


def score_table(scores: Sequence[Scores]) -> Table:
    """Return the table. A column is there if any model has a figure for it."""
    rows: list[tuple[str, dict[Column, str]]] = []
    for model in scores:
        values, changes = _cells(model, scores[0])
        rows.append((model.model, values))
        if changes and model is not scores[0]:
            rows.append(("  difference", changes))
    columns = list(dict.fromkeys(column for _, cells in rows for column in cells))
    table = Table("model", box=None, pad_edge=False)
    for *_, heading in columns:
        table.add_column(heading, justify="right")
    for name, cells in rows:
        table.add_row(name, *(cells.get(column, "") for column in columns))
    return table


def _cells(model: Scores, first: Scores) -> tuple[dict[Column, str], dict[Column, str]]:
    """The values of a model, and their differences to those of the first one."""
    values, changes = dict[Column, str](), dict[Column, str]()
    for kind, pairs in model.beside(first).items():
        for number, (score, other) in enumerate(pairs):
            if kind not in UNITS:
                values[kind, number, score.data] = measured(score.metric, score.value)
                continue
            values |= {(kind, number, name): within(name, figure) for name, figure in score.figures.items()}
            changes |= {(kind, number, name): within(name, f, True) for name, f in score.changes(other).items()}
        if kind == "tasks":
            values[kind, len(pairs), "mean"] = measured("accuracy", model.mean)
    return values, changes
