"""Calibration statistics of blocks: the sums, their file, and the weightings that follow from them."""

from __future__ import annotations

from pessa_cli.statistics.file import (
    CollectedStatistics,
    SavedStatistics,
    Statistics,
    augmentation_of,
    augmented_identity,
    data_sha256,
    files_of,
    fingerprint,
    save_statistics,
    shortages,
)
from pessa_cli.statistics.sums import (
    AttentionStatistics,
    BlockStatistics,
    MlpStatistics,
    input_moment,
    shapes_of,
    statistics_of,
)
from pessa_cli.statistics.weighing import (
    ChannelRefit,
    Refit,
    Weighed,
    channel_refit,
    kept_directions,
    output_root,
    refit_moment,
    weigh,
)

__all__ = [
    "AttentionStatistics",
    "BlockStatistics",
    "ChannelRefit",
    "CollectedStatistics",
    "MlpStatistics",
    "Refit",
    "SavedStatistics",
    "Statistics",
    "Weighed",
    "augmentation_of",
    "augmented_identity",
    "channel_refit",
    "data_sha256",
    "files_of",
    "fingerprint",
    "input_moment",
    "kept_directions",
    "output_root",
    "refit_moment",
    "save_statistics",
    "shapes_of",
    "shortages",
    "statistics_of",
    "weigh",
]
