"""The first steps that several commands share: open the model, select its blocks, collect or read statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import Site, select
from pessa_cli.checkpoint.files import source_name
from pessa_cli.checkpoint.places import check_apart, check_free, check_outside, partial_folder
from pessa_cli.checkpoint.staging import Staging, new_folder
from pessa_cli.common.errors import UsageError
from pessa_cli.common.files import check_writable, is_there
from pessa_cli.ranks.cost import check_budget
from pessa_cli.ranks.plan import Comparison, check_ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.sources.open import open_source
from pessa_cli.statistics.file import Statistics, shortages
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.run import Run
from pessa_cli.workflow.recipe import Recipe

if TYPE_CHECKING:
    from pessa_cli.evaluation.search import SearchResult
    from pessa_cli.models.data import CalibrationData


@dataclass(frozen=True)
class Overview:
    """A model before any work: its blocks, and its size. totals: as in Inspection, with nothing pruned.

    copied: a line for each kind of MLP that has routed experts, which are copied.
    """

    model: str
    model_type: str
    sites: Sequence[Site]
    totals: Mapping[str, Any]
    copied: Sequence[str] = ()


@dataclass(frozen=True)
class TooLittleData:
    """A line for each block that has too little calibration data."""

    lines: list[str]


# Takes what is known before a command is done, so that it can be shown even if the command fails later.
Notify = Callable[["Overview | TooLittleData | Comparison | SearchResult"], None]


def ignore(_notice: Overview | TooLittleData | Comparison | SearchResult) -> None:
    """Do nothing: the notices of a library call are in its result, too."""


@dataclass(frozen=True)
class Known:
    """The calibration statistics of a recipe, with what was read and computed to collect them.

    statistics: None if the recipe uses the weights alone. blocks: a reader that may hold the weights in memory.
    decomposition: of the blocks by these statistics, if it was computed already. warnings: a line for each block that
    has too little calibration data, and one if more data would help. comparison: the plan for the rule's budget, if
    plans could be tried.
    """

    statistics: Statistics | None = None
    blocks: BlockReader | None = None
    decomposition: Decomposition | None = None
    warnings: list[str] = field(default_factory=list)
    comparison: Comparison | None = None


@contextmanager
def opened(
    model: str | Path,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> Iterator[Model]:
    """Open a folder, a file or a name on a hub as a Model; converted copies are deleted after the `with` block.

    Raises PessaError when the model cannot be found, converted or read.
    """
    with open_source(str(model), revision, allow_pickle, follow_links) as folder:
        yield open_model(folder, architecture)


def named(run: Run, model: str | Path) -> Run:
    """Return the run with the model's name, which output files contain; paths on this machine are left out."""
    path = Path(model)
    return replace(run, source=run.source or (source_name(path) if is_there(path) else str(model)))


def chosen(model: Model, recipe: Recipe) -> list[Site]:
    """Return the blocks that a recipe applies to; without `sites` those that its rule is about.

    Raises UsageError if there are none, or if the rule does not fit them, and PessaError for a budget that is smaller
    than what must remain of them.
    """
    of_mlp = recipe.rule.of_mlp
    if of_mlp and not any(isinstance(site, MlpSite) for site in model.sites):
        raise UsageError(
            f"{of_mlp[0].flag}: this model has no MLPs whose channels can be cut",
            f"leave it out; the model has {', '.join(dict.fromkeys(site.kind for site in model.sites))}",
        )
    kinds = recipe.sites or (() if recipe.searches else recipe.rule.kinds)
    sites = select(model.sites, kinds, recipe.layers)
    check_ranks(sites, recipe.rule)
    check_budget(sites, recipe.rule, model.size)
    return sites


def calibration_data(recipe: Recipe) -> CalibrationData | None:
    """Read the calibration data of a recipe, once for the whole command; None without calibration data.

    With `augment`, they are the windows that are made from them. Raises the errors of `read_data` and `augment`.
    """
    if not recipe.calibrate:
        return None
    from pessa_cli.models.data import read_data

    data = read_data(recipe.calibrate)
    if recipe.augment is None:
        return data
    from pessa_cli.calibration.collect import FOLDS
    from pessa_cli.models.augment import augment

    return augment(data, recipe.augment, recipe.augment_seed, FOLDS)


@contextmanager
def rewriting(
    model: str | Path,
    out: Path,
    run: Run,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> Iterator[tuple[Model, Path | Staging]]:
    """Claim the place of an output, and open the model that it is made from.

    Yields the model, and the staging folder that is renamed to `out` after the `with` block; for a dry run `out`
    itself. The place is claimed first, so that an output that cannot be written is noticed before the model is
    downloaded, converted or calibrated. Raises the errors of `checkpoint.staging.new_folder` and of `opened`.
    """
    with ExitStack() as resources:
        place: Path | Staging = out
        if not run.dry:
            sources = [path for path in [Path(model)] if path.exists()]
            place = resources.enter_context(new_folder(out, sources, run.force, run.resume))
        found = resources.enter_context(opened(model, architecture, revision, allow_pickle, follow_links))
        if not run.dry:
            check_apart(out, [found.reader.folder])
        yield found, place


def check_output(model: str | Path, out: Path, run: Run) -> None:
    """Raise PessaError if the output may not be written, before the model is opened."""
    if not run.dry:
        check_free(out, [path for path in [Path(model)] if path.exists()], run.force)


def check_statistics(recipe: Recipe, out: Path) -> None:
    """Raise UsageError if collected statistics would be written to the place of the output, or into it."""
    if not (recipe.calibrate and recipe.statistics):
        return
    file = recipe.statistics[0]
    for taken in (out, partial_folder(out)):
        if taken.resolve() in (file.resolve(), *file.resolve().parents):
            raise UsageError(
                f"--statistics {file} is in the place of the output {out}", "give a file outside of the output"
            )


def need_room(place: Path | Staging, model: Model, sites: Sequence[Site] = ()) -> None:
    """Raise PessaError if the disk has no room for what the output surely has: the model without the given blocks.

    It is asked before the work; how large the pruned blocks are is known, and checked, only after it.
    """
    if isinstance(place, Staging) and not place.finished:
        place.need(model.nbytes - sum(model.reader.header[name].nbytes for site in sites for name in site.tensors))


@contextmanager
def calibrated(
    model: Model,
    sites: Sequence[Site],
    recipe: Recipe,
    run: Run,
    data: CalibrationData | None,
    rule: Rule | None = None,
    notify: Notify = ignore,
) -> Iterator[Known]:
    """Collect or read the statistics of a recipe; their temporary files are deleted after the `with` block.

    data: the result of `calibration_data`. rule: if given, each block is calibrated on the outputs of the blocks before
    it, pruned by this rule. Raises UsageError for options that do not fit the model or one another, and PessaError when
    the statistics cannot be read or collected.
    """
    if data is None and not recipe.statistics and rule is None:
        yield Known()
        return
    from pessa_cli.calibration.collect import calibration_for  # it imports transformers, which takes seconds

    files = recipe.statistics
    if data is not None and files:
        check_writable(files[0], "--statistics", new=True)
        check_outside(files[0], model.reader.folder, "--statistics")
    if run.dry and data is not None:
        files = ()  # nothing is written
    with calibration_for(model, sites, data, files, rule, run, recipe.rule) as found:
        if found is None:
            yield Known()
        else:
            warnings = shortages(found.statistics, sites)
            if warnings:
                notify(TooLittleData(warnings))
            if found.comparison is not None:
                notify(found.comparison)
                warnings += filter(None, [found.comparison.warning])
            yield Known(found.statistics, found.blocks, found.decomposition, warnings, found.comparison)
