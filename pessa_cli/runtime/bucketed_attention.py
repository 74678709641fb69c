"""Bucketed attention: pruned heads in the kernel and in the cache no wider than their bucket.

Queries, keys and values of all heads stand one after the other in one row a position, (batch, positions, row): so do
the stock caches hold them, as one head of that width. A bucket is a view of it. The kernel wants q, k and v
equally wide, and the narrower ones of keys and values are simply read beyond their end: what is read there meets
zeros in the queries, or comes out in columns that nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pessa_cli.algebra.heads import live
from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.runtime.buckets import Bucket, Cost, Plan, plan
from pessa_cli.runtime.compact_linear import Slots

# Measured by `scripts/bench_attention.py --calibrate`, in microseconds. Constants rather than a race at loading:
# the same folder computes the same numbers on every machine of a kind. What is not here runs scattered.
ENCODING = {  # 1500 queries against 1500 keys
    "cpu": Cost(call=30, head=430, width=40.6, stored=0, least=16),
}
DECODING = {  # one query against 1500 keys in the cache, which come from memory: other layers' were read in between
    "cpu": Cost(call=15, head=2, width=0, stored=0.2),
}
CONTINUING = {  # one query against the tenth of that which a decoder itself has written: calls are what costs
    "cpu": Cost(call=15, head=2, width=0.005, stored=0.02),
}


@dataclass(frozen=True)
class HeadRun:
    """Where a bucket's heads stand in a row: the first at `start`, the next each `step` on, read `width` wide."""

    start: int
    heads: int
    step: int
    width: int

    def of_rows(self, rows: Tensor) -> Tensor:
        """(batch, positions, row) -> (batch, heads, positions, width), nothing copied."""
        length = (self.heads - 1) * self.step + self.width
        return rows.narrow(-1, self.start, length).unfold(-1, self.width, self.step).transpose(1, 2)

    def of_packed(self, packed: Tensor) -> Tensor:
        """The same of what `Side.pack` made, (batch, 1, positions, row)."""
        positions = packed.shape[-2]
        length = (self.heads * positions - 1) * self.step + self.width
        windows = packed.flatten(1).narrow(-1, self.start * positions, length).unfold(-1, self.width, self.step)
        return windows.view(-1, self.heads, positions, self.width)

    def of_one(self, packed: Tensor) -> Tensor:
        """(1, 1, positions, row) -> (heads, positions, step): the first of a batch, as wide as it is stored."""
        positions = packed.shape[-2]
        first = packed.flatten().narrow(0, self.start * positions, self.heads * positions * self.step)
        return first.view(self.heads, positions, self.step)


@dataclass(frozen=True)
class RowLayout:
    """How one of q, k and v is laid out: a run a bucket, and what the projection puts in the slots of a row."""

    runs: tuple[HeadRun, ...]
    slots: Slots

    def of_rows(self, rows: Tensor) -> list[Tensor]:
        return [run.of_rows(rows) for run in self.runs]

    def of_packed(self, packed: Tensor) -> list[Tensor]:
        return [run.of_packed(packed) for run in self.runs]

    def pack(self, rows: Tensor) -> Tensor:
        """Rows (batch, positions, row) with the positions of each head together, for a cache: (batch, 1, positions, W).

        Reading what is in memory in one piece is what a decoding step across to an encoder does most. Heads end
        nowhere near the borders of the last two dimensions, so this suits only what is cached once and for all.
        """
        batch, positions, _ = rows.shape
        runs = sorted(self.runs, key=lambda run: run.start)
        heads = [
            rows.narrow(-1, run.start, run.heads * run.step).view(batch, positions, run.heads, run.step).transpose(1, 2)
            for run in runs
        ]
        beyond = any(run.step < run.width for run in runs) or not runs  # as in rows, never nothing
        tail = [rows.new_zeros(batch, positions)] * beyond
        return torch.cat([part.flatten(1) for part in [*heads, *tail]], -1).view(batch, 1, positions, -1)


@dataclass(frozen=True)
class BlockLayout:
    """A block's plan as views and indices. Results stand like queries; `live` names their live slots in file order,
    and `spread` puts those in slots of head_dim, zeros in the others."""

    plan: Plan
    q: RowLayout
    k: RowLayout
    v: RowLayout
    live: Slots  # (sum of V-O ranks,)
    stored: Slots  # the same among results no wider than values are stored
    spread: Slots  # (heads * head_dim,)

    def to(self, device: torch.device) -> BlockLayout:
        def moved(side: RowLayout) -> RowLayout:
            return replace(side, slots=side.slots.to(device))

        return BlockLayout(
            self.plan,
            moved(self.q),
            moved(self.k),
            moved(self.v),
            self.live.to(device),
            self.stored.to(device),
            self.spread.to(device),
        )

    def attend(
        self, call: Callable[..., Tensor], q: Tensor, k: list[Tensor], v: list[Tensor], mask: Tensor | None
    ) -> Tensor:
        """The live results (batch, queries, sum of V-O ranks) of `call(q, k, v, mask)`, once a bucket.

        q is rows (batch, queries, row), k and v are views of theirs. `call` is given (batch, heads, positions, width)
        and gives (batch, positions, heads, width).
        """
        results = []
        for bucket, *qkv in zip(self.plan.buckets, self.q.of_rows(q), k, v, strict=True):
            own = mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask[:, list(bucket.heads)]
            results.append(call(*qkv, own).flatten(2))
        return self.live.fill(torch.cat(results, -1) if results else q[..., :0])

    def attend_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The live results (1, 1, sum of V-O ranks) of one scaled query, (1, 1, row), with packed keys and values.

        Reading those is all the work there is: matrix products do it a quarter faster than the fused kernel, and there
        is no width that both have to have.
        """
        results = []
        for bucket, of_q, of_k, of_v in zip(self.plan.buckets, self.q.runs, self.k.runs, self.v.runs, strict=True):
            asked = of_q.of_one(q)[..., : bucket.qk]
            scores = torch.bmm(asked, of_k.of_one(k).mT)  # (heads, 1, positions)
            results.append(torch.bmm(scores.softmax(-1), of_v.of_one(v)).flatten())
        return self.stored.fill(torch.cat(results).view(1, 1, -1) if results else q[..., :0])

    def in_slots(self, results: Tensor) -> Tensor:
        """The live results in slots of head_dim, as the stock attention gives them."""
        return self.spread.fill(results)


def lay_out(qk_ranks: Ranks, vo_ranks: Ranks, head_dim: int, cost: Cost) -> BlockLayout:
    """The layout of a block by its cheapest plan, on the CPU."""
    found = plan(qk_ranks, vo_ranks, head_dim, cost)
    q = _side(found.buckets, [bucket.width for bucket in found.buckets], qk_ranks)
    k = _side(found.buckets, [bucket.qk for bucket in found.buckets], qk_ranks)
    v = _side(found.buckets, [bucket.vo for bucket in found.buckets], vo_ranks)
    spread = torch.full((len(vo_ranks) * head_dim,), sum(vo_ranks), device="cpu")
    spread[live(vo_ranks, head_dim)] = torch.arange(sum(vo_ranks), device="cpu")
    return BlockLayout(
        found,
        q,
        k,
        v,
        live=_live(found.buckets, [bucket.width for bucket in found.buckets], vo_ranks),
        stored=_live(found.buckets, [bucket.vo for bucket in found.buckets], vo_ranks),
        spread=Slots.of(spread, sum(vo_ranks)),
    )


def _live(buckets: Sequence[Bucket], widths: Sequence[int], ranks: Ranks) -> Slots:
    """Where each head's live slots are, head by head, among results that come bucket by bucket."""
    starts: dict[int, int] = {}
    total = 0
    for bucket, width in zip(buckets, widths, strict=True):
        for head in bucket.heads:
            starts[head] = total
            total += width
    order = [starts[head] + i for head, rank in enumerate(ranks) for i in range(rank)]
    return Slots.of(torch.tensor(order, dtype=torch.long, device="cpu"), total)


def _side(buckets: Sequence[Bucket], steps: Sequence[int], ranks: Ranks) -> RowLayout:
    """Buckets side by side, those last that are read the least beyond their end: so that rows end there too."""
    runs: dict[int, HeadRun] = {}
    start = 0
    for i in sorted(range(len(buckets)), key=lambda i: steps[i] - buckets[i].width):
        runs[i] = HeadRun(start, len(buckets[i].heads), steps[i], buckets[i].width)
        start += runs[i].heads * steps[i]
    ordered = tuple(runs[i] for i in range(len(buckets)))
    # Never without a slot: a cache takes keys without a number in them for no keys.
    row = max([1, start, *(run.start + (run.heads - 1) * run.step + run.width for run in ordered)])
    slots = torch.full((row,), sum(ranks), device="cpu")
    for head, first in _starts(buckets, ordered).items():
        column = sum(ranks[:head])
        slots[first : first + ranks[head]] = torch.arange(column, column + ranks[head], device="cpu")
    return RowLayout(ordered, Slots.of(slots, sum(ranks)))


def _starts(buckets: Sequence[Bucket], runs: Sequence[HeadRun]) -> dict[int, int]:
    """Where in a row each head begins."""
    return {
        head: run.start + i * run.step
        for bucket, run in zip(buckets, runs, strict=True)
        for i, head in enumerate(bucket.heads)
    }
