"""The partition of pruned heads into buckets of equal width, at the lowest measured cost of the attention kernel.

The kernel needs the same width in all heads of a call, but pruned heads have different widths. So the heads are
partitioned into a few buckets, each as wide as its widest head, rounded up to a multiple of 8. This module is plain
arithmetic without torch. It also holds the setting of the backend that runs compact models.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.common.errors import UsageError

MULTIPLE = 8  # widths are multiples of this, the alignment that kernels need on every device
Backend = Literal["auto", "scatter", "bucketed"]
_backend: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """Set how this process runs compact models from now on.

    "scatter": every head has slots of the original head_dim, with zeros in the cut directions, and the attention of
    transformers runs unchanged. "bucketed": in the kernel and in the cache, heads are only as wide as their bucket.
    "auto": bucketed where it is faster, by costs that were measured for the kind of device. A cache must be used with
    the backend that created it. Raises UsageError if the name is unknown.
    """
    global _backend
    if backend not in get_args(Backend):
        raise UsageError(f"there is no backend {backend!r}", f"give one of {', '.join(get_args(Backend))}")
    _backend = backend


def get_backend() -> Backend:
    """Return the backend of the last call of `set_backend`, or "auto" before the first."""
    return _backend


@dataclass(frozen=True)
class Cost:
    """The cost model of one call of the attention kernel, in any unit of time.

    The cost is call + heads * (head + width * w + stored * (qk + vo)), where w is the computed width and qk and vo are
    the stored widths of keys and values. The computed width is a multiple of `step` and at least `least`, because the
    kernel is not faster with other widths.
    """

    call: float
    head: float
    width: float
    stored: float
    step: int = MULTIPLE
    least: int = MULTIPLE

    def kernel_width(self, width: int) -> int:
        """Return the width with which the kernel computes heads of this width."""
        return rounded_up(max(self.least, width), self.step)

    def of(self, heads: int, qk: int, vo: int) -> float:
        """Return the cost of one call for `heads` heads whose keys and values have the widths `qk` and `vo`."""
        each = self.head + self.width * self.kernel_width(max(qk, vo)) + self.stored * (qk + vo)
        return self.call + heads * each


@dataclass(frozen=True)
class Bucket:
    """Heads that share one call: the stored widths `qk` of keys and `vo` of values, and the computed width."""

    heads: tuple[int, ...]
    qk: int
    vo: int
    width: int


@dataclass(frozen=True)
class Plan:
    """The buckets of a block, their total cost, and the cost of one call for all heads with the original width."""

    buckets: tuple[Bucket, ...]
    cost: float
    original: float

    @property
    def pays(self) -> bool:
        """Whether the buckets cost no more than the single call."""
        return self.cost <= self.original


def rounded_up(number: int, multiple: int = MULTIPLE) -> int:
    """Round up to a multiple."""
    return -(-number // multiple) * multiple


@lru_cache
def plan(qk_ranks: Ranks, vo_ranks: Ranks, head_dim: int, cost: Cost) -> Plan:
    """Return the cheapest bucket plan for a block.

    Heads with V-O rank 0 add nothing to the output and are in no bucket. The others are points in the plane of Q-K and
    V-O widths, and dynamic programming finds the cheapest recursive split of the plane at a Q-K or a V-O width. Typical
    results are two to six buckets for twenty heads of 64.
    """
    widths = {
        head: (rounded_up(max(1, qk)), rounded_up(vo))
        for head, (qk, vo) in enumerate(zip(qk_ranks, vo_ranks, strict=True))
        if vo
    }
    known: dict[tuple[int, ...], tuple[float, tuple[Bucket, ...]]] = {}

    def cheapest(heads: tuple[int, ...]) -> tuple[float, tuple[Bucket, ...]]:
        if heads in known:
            return known[heads]
        qk, vo = (max(widths[head][side] for head in heads) for side in (0, 1))
        one: tuple[Bucket, ...] = (Bucket(heads, qk, vo, cost.kernel_width(max(qk, vo))),)
        best = cost.of(len(heads), qk, vo), one
        for side in (0, 1):
            for limit in sorted({widths[head][side] for head in heads})[:-1]:
                low = cheapest(tuple(head for head in heads if widths[head][side] <= limit))
                high = cheapest(tuple(head for head in heads if widths[head][side] > limit))
                if low[0] + high[0] < best[0]:
                    best = low[0] + high[0], low[1] + high[1]
        known[heads] = best
        return best

    total, buckets = cheapest(tuple(widths)) if widths else (0.0, ())
    return Plan(buckets, total, original=cost.of(len(qk_ranks), head_dim, head_dim))
