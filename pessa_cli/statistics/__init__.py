"""Calibration statistics of attention blocks: the sums, their file, and the weightings that follow from them."""

from __future__ import annotations

from pessa_cli.statistics.file import (
    CollectedStatistics,
    SavedStatistics,
    Statistics,
    data_sha256,
    files_of,
    fingerprint,
    save_statistics,
    shortages,
)
from pessa_cli.statistics.sums import NAMES, BlockStatistics, shapes_of
from pessa_cli.statistics.weighing import Refit, Weighed, kept_directions, refit_moment, weigh

__all__ = [
    "NAMES",
    "BlockStatistics",
    "CollectedStatistics",
    "Refit",
    "SavedStatistics",
    "Statistics",
    "Weighed",
    "data_sha256",
    "files_of",
    "fingerprint",
    "kept_directions",
    "refit_moment",
    "save_statistics",
    "shapes_of",
    "shortages",
    "weigh",
]
