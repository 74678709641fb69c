"""Pruning a model: by a rule, or as much as a limit on its quality allows."""

from __future__ import annotations

from pathlib import Path

from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.passes import prune_model
from pessa_cli.surgery.run import Run
from pessa_cli.workflow.recipe import Recipe
from pessa_cli.workflow.steps import calibrated, check_output, chosen, named, opened
from pessa_cli.workflow.written import WrittenModel


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Rule | Recipe = Rule(),
    run: Run = Run(),
    *,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> WrittenModel:
    """Drop the directions of every head that a rule does not keep, and write the smaller model to the folder `out`.

    model: a folder, a file, or a name on a hub, as for `pessa prune`. recipe: a rule alone, or with the blocks, the
    layout and the calibration data; its field `verify` is ignored here. run: how the work is done, and whether an
    existing `out` is replaced. architecture: treat the model as this `model_type`. revision: branch, tag or commit of a
    model from a hub. allow_pickle: also convert pickled weights.

    Returns what was written, with parameters and bytes before and after. Raises UsageError for options that do not fit
    the model, and PessaError when the model cannot be read, when `out` exists or cannot be written, and for a rule that
    would prune everything.
    """
    if isinstance(recipe, Rule):
        recipe = Recipe(recipe)
    run, out = named(run, model), Path(out)
    with opened(model, architecture, revision, allow_pickle) as found:
        sites, rule, result = chosen(found, recipe), recipe.rule, None
        check_output(out, found, run)
        _check_apart(recipe)
        with calibrated(found, sites, recipe, run, rule if recipe.sequential else None) as known:
            if recipe.evaluate is not None:
                from pessa_cli.evaluation.search import QualityLimit, search  # it imports transformers

                limit = QualityLimit.of(recipe.max_wer_increase, recipe.max_ppl_increase)
                result = search(found, sites, limit, recipe.evaluate, rule, known.statistics, run.progress, run.device)
                rule = result.rule
            rewrite = prune_model(found, out, rule, sites, recipe.method, recipe.layout, run, known.statistics)
        return WrittenModel.of(rewrite, model, out, result, known.warnings)


def _check_apart(recipe: Recipe) -> None:
    """Raise UsageError for data that are both calibrated and scored on, before the minutes that calibration takes."""
    if recipe.evaluate is None or not recipe.calibrate:
        return
    from pessa_cli.evaluation.search import check_apart
    from pessa_cli.models.data import read_data

    check_apart(recipe.evaluate, read_data(recipe.calibrate)[1])
