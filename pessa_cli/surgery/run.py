"""How a pass is carried out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.surgery.rewrite import SHARD_BYTES

IN_FLIGHT = 400 * 10**6  # bytes of float64 weights in work at a time, if that leaves one block at least


@dataclass(frozen=True)
class Run:
    """How a pass is carried out; nothing here changes a byte of the output but `device` and `shard_bytes`.

    source: what the user called the model. force: replace an existing model. resume: go on with a killed run's
    shards. jobs: blocks worked on at the same time, at most. dry: plan only. device: where the algebra runs.
    """

    source: str | None = None
    force: bool = False
    resume: bool = False
    dry: bool = False
    jobs: int = 0  # 0: one a core
    device: str = "cpu"
    shard_bytes: int = SHARD_BYTES
    progress: Progress = quietly

    def __post_init__(self) -> None:
        if self.jobs < 0:
            raise UsageError(f"--jobs {self.jobs} is no number of jobs", "give 1 or more, or leave it out")
        if self.shard_bytes < 1:
            raise UsageError(f"--max-shard-size {self.shard_bytes} is no size", "write it as 5GB or 500MB")
        try:
            torch.zeros(1, dtype=torch.float64, device=self.device)
        except (RuntimeError, AssertionError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UsageError(f"--device {self.device} cannot be used: {reason}", "give cpu, or leave it out") from None

    def jobs_for(self, sites: Sequence[Site]) -> int:
        largest = max(8 * _count(site) for site in sites)
        return max(1, min(self.jobs or os.cpu_count() or 1, IN_FLIGHT // largest))


def _count(site: Site) -> int:
    return site.head_dim * (site.heads * (site.query_width + site.output_width) + 2 * site.kv_heads * site.key_width)
