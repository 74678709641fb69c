"""The commands that write no model and compare none: inspect and architectures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from pessa_cli.cli import console
from pessa_cli.cli.expand import Only, with_options
from pessa_cli.cli.options import JSON, MODEL, RunOptions, SourceOptions
from pessa_cli.ranks.rule import Rule
from pessa_cli.workflow.recipe import Recipe


@with_options
def inspect(
    model: MODEL,
    rule: Rule,
    recipe: Annotated[Recipe, Only("sites", "layers", "calibrate", "augment", "augment_seed", "statistics")],
    options: Annotated[RunOptions, Only("jobs", "device")],
    source: SourceOptions,
    curve: Annotated[
        bool, typer.Option("--curve", help="Show budgets with the parameters that they keep and the expected errors.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Plot the spectra, or the curve, to a PNG, SVG or PDF file.")
    ] = None,
    json: JSON = False,
) -> None:
    """Show the attention blocks and MLPs of a model, their spectra, and what a rule would prune.

    Example: `pessa inspect whisper-tiny.en --qk-thr 5e-3 --vo-thr 6e-3 --plot spectra.png`
    """
    run = options.run()
    from pessa_cli.checkpoint.places import check_outside
    from pessa_cli.cli.plot import check_plot, plot_curve, plot_spectra

    if plot is not None:
        check_plot(plot)
        if Path(model).is_dir():
            check_outside(plot, Path(model), "--plot")
    from pessa_cli.workflow.inspect import inspect as inspect_model

    norms = plot is not None and not curve
    found = inspect_model(
        model, replace(recipe, rule=rule), run, curve=curve, norms=norms, notify=console.notices(json), **source.opening
    )
    if plot is not None and curve:
        plot_curve(plot, found.curve)
    elif plot is not None:
        plot_spectra(plot, found.sites, found.spectra, found.norms)
    if json:
        console.show_json(found.to_dict())
        return
    console.show_inspection(found)
    if plot is not None:
        console.note(f"plot written to {plot}")


def architectures(
    markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    json: JSON = False,
) -> None:
    """List the supported architectures: their attention blocks, what merges, their MLPs, and the tested models.

    Example: `pessa architectures`
    """
    from pessa_cli.workflow import architectures as table

    if json:
        console.show_json(table.architectures())
    elif markdown:
        console.show_text(table.architectures_table())
    else:
        console.show_architectures(table.architectures())
