"""The settings of a run that do not belong to the recipe: threads, device, shard size, and where it continues."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from pessa_cli.blocks.site import Site, count
from pessa_cli.common.errors import UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import shortened
from pessa_cli.common.values import check_device
from pessa_cli.surgery.rewrite import SHARD_BYTES
from pessa_cli.surgery.side_files import UnknownWeights

IN_FLIGHT = 400 * 10**6  # bytes of float64 weights computed at the same time; one block is always allowed


@dataclass(frozen=True)
class Run:
    """How a command is carried out; only `device` and `shard_bytes` can change the bytes of the output.

    source: the name that the user gave the model; by default that of its folder. force: replace an output of pessa to
    which nothing was added. resume: continue with the shards that a killed run has finished. dry: only plan, and write
    nothing. jobs: the largest number of blocks computed at the same time, 0 for one per core. device: of the
    computations, as torch names it. shard_bytes: the largest size of one file of weights. unknown_weights: what is done
    with files of weights of which the names do not tell whether they belong to the model. progress: reports the work
    that was done.

    Raises UsageError for values that cannot be used.
    """

    source: str | None = None
    force: bool = False
    resume: bool = False
    dry: bool = False
    jobs: int = 0
    device: str = "cpu"
    shard_bytes: int = SHARD_BYTES
    unknown_weights: UnknownWeights = "refuse"
    progress: Progress = quietly

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise UsageError(f"--jobs {self.jobs} is less than 0", "give 1 or more, or 0 for one per core")
        if self.shard_bytes < 1:
            raise UsageError(f"--max-shard-size {self.shard_bytes} is less than 1 byte", "give a size such as 5GB")
        if self.unknown_weights not in get_args(UnknownWeights):
            choices = ", ".join(get_args(UnknownWeights))
            raise UsageError(f"--unknown-weights {shortened(self.unknown_weights)} is not known", f"give {choices}")
        check_device(self.device, "float64")

    def jobs_for(self, sites: Sequence[Site]) -> int:
        """Return how many of these blocks may be computed at the same time."""
        largest = max(8 * count(site.in_full().tensors) for site in sites)
        return max(1, min(self.jobs or os.cpu_count() or 1, IN_FLIGHT // largest))
