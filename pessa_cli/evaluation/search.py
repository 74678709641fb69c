"""Search for the smallest budget of the chosen blocks that keeps a model's quality within a limit, by bisection.

The model stays in memory and its blocks are decomposed once. Each trial cuts the blocks to the ranks of one budget and
scores the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed
from pessa_cli.evaluation.evaluate import EvaluationData, EvaluationItems, fitting, prepare, read_items
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.models.dense import dense_model
from pessa_cli.models.hooks import block_modules
from pessa_cli.models.load import quiet_transformers
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.cost import UnmetBudgetError
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import Statistics, files_of
from pessa_cli.surgery.decomposition import Decomposition
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.run import Run

STEPS = 7  # bisections of the range of shares, to less than 1% of the chosen blocks


@dataclass(frozen=True)
class QualityLimit:
    """The largest allowed increase of a metric, absolute or relative. `kind` of data: a name in EvaluationData."""

    kind: str
    increase: float
    relative: bool = False

    def above(self, original: float) -> float:
        """The largest allowed value of the metric, given the value of the original model."""
        return original * (1 + self.increase) if self.relative else original + self.increase

    @staticmethod
    def of(max_wer_increase: float | None, max_ppl_increase: str | None) -> QualityLimit:
        """Parse the options: percentage points of word error rate, or perplexity as "1%" (relative) or "0.2".

        Raises UsageError when both are given, and for values that are not increases.
        """
        if max_ppl_increase is None:
            points = max_wer_increase or 0.0
            if not 0 <= points < math.inf:
                raise UsageError(
                    f"--max-wer-increase {points} is not an increase",
                    "give percentage points of 0 or more, for example 0.5",
                )
            return QualityLimit("speech", points / 100)
        if max_wer_increase is not None:
            raise UsageError(
                "--max-wer-increase is for speech models and --max-ppl-increase for language models",
                "give only one of them",
            )
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", max_ppl_increase)
        if match is None:
            raise UsageError(f"--max-ppl-increase {max_ppl_increase} is not an increase", "write it as 1% or 0.2")
        return QualityLimit("text", float(match[1]) / (100 if match[2] else 1), bool(match[2]))


@dataclass(frozen=True)
class SearchResult:
    """The rule to prune by, and the trials: the share of the chosen blocks kept, and the metric of the model then.

    original: the metric of the unpruned model. limit: its largest allowed value.
    """

    rule: Rule
    metric: str
    original: float
    limit: float
    tried: Sequence[tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        tried = [{"target_layers": share, "value": value} for share, value in self.tried]
        return {"metric": self.metric, "original": self.original, "limit": self.limit, "tried": tried}


def search(
    model: Model,
    sites: Sequence[Site],
    limit: QualityLimit,
    items: EvaluationItems,
    rule: Rule,
    decomposition: Decomposition,
    statistics: Statistics | None,
    run: Run,
) -> SearchResult:
    """Find the smallest share of the chosen blocks that keeps a model within a limit, by bisection.

    items: the evaluation data, from `read_quality_data`. rule: gives round_to and min_rank. decomposition: takes up the
    blocks, as `statistics` weigh them, and can be used to write the result. Raises UsageError for data that the model
    was calibrated on, PessaError when every trial exceeds the limit.
    """
    with ExitStack() as resources:
        resources.enter_context(quiet_transformers())
        (scorer,) = prepare(model, items, ScoreSettings(device=run.device)).measures[limit.kind]
        check_apart(items, [] if statistics is None else statistics.data)
        loaded = resources.enter_context(dense_model(model)).to(run.device)
        first = scorer.score(loaded, run.progress)
        most = limit.above(first.value)
        low, high, tried = 0.0, 1.0, list[tuple[float, float]]()
        decomposition.decompose(sites, statistics)
        modules = block_modules(sites, loaded)
        with torch.no_grad():
            for _ in range(STEPS):
                share = (low + high) / 2
                try:
                    plan = ranks_for(sites, decomposition.spectra, replace(rule, target_layers=share), model.size)
                except UnmetBudgetError:  # the budget is below the smallest possible size
                    low = share
                    continue
                for site in sites:
                    set_block(site, modules[site.name], decomposition.cut(plan.kept(site), "dense"))
                tried.append((share, scorer.score(loaded, run.progress).value))
                low, high = (low, share) if tried[-1][1] <= most else (share, high)
    if high == 1.0:
        best = min((value for _, value in tried), default=first.value)
        raise PessaError(
            f"the {first.metric} of {model.reader.folder} is {first.value:.4g}, and at least {best:.4g} in every trial",
            f"allow more than {most:.4g}, or calibrate on more data: --calibrate",
        )
    return SearchResult(replace(rule, target_layers=high), first.metric, first.value, most, tried)


def read_quality_data(model: Model, limit: QualityLimit, path: Path) -> EvaluationItems:
    """Read the evaluation data of a search, once for the whole command.

    Raises UsageError when the model cannot be scored on this kind of data, PessaError when the file cannot be read.
    """
    if limit.kind not in fitting(model):
        flag = {"speech": "--max-wer-increase", "text": "--max-ppl-increase"}[limit.kind]
        fit = " and ".join(fitting(model)) or "nothing"
        raise UsageError(
            f"{flag}: {model.reader.folder} cannot be scored on {limit.kind}", f"it can be scored on {fit}"
        )
    data = EvaluationData(speech=path) if limit.kind == "speech" else EvaluationData(text=path)
    return read_items(data, ScoreSettings())


def check_apart(items: EvaluationItems, calibration: Sequence[str]) -> None:
    """Raise UsageError when a file of the evaluation data is, by its SHA-256, also calibration data.

    calibration: the identities of the calibration data, which begin with the SHA-256 of its files.
    """
    files = files_of(calibration)
    common = [str(path) for sha256, path in items.files.items() if sha256 in files]
    if common:
        raise UsageError(
            f"{len(common)} of {len(items.files)} files of --evaluate are also calibrated on\n{listed(common)}",
            "give other data to --evaluate or to --calibrate",
        )
