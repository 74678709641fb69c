"""Decomposing or pruning a model in two passes: decompose every block, then cut the blocks and write the output.

Only the blocks that are being computed are in memory. All ranks are planned before the first byte is written, because
the header of a safetensors file contains the shapes. Tensors outside of the blocks are copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from pessa_cli.blocks.site import Site, select
from pessa_cli.checkpoint.staging import Staging
from pessa_cli.common.errors import UsageError
from pessa_cli.ranks.budget import predicted, ranks_for
from pessa_cli.ranks.plan import Comparison, RankPlan, check_ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.ranks.work import work_of
from pessa_cli.statistics.file import Statistics, augmentation_of, data_sha256
from pessa_cli.surgery.block_io import StorageLayout
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of, measure
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.rewrite import Ranking, Rewrite
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.writing import carry_out, check_layout, new_output, new_rewrite


def decompose_model(
    model: Model,
    out: Path | Staging,
    sites: Sequence[Site] | None = None,
    run: Run | None = None,
    statistics: Statistics | None = None,
    *,
    blocks: BlockReader | None = None,
    decomposition: Decomposition | None = None,
) -> Rewrite:
    """Write the model with blocks as balanced factors at full rank or with ordered channels, and with their spectra.

    All tensors keep their names and shapes. sites: by default all attention blocks. out, blocks, decomposition: as in
    `prune_model`, which also lists the
    errors.
    """
    run, sites = run or Run(), model.attention if sites is None else sites
    plan = RankPlan.full(sites)

    def planned(spectra: Mapping[str, Spectra]) -> Rewrite:
        rewrite = new_rewrite("decompose", model, sites, plan, spectra, "full rank", "svd", "dense", run)
        return rewrite if statistics is None else _calibrated(rewrite, statistics)

    return _two_passes(planned, model, out, sites, "svd", "dense", run, statistics, blocks, decomposition)


def prune_model(
    model: Model,
    out: Path | Staging,
    rule: Rule,
    sites: Sequence[Site] | None = None,
    method: Ranking = "svd",
    layout: StorageLayout = "compact",
    run: Run | None = None,
    statistics: Statistics | None = None,
    *,
    blocks: BlockReader | None = None,
    decomposition: Decomposition | None = None,
    comparison: Comparison | None = None,
) -> Rewrite:
    """Write the model with only what the rule keeps, and return the description of the output.

    out: the folder to write, or a staging folder that the caller puts in place. sites: by default those that the rule
    is about. statistics: if given, directions and channels are ranked by their effect on the calibration data, and the
    matrix that reads them is refitted to the kept ones; otherwise they are ranked by the weights alone. Blocks that are
    already stored as balanced factors or ordered channels (by `decompose` or an earlier `prune`) are only sliced, with
    the same bytes as a result. blocks: a reader that may hold the weights already. decomposition: that of these blocks
    with these statistics, if it was computed already. comparison: the plan, if trials have chosen it; by default it is
    that of the rule. Raises UsageError for options that do not fit the model or one another, and PessaError when the
    output cannot be written, when weights are not finite, or when the rule would prune everything.
    """
    run, sites = run or Run(), select(model.sites, rule.kinds) if sites is None else sites
    check_ranks(sites, rule)
    if method == "vanilla" and statistics is not None:
        raise UsageError("--method vanilla uses the weights alone", "leave out the data, or the method")
    if method == "vanilla" and any(site.name in model.spectra for site in sites):
        raise UsageError(
            f"{model.reader.folder} is already decomposed: it no longer has the original dimensions of its heads",
            "give --method vanilla the original model",
        )

    def planned(spectra: Mapping[str, Spectra]) -> Rewrite:
        compared = predicted(sites, spectra, rule, model.size) if comparison is None else comparison
        plan = ranks_for(sites, spectra, rule, model.size) if compared is None else compared.plan
        known = any(found.calibrated for found in spectra.values())
        ranking: Ranking = "calibrated" if known else method
        rewrite = new_rewrite("prune", model, sites, plan, spectra, str(rule), ranking, layout, run)
        work = work_of(sites, plan, rule, model.size)
        rewrite = replace(rewrite, compared=None if compared is None else compared.to_dict(), work=work)
        return rewrite if statistics is None else _calibrated(rewrite, statistics)

    return _two_passes(planned, model, out, sites, method, layout, run, statistics, blocks, decomposition)


def _calibrated(rewrite: Rewrite, statistics: Statistics) -> Rewrite:
    data, sequential = data_sha256(statistics), statistics.sequential
    augmented = augmentation_of(statistics.data)
    return replace(rewrite, method="calibrated", data=data, sequential=sequential, augmented=augmented)


def _two_passes(
    planned: Callable[[Mapping[str, Spectra]], Rewrite],
    model: Model,
    out: Path | Staging,
    sites: Sequence[Site],
    ranking: Ranking,
    layout: StorageLayout,
    run: Run,
    statistics: Statistics | None,
    blocks: BlockReader | None,
    decomposition: Decomposition | None,
) -> Rewrite:
    """Decompose the blocks, plan the ranks from their spectra, and write the output; a dry run only plans."""
    check_layout(model, sites, layout)
    if run.dry:
        if decomposition is not None:
            return planned(decomposition.spectra)
        return planned(measure(model, sites, ranking, run, statistics, blocks=blocks))
    with ExitStack() as resources:
        staging = resources.enter_context(new_output(model, out, run))
        found = decomposition
        if found is None:
            found = resources.enter_context(decomposition_of(model, run, blocks, staging.folder))
            found.decompose(sites, statistics, ranking)
        cut, rewrite = found.cut, planned(found.spectra)
        carry_out(rewrite, staging, lambda site: cut(rewrite.ranks.kept(site), rewrite.layout), run)
    return rewrite
