"""Writing the output of a command: check the layout, create the staging folder, and fill it block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from pessa_cli.surgery.side_files import output_contents


def check_layout(model: Model, sites: Sequence[Site], layout: StorageLayout) -> None:
    """Raise UsageError if one of the blocks cannot be stored in this layout."""
    if layout == "compact" and not all(site.compact for site in sites):
        raise UsageError(
            f"{model.reader.folder}: this model's attention reads its weight tensors directly, and needs full shapes",
            "give --layout dense",
        )


def new_rewrite(
    command: str,
    model: Model,
    sites: Sequence[Site],
    ranks: RankPlan,
    spectra: Mapping[str, Spectra],
    rule: str,
    method: Ranking,
    layout: StorageLayout,
    run: Run,
) -> Rewrite:
    """Describe the output of a command as a Rewrite; the source is named as in `run.source`, or else by its folder.

    Raises UsageError if a block cannot be stored in this layout, and PessaError as `side_files.output_contents` does.
    """
    check_layout(model, sites, layout)
    contents = output_contents(model.reader, run.unknown_weights)
    source = model.reader.folder.name if run.source is None else run.source
    return Rewrite(
        command, source, model, sites, ranks, spectra, rule, method, layout, run.shard_bytes, contents=contents
    )


@contextmanager
def new_output(model: Model, out: Path | Staging, run: Run) -> Iterator[Staging]:
    """Create the staging folder that is renamed to `out` at the end of the `with` block.

    `out` may also be a staging folder that the caller has created, and puts in place itself. Raises PessaError as
    `checkpoint.staging.new_folder` does: when `out` exists, is the source, or cannot be written.
    """
    if isinstance(out, Staging):
        yield out
        return
    with new_folder(out, [model.reader.folder], run.force, run.resume) as staging:
        yield staging


def carry_out(rewrite: Rewrite, staging: Staging, tensors_of: Callable[[Site], Mapping[str, Any]], run: Run) -> None:
    """Write the output into the staging folder, with a progress bar.

    tensors_of: returns the new tensors of one block by name; it is called from several threads.
    """
    total = sum(info.nbytes for info in rewrite.header.values())
    jobs = run.jobs_for(rewrite.sites or rewrite.model.sites)
    with one_thread(), run.progress("writing", total, len(rewrite.sites)) as tick:
        write_output(rewrite, staging, tensors_of, jobs, tick)
