"""The memory that calibration needs, and how much of it is free."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from pessa_cli.blocks.site import Site, count
from pessa_cli.checkpoint.dtypes import ITEM_BYTES
from pessa_cli.statistics.sums import shapes_of
from pessa_cli.surgery.model import Model

WORK = 7  # the largest number of sets of sums, in bytes, that the decomposition of a block takes; measured on MLPs
CALLS = 0.25  # the share of the free memory that trial cuts may use for the recorded calls of blocks


@dataclass(frozen=True)
class Needs:
    """The bytes that calibration needs.

    weights: of the float32 model. copies: of the chosen blocks, for the trial cuts: as they are stored, as factors, and
    in a copy of the model's block. statistics: one set of sums, in float64; largest: of the block that has most.
    """

    weights: int
    copies: int
    statistics: int
    largest: int

    @property
    def in_memory(self) -> int:
        """The bytes for calibration with the whole model in memory, with trial cuts, for which there are two sums."""
        return math.ceil((self.weights + self.copies + 2 * self.statistics + WORK * self.largest) / (1 - CALLS))

    @property
    def in_groups(self) -> int:
        """The bytes for calibration with the whole model in memory and the sums of one block at a time."""
        return math.ceil((self.weights + self.copies + (2 + WORK) * self.largest) / (1 - CALLS))

    @property
    def on_disk(self) -> int:
        """The bytes for calibration with the weights read from disk block by block; there are no trial cuts."""
        return 2 * self.statistics + WORK * self.largest

    @property
    def on_device(self) -> int:
        """The bytes on the device on which the model runs."""
        return self.weights + self.copies + 2 * self.statistics


def needs(model: Model, sites: Sequence[Site]) -> Needs:
    """Estimate the memory for the calibration of the given blocks, apart from the inputs and attention weights.

    One block is decomposed at a time in this estimate, which is so for large ones; see `Run.jobs_for`.
    """
    cut = sum(count(site.in_full().tensors) - count(site.tensors) for site in model.sites)
    dense = {site.name: count(site.in_full().tensors) for site in sites}
    return Needs(
        weights=4 * (model.parameters + cut),
        copies=sum(dense[site.name] * (4 + 2 * ITEM_BYTES[site.dtype]) for site in sites),
        statistics=sum(map(sums_of, sites)),
        largest=max(map(sums_of, sites), default=0),
    )


def sums_of(site: Site) -> int:
    """Return the bytes of one set of sums of a block."""
    return sum(8 * math.prod(shape) for shape in shapes_of(site).values())


def free_memory() -> int | None:
    """Return the free memory of this machine in bytes, or None where the system does not tell.

    Linux tells what can be used without swapping. Other systems tell all of their memory, which is an upper bound.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def free_on(device: str) -> int | None:
    """Return the free memory of a CUDA device in bytes; None for other devices."""
    return torch.cuda.mem_get_info(device)[0] if torch.device(device).type == "cuda" else None
