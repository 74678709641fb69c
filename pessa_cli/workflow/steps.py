"""The steps that several commands begin with: open the model, choose its blocks, collect or read statistics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pessa_cli.blocks.site import Site, select
from pessa_cli.checkpoint.staging import check_free
from pessa_cli.common.errors import UsageError
from pessa_cli.ranks.rule import Rule
from pessa_cli.sources.open import open_source
from pessa_cli.statistics.file import Statistics, shortages
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.run import Run
from pessa_cli.workflow.recipe import Recipe

if TYPE_CHECKING:
    from pessa_cli.models.data import CalibrationData


@dataclass(frozen=True)
class Known:
    """What is known of the blocks before they are pruned.

    statistics: None where the recipe uses the weights alone. blocks, decomposition: what collecting the statistics has
    read and decomposed already, for `surgery.prune`. warnings: a line for each block that has too little data.
    """

    statistics: Statistics | None = None
    blocks: BlockReader | None = None
    decomposition: Decomposition | None = None
    warnings: list[str] = field(default_factory=list)


@contextmanager
def opened(
    model: str | Path, architecture: str | None = None, revision: str | None = None, allow_pickle: bool = False
) -> Iterator[Model]:
    """A model, by whatever name the user has for it; a converted copy lives as long as the `with` block."""
    with open_source(str(model), revision, allow_pickle) as folder:
        yield open_model(folder, architecture)


def named(run: Run, model: str | Path) -> Run:
    """The run with the model's name for the files of the output: without the path on this machine."""
    path = Path(model)
    return replace(run, source=run.source or (path.resolve().name if path.exists() else str(model)))


def chosen(model: Model, recipe: Recipe) -> list[Site]:
    """The blocks that a recipe applies to. Raises UsageError when there are none."""
    return select(model.sites, recipe.sites, recipe.layers)


def calibration_data(recipe: Recipe) -> CalibrationData | None:
    """The calibration data of a recipe, read once for the whole command; None where there are none."""
    if not recipe.calibrate:
        return None
    from pessa_cli.models.data import read_data

    return read_data(recipe.calibrate)


def check_output(out: Path, model: Model, run: Run) -> None:
    """Raise PessaError for an output that may not be written, before the minutes that calibration may take."""
    if not run.dry:
        check_free(out, model.reader.folder, run.force)


@contextmanager
def calibrated(
    model: Model,
    sites: list[Site],
    recipe: Recipe,
    run: Run,
    data: CalibrationData | None,
    rule: Rule | None = None,
) -> Iterator[Known]:
    """The statistics of a recipe, read or collected; what they hold on disk is there as long as the `with` block.

    data: from `calibration_data`. With `rule` each block is calibrated on the outputs of the pruned blocks before it.
    """
    if data is None and not recipe.statistics and rule is None:
        yield Known()
        return
    from pessa_cli.calibration.collect import calibration_for  # it imports transformers, which takes seconds

    files = recipe.statistics
    if data is not None and files and not files[0].resolve().parent.is_dir():
        raise UsageError(f"--statistics {files[0]}: {files[0].parent} is not a folder", "create it first")
    with calibration_for(model, sites, data, files, rule, run) as found:
        if found is None:
            yield Known()
        else:
            warnings = shortages(found.statistics, sites)
            yield Known(found.statistics, found.blocks, found.decomposition, warnings)
