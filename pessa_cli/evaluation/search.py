"""The smallest model within a limit on its quality: budgets tried one after the other on the model in memory.

Blocks are decomposed once; each trial cuts them to other ranks and scores the model again.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.evaluate import EvaluationData, fitting, prepare
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.models.data import read_data
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import Statistics
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.passes import Cuts, measure
from pessa_cli.surgery.scratch import Spool

STEPS = 7  # halvings of the range, down to less than a hundredth of the attention


@dataclass(frozen=True)
class QualityLimit:
    """How much worse a model may get: `kind` of data as in evaluate.Data, and the increase, relative or not."""

    kind: str
    increase: float
    relative: bool = False

    def above(self, original: float) -> float:
        """The largest value that is within it."""
        return original * (1 + self.increase) if self.relative else original + self.increase

    @staticmethod
    def of(max_wer_increase: float | None, max_ppl_increase: str | None) -> QualityLimit:
        """What one of the options says: points of word error rate, or perplexity, as 1% or as 0.2."""
        if max_ppl_increase is None:
            points = max_wer_increase or 0.0
            if not 0 <= points < math.inf:
                raise UsageError(f"--max-wer-increase {points} is no increase", "give points, as 0.5")
            return QualityLimit("speech", points / 100)
        if max_wer_increase is not None:
            raise UsageError("--max-wer-increase and --max-ppl-increase are for different models", "give one of them")
        match = re.fullmatch(r"(\d+(?:\.\d+)?|\.\d+)(%?)", max_ppl_increase)
        if match is None:
            raise UsageError(f"--max-ppl-increase {max_ppl_increase} is no increase", "write it as 1% or 0.2")
        return QualityLimit("text", float(match[1]) / (100 if match[2] else 1), bool(match[2]))


@dataclass(frozen=True)
class SearchResult:
    """The rule to prune by, and what was tried: shares of the attention kept, and what the model was worth then."""

    rule: Rule
    metric: str
    original: float
    limit: float
    tried: Sequence[tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        tried = [{"target_attention": share, "value": value} for share, value in self.tried]
        return {"metric": self.metric, "original": self.original, "limit": self.limit, "tried": tried}


def search(
    model: Model,
    sites: list[Site],
    limit: QualityLimit,
    data: Path,
    rule: Rule,
    statistics: Statistics | None = None,
    progress: Progress = quietly,
    device: str = "cpu",
) -> SearchResult:
    """Find the smallest budget of attention that keeps a model within a limit on `data`, by halving the range.

    `rule` gives round_to and min_rank. Raises UsageError for data that do not fit the model or that the model was
    calibrated on, PessaError when nothing at all may go.
    """
    if limit.kind not in fitting(model):
        flag = {"speech": "--max-wer-increase", "text": "--max-ppl-increase"}[limit.kind]
        fit = " and ".join(fitting(model)) or "nothing"
        raise UsageError(f"{flag}: {model.reader.folder} cannot be scored on {limit.kind}", f"it is scored on {fit}")
    with quiet_transformers():
        on = EvaluationData(speech=data) if limit.kind == "speech" else EvaluationData(text=data)
        (scorer,) = prepare(model, on, ScoreSettings(device=device))[limit.kind]
        check_apart(data, [] if statistics is None else statistics.data)
        loaded = load(model).to(device)
        first = scorer.score(loaded, progress)
        most = limit.above(first.value)
        low, high, tried = 0.0, 1.0, list[tuple[float, float]]()
        with tempfile.TemporaryDirectory() as folder, Spool(Path(folder)) as spool, torch.no_grad():
            spectra = measure(model, sites, spool=spool, statistics=statistics)
            cuts = Cuts(model, spool, statistics)
            for _ in range(STEPS):
                share = (low + high) / 2
                try:
                    plan = ranks_for(sites, spectra, replace(rule, target_attention=share), model.size)
                except PessaError:  # so small it cannot get
                    low = share
                    continue
                for site in sites:
                    set_block(loaded, site, cuts.tensors(site, plan.kept(site)))
                tried.append((share, scorer.score(loaded, progress).value))
                low, high = (low, share) if tried[-1][1] <= most else (share, high)
    if high == 1.0:
        best = min((value for _, value in tried), default=first.value)
        raise PessaError(
            f"the {first.metric} of {model.reader.folder} is {first.value:.4g}, and {best:.4g} once anything is cut",
            f"allow more than {most:.4g}, or calibrate on more data: --calibrate",
        )
    return SearchResult(replace(rule, target_attention=high), first.metric, first.value, most, tried)


def check_apart(evaluation: Path, calibration: Sequence[str]) -> None:
    """Raise UsageError when data to score on are among those, by SHA-256, that a model was calibrated on."""
    if set(read_data([evaluation])[1]) & set(calibration):
        raise UsageError(f"--evaluate {evaluation}: some of it is calibrated on", "give other data to one of them")
