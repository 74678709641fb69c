"""Comparing two models (verify), scoring models on data (eval), timing them (bench), and the search for a budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.evaluation.bench import Bench as Bench
    from pessa_cli.evaluation.bench import BenchSettings as BenchSettings
    from pessa_cli.evaluation.bench import bench_models as bench_models
    from pessa_cli.evaluation.evaluate import EvaluationData as EvaluationData
    from pessa_cli.evaluation.evaluate import EvaluationItems as EvaluationItems
    from pessa_cli.evaluation.evaluate import Scores as Scores
    from pessa_cli.evaluation.evaluate import evaluate_models as evaluate_models
    from pessa_cli.evaluation.evaluate import split_adapter as split_adapter
    from pessa_cli.evaluation.figures import Figure as Figure
    from pessa_cli.evaluation.limits import VerifyOptions as VerifyOptions
    from pessa_cli.evaluation.measures import ScoreSettings as ScoreSettings
    from pessa_cli.evaluation.report import Report as Report
    from pessa_cli.evaluation.search import QualityLimit as QualityLimit
    from pessa_cli.evaluation.search import SearchResult as SearchResult
    from pessa_cli.evaluation.search import check_apart as check_apart
    from pessa_cli.evaluation.search import read_quality_data as read_quality_data
    from pessa_cli.evaluation.verify import verify_folder as verify_folder
    from pessa_cli.evaluation.verify import verify_models as verify_models
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "bench": ["Bench", "BenchSettings", "bench_models"],
            "evaluate": ["EvaluationData", "EvaluationItems", "Scores", "evaluate_models", "split_adapter"],
            "figures": ["Figure"],
            "limits": ["VerifyOptions"],
            "measures": ["ScoreSettings"],
            "report": ["Report"],
            "search": ["QualityLimit", "SearchResult", "check_apart", "read_quality_data"],
            "verify": ["verify_folder", "verify_models"],
        },
    )
