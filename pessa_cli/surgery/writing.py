"""Carrying out a rewrite: the place of the output is made sure of before any work, and filled block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.staging import Staging, new_folder
from pessa_cli.common.errors import UsageError
from pessa_cli.common.jobs import one_thread
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.surgery.block_io import StorageLayout
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.output import write_output
from pessa_cli.surgery.rewrite import Ranking, Rewrite
from pessa_cli.surgery.run import Run


def check_layout(model: Model, sites: list[Site], layout: StorageLayout) -> None:
    """Raise UsageError if one of the blocks cannot be stored in this layout."""
    if layout == "compact" and not all(site.spec.compact for site in sites):
        raise UsageError(
            f"{model.reader.folder}: the attention of this model reads its weights directly, and needs them whole",
            "give --layout dense",
        )


def new_rewrite(
    command: str,
    model: Model,
    sites: list[Site],
    ranks: RankPlan,
    spectra: Mapping[str, Spectra],
    rule: str,
    method: Ranking,
    layout: StorageLayout,
    run: Run,
) -> Rewrite:
    """What a command writes, under the name that the user gave the model. Raises UsageError as `check_layout`."""
    check_layout(model, sites, layout)
    source = model.reader.folder.name if run.source is None else run.source
    return Rewrite(command, source, model, sites, ranks, spectra, rule, method, layout, run.shard_bytes)


@contextmanager
def new_output(model: Model, out: Path, run: Run) -> Iterator[Staging]:
    """The folder that becomes `out` at the end; see `checkpoint.staging.new_folder` for what raises."""
    with new_folder(out, model.reader.folder, run.force, run.resume) as staging:
        yield staging


def carry_out(rewrite: Rewrite, staging: Staging, tensors_of: Callable[[Site], Mapping[str, Any]], run: Run) -> None:
    """Write everything into the staging folder; `tensors_of` makes the new tensors of one block, from any thread."""
    total = sum(info.nbytes for info in rewrite.header.values())
    jobs = run.jobs_for(rewrite.sites or rewrite.model.sites)
    with one_thread(), run.progress("writing", total, len(rewrite.sites)) as tick:
        write_output(rewrite, staging, tensors_of, jobs, tick)
