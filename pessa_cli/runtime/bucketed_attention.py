"""Bucketed attention: in the kernel and in the cache, pruned heads are only as wide as their bucket.

The queries, keys or values of all heads form one row per position, (batch, positions, row), and the stock caches hold
them in this form, as one head of that width. A bucket is a view of the row. The kernel needs q, k and v of equal width,
so a view of narrower keys or values reads beyond the end of each head: what it reads of keys is multiplied with zeros
in the queries, and what it reads of values ends up in output columns that are not used.
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

# Costs in microseconds, measured by `scripts/bench_attention.py --calibrate`. They are constants and not measured at
# loading, so that the same folder computes the same numbers on every machine with the same kind of device. Kinds of
# devices that are not listed use the "scatter" backend.
ENCODING = {  # 1500 queries against 1500 keys
    "cpu": Cost(call=30, head=430, width=40.6, stored=0, least=16),
}
DECODING = {  # one query against 1500 cached keys, read from memory because other layers use the processor's cache
    "cpu": Cost(call=15, head=2, width=0, stored=0.2),
}
CONTINUING = {  # one query against 150 keys of a decoder's own tokens: the calls dominate the cost
    "cpu": Cost(call=15, head=2, width=0.005, stored=0.02),
}


@dataclass(frozen=True)
class HeadRun:
    """The location of a bucket's heads in a row: the first starts at `start`, each next one `step` later.

    Views of each head are `width` wide, which may exceed `step`.
    """

    start: int
    heads: int
    step: int
    width: int

    def of_rows(self, rows: Tensor) -> Tensor:
        """View rows by head, without a copy: (batch, positions, row) -> (batch, heads, positions, width)."""
        length = (self.heads - 1) * self.step + self.width
        return rows.narrow(-1, self.start, length).unfold(-1, self.width, self.step).transpose(1, 2)

    def of_packed(self, packed: Tensor) -> Tensor:
        """View a packed tensor of `RowLayout.pack`, (batch, 1, positions, row), as (batch, heads, positions, width)."""
        positions = packed.shape[-2]
        length = (self.heads * positions - 1) * self.step + self.width
        windows = packed.flatten(1).narrow(-1, self.start * positions, length).unfold(-1, self.width, self.step)
        return windows.view(-1, self.heads, positions, self.width)

    def of_first(self, packed: Tensor) -> Tensor:
        """View the first batch item by head at its stored width: (1, 1, positions, row) -> (heads, positions, step)."""
        positions = packed.shape[-2]
        first = packed.flatten().narrow(0, self.start * positions, self.heads * positions * self.step)
        return first.view(self.heads, positions, self.step)


@dataclass(frozen=True)
class RowLayout:
    """The layout of the rows of q, k or v: one run per bucket, and which output of the projection fills each slot."""

    runs: tuple[HeadRun, ...]
    slots: Slots

    def of_rows(self, rows: Tensor) -> list[Tensor]:
        """Return the views of all buckets on rows, (batch, positions, row)."""
        return [run.of_rows(rows) for run in self.runs]

    def of_packed(self, packed: Tensor) -> list[Tensor]:
        """Return the views of all buckets on the result of `pack`."""
        return [run.of_packed(packed) for run in self.runs]

    def pack(self, rows: Tensor) -> Tensor:
        """Rearrange rows, (batch, positions, row), for a cache with contiguous heads, (batch, 1, positions, W).

        A decoding step with cross-attention mostly reads the cache, which is faster if each head is contiguous. The
        boundaries of heads do not match those of the last two dimensions, so a cache in this form cannot be extended.
        """
        batch, positions, _ = rows.shape
        runs = sorted(self.runs, key=lambda run: run.start)
        heads = [
            rows.narrow(-1, run.start, run.heads * run.step).view(batch, positions, run.heads, run.step).transpose(1, 2)
            for run in runs
        ]
        # Space for views that read beyond the last head; also ensures that the result is never empty, as in rows.
        beyond = any(run.step < run.width for run in runs) or not runs
        tail = [rows.new_zeros(batch, positions)] * beyond
        return torch.cat([part.flatten(1) for part in [*heads, *tail]], -1).view(batch, 1, positions, -1)


@dataclass(frozen=True)
class BlockLayout:
    """A bucket plan of a block as views and indices.

    The results of the buckets are concatenated in the order of the buckets. `live` selects the kept directions from
    them, in the order of the file, and `spread` puts these into slots of head_dim, with zeros in the others.
    """

    plan: Plan
    q: RowLayout
    k: RowLayout
    v: RowLayout
    live: Slots  # (sum of V-O ranks,), from results with the computed width of each bucket
    stored: Slots  # (sum of V-O ranks,), from results with the stored width of each bucket's values
    spread: Slots  # (heads * head_dim,)

    def to(self, device: torch.device) -> BlockLayout:
        """Return the layout with its indices on a device."""

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
        """Run `call(q, k, v, mask)` once per bucket; returns the kept directions, (batch, queries, sum of V-O ranks).

        q holds rows, (batch, queries, row); k and v hold one view per bucket. `call` takes tensors of shape
        (batch, heads, positions, width) and returns (batch, positions, heads, width).
        """
        results = []
        for bucket, *qkv in zip(self.plan.buckets, self.q.of_rows(q), k, v, strict=True):
            heads_mask = mask if mask is None or mask.ndim < 4 or mask.shape[1] == 1 else mask[:, list(bucket.heads)]
            results.append(call(*qkv, heads_mask).flatten(2))
        return self.live.fill(torch.cat(results, -1) if results else q[..., :0])

    def attend_once(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend with one scaled query, (1, 1, row), to packed keys and values; returns (1, 1, sum of V-O ranks).

        The time goes into reading keys and values: plain matrix products are a quarter faster than the fused kernel
        here, and allow keys and values of different widths.
        """
        results = []
        for bucket, of_q, of_k, of_v in zip(self.plan.buckets, self.q.runs, self.k.runs, self.v.runs, strict=True):
            query = of_q.of_first(q)[..., : bucket.qk]
            scores = torch.bmm(query, of_k.of_first(k).mT)  # (heads, 1, positions)
            results.append(torch.bmm(scores.softmax(-1), of_v.of_first(v)).flatten())
        return self.stored.fill(torch.cat(results).view(1, 1, -1) if results else q[..., :0])

    def in_slots(self, results: Tensor) -> Tensor:
        """Put the kept directions into slots of head_dim, which is the form of the stock attention's result."""
        return self.spread.fill(results)


def lay_out(qk_ranks: Ranks, vo_ranks: Ranks, head_dim: int, cost: Cost) -> BlockLayout:
    """Return the layout of a block for its cheapest bucket plan, with its indices on the CPU."""
    found = plan(qk_ranks, vo_ranks, head_dim, cost)
    q = _row_layout(found.buckets, [bucket.width for bucket in found.buckets], qk_ranks)
    k = _row_layout(found.buckets, [bucket.qk for bucket in found.buckets], qk_ranks)
    v = _row_layout(found.buckets, [bucket.vo for bucket in found.buckets], vo_ranks)
    spread = torch.full((len(vo_ranks) * head_dim,), sum(vo_ranks), device="cpu")
    spread[live(vo_ranks, head_dim)] = torch.arange(sum(vo_ranks), device="cpu")
    return BlockLayout(
        found,
        q,
        k,
        v,
        live=_kept_slots(found.buckets, [bucket.width for bucket in found.buckets], vo_ranks),
        stored=_kept_slots(found.buckets, [bucket.vo for bucket in found.buckets], vo_ranks),
        spread=Slots.of(spread, sum(vo_ranks)),
    )


def _kept_slots(buckets: Sequence[Bucket], widths: Sequence[int], ranks: Ranks) -> Slots:
    """Return the indices of the kept directions, head by head, among results that are concatenated bucket by bucket."""
    starts: dict[int, int] = {}
    total = 0
    for bucket, width in zip(buckets, widths, strict=True):
        for head in bucket.heads:
            starts[head] = total
            total += width
    order = [starts[head] + i for head, rank in enumerate(ranks) for i in range(rank)]
    return Slots.of(torch.tensor(order, dtype=torch.long, device="cpu"), total)


def _row_layout(buckets: Sequence[Bucket], steps: Sequence[int], ranks: Ranks) -> RowLayout:
    """Place the buckets of q, k or v in a row; buckets whose views read least beyond their heads come last.

    This order keeps the padding at the end of the row small.
    """
    runs: dict[int, HeadRun] = {}
    start = 0
    for i in sorted(range(len(buckets)), key=lambda i: steps[i] - buckets[i].width):
        runs[i] = HeadRun(start, len(buckets[i].heads), steps[i], buckets[i].width)
        start += runs[i].heads * steps[i]
    ordered = tuple(runs[i] for i in range(len(buckets)))
    # A row has at least one slot, because a cache treats empty keys as if there were none.
    row = max([1, start, *(run.start + (run.heads - 1) * run.step + run.width for run in ordered)])
    slots = torch.full((row,), sum(ranks), device="cpu")
    for head, first in _first_slots(buckets, ordered).items():
        column = sum(ranks[:head])
        slots[first : first + ranks[head]] = torch.arange(column, column + ranks[head], device="cpu")
    return RowLayout(ordered, Slots.of(slots, sum(ranks)))


def _first_slots(buckets: Sequence[Bucket], runs: Sequence[HeadRun]) -> dict[int, int]:
    """Return the first slot of each head in a row."""
    return {
        head: run.start + i * run.step
        for bucket, run in zip(buckets, runs, strict=True)
        for i, head in enumerate(bucket.heads)
    }
