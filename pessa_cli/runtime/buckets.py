"""Which heads share a call of the attention kernel: buckets of equal width, cheapest by what the kernel really costs.

A kernel wants the same width in all heads of a call, and pruned heads have many. So the heads are cut into a few
buckets, each as wide as its widest head, rounded up to a multiple of 8. Plain arithmetic: torch comes in with
`attention`. Also here: which of the two ways of running compact models is in use.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.common.errors import UsageError

MULTIPLE = 8  # of every width: what kernels on every device are aligned to
Backend = Literal["auto", "scatter", "bucketed"]
_backend: Backend = "auto"


def set_backend(backend: Backend) -> None:
    """How compact models run from now on, in this process.

    "scatter": every head in slots of the original head_dim, zeros where directions were cut; the attention of
    transformers as it is. "bucketed": no slot wider than its bucket, in the kernel and in the cache. "auto": bucketed
    where it pays, by costs that were measured for the kind of device. A cache in use belongs to the backend that
    began it. Raises UsageError for another name.
    """
    global _backend
    if backend not in get_args(Backend):
        raise UsageError(f"there is no backend {backend!r}", f"one of {', '.join(get_args(Backend))}")
    _backend = backend


def get_backend() -> Backend:
    """What `set_backend` was last told; "auto" at first."""
    return _backend


@dataclass(frozen=True)
class Cost:
    """What a call of the attention kernel costs, in any unit: a + heads * (b + c * width + d * stored width).

    `call` is a, the call itself; `head`, `width` and `stored` are b, c and d, the last for each column of keys or
    values. The kernel is only asked for multiples of `step`, from `least` on: others take it as long, or longer.
    """

    call: float
    head: float
    width: float
    stored: float
    step: int = MULTIPLE
    least: int = MULTIPLE

    def kernel_width(self, width: int) -> int:
        return rounded_up(max(self.least, width), self.step)

    def of(self, heads: int, qk: int, vo: int) -> float:
        """Of one call for `heads` heads whose keys and values are `qk` and `vo` wide."""
        each = self.head + self.width * self.kernel_width(max(qk, vo)) + self.stored * (qk + vo)
        return self.call + heads * each


@dataclass(frozen=True)
class Bucket:
    """Heads that go into one call: their keys are stored `qk` wide, their values `vo`, and computed `width` wide."""

    heads: tuple[int, ...]
    qk: int
    vo: int
    width: int


@dataclass(frozen=True)
class Plan:
    """The buckets of a block, and what they cost against one call with the original width."""

    buckets: tuple[Bucket, ...]
    cost: float
    original: float

    @property
    def pays(self) -> bool:
        return self.cost <= self.original


def rounded_up(number: int, multiple: int = MULTIPLE) -> int:
    return -(-number // multiple) * multiple


@lru_cache
def plan(qk_ranks: Ranks, vo_ranks: Ranks, head_dim: int, cost: Cost) -> Plan:
    """The cheapest buckets for a block of attention.

    Heads whose V-O rank is 0 add nothing to the output and are in no bucket. The others are points in a plane of two
    widths; dynamic programming finds the cheapest way to cut it, again and again, across at a Q-K or a V-O width.
    There are as many buckets as pay for their calls, two to six for twenty heads of 64.
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
