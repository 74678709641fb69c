"""Writing a model in decomposed form, at full rank."""

from __future__ import annotations

from pathlib import Path

from pessa_cli.surgery.prune import decompose_model
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.side_files import output_contents
from pessa_cli.workflow.recipe import Recipe
from pessa_cli.workflow.steps import (
    Notify,
    calibrated,
    calibration_data,
    check_statistics,
    chosen,
    ignore,
    named,
    need_room,
    rewriting,
)
from pessa_cli.workflow.written import WrittenModel


def decompose(
    model: str | Path,
    out: str | Path,
    recipe: Recipe = Recipe(),
    run: Run = Run(),
    *,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
    notify: Notify = ignore,
) -> WrittenModel:
    """Write the model to `out` with every head as balanced factors and sorted channels, and with its spectra.

    The result computes the same function with tensors of the same names and shapes; pruning it needs no further SVD.

    model: a folder, a file, or a name on a hub. recipe: its fields `sites`, `layers`, `calibrate` and `statistics` are
    used. run: how the work is done, and whether an existing `out` is replaced. architecture: treat the model as this
    `model_type`. revision: branch, tag or commit of a model from a hub. allow_pickle: also convert
    pickled weights. follow_links: also read files outside of the model's folder that links in it lead to.
    notify: is called before the writing with what is known by then: blocks with too little calibration data, and the
    result of a search.

    Returns the description of the output. Raises UsageError for options that do not fit the model, and PessaError when
    the model cannot be read, and when `out` exists or cannot be written.
    """
    run, out = named(run, model), Path(out)
    check_statistics(recipe, out)
    with rewriting(model, out, run, architecture, revision, allow_pickle, follow_links) as (found, place):
        sites = chosen(found, recipe)
        need_room(place, found)
        output_contents(found.reader, run.unknown_weights)  # its errors come before calibration
        with calibrated(found, sites, recipe, run, calibration_data(recipe), notify=notify) as known:
            rewrite = decompose_model(
                found, place, sites, run, known.statistics, blocks=known.blocks, decomposition=known.decomposition
            )
        return WrittenModel.of(rewrite, model, out, warnings=known.warnings)
