"""Pruning a model by a rule, or as far as a limit on its loss of quality allows."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.decomposition import decomposition_of
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.prune import prune_model
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

if TYPE_CHECKING:
    from pessa_cli.evaluation.evaluate import EvaluationItems
    from pessa_cli.evaluation.search import QualityLimit
    from pessa_cli.models.data import CalibrationData


def prune(
    model: str | Path,
    out: str | Path,
    recipe: Rule | Recipe = Rule(),
    run: Run = Run(),
    *,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
    notify: Notify = ignore,
) -> WrittenModel:
    """Drop the directions and channels that a rule does not keep, and write the smaller model to the folder `out`.

    model: a folder, a file, or a name on a hub, as for `pessa prune`. recipe: a rule, or a Recipe with the blocks, the
    layout and the calibration data; its field `verify` is not used here. run: how the work is done, and whether an
    existing `out` is replaced. architecture: treat the model as this `model_type`. revision: branch, tag or commit of a
    model from a hub. allow_pickle: also convert pickled weights. follow_links: also read files outside of the model's
    folder that links in it lead to.
    notify: is called before the writing with what is known by then: blocks with too little calibration data, and the
    result of a search.

    Returns the description of the output, with parameters and bytes before and after. Raises UsageError for options
    that do not fit the model, and PessaError when the model cannot be read, when `out` exists or cannot be written, or
    when the rule would prune everything.
    """
    if isinstance(recipe, Rule):
        recipe = Recipe(recipe)
    run, out = named(run, model), Path(out)
    check_statistics(recipe, out)
    with rewriting(model, out, run, architecture, revision, allow_pickle, follow_links) as (found, place):
        sites, rule, result = chosen(found, recipe), recipe.rule, None
        need_room(place, found, sites)
        output_contents(found.reader, run.unknown_weights)  # its errors come before calibration
        data = calibration_data(recipe)
        quality = None if recipe.evaluate is None else _quality(found, recipe, recipe.evaluate, data)
        with ExitStack() as resources:
            in_sequence = rule if recipe.sequential else None
            known = resources.enter_context(calibrated(found, sites, recipe, run, data, in_sequence, notify))
            statistics, decomposition = known.statistics, known.decomposition
            if quality is not None:
                from pessa_cli.evaluation.search import search

                decomposition = resources.enter_context(decomposition_of(found, run, known.blocks, reuse=True))
                result = search(found, sites, *quality, rule, decomposition, statistics, run)
                rule = result.rule
                notify(result)
            rewrite = prune_model(
                *(found, place, rule, sites, recipe.method, recipe.layout, run, statistics),
                blocks=known.blocks,
                decomposition=decomposition,
                comparison=known.comparison,
            )
        return WrittenModel.of(rewrite, model, out, result, known.warnings)


def _quality(
    model: Model, recipe: Recipe, path: Path, data: CalibrationData | None
) -> tuple[QualityLimit, EvaluationItems]:
    """Return the limit of a search, and the data to score models on.

    Raises UsageError if the calibration data contain the same data, or if the model cannot be scored on them.
    """
    from pessa_cli.evaluation.search import QualityLimit, check_apart, read_quality_data  # it imports transformers

    limit = QualityLimit.of(recipe.max_wer_increase, recipe.max_ppl_increase)
    items = read_quality_data(model, limit, path)
    check_apart(items, [] if data is None else data.identities)
    return limit, items
