"""An attention block of a checkpoint: its module names, widths, heads, and how many directions are stored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from pessa_cli.blocks.compact_format import PairRuns, Ragged, Ranks, pair_ranks
from pessa_cli.blocks.spec import AttentionSpec
from pessa_cli.common.errors import UsageError

ROPE = "RoPE"


@dataclass(frozen=True)
class Site:
    """One attention block of one checkpoint.

    `q`, `k`, `v`, `o` are module names as in the file; `query_width`, `key_width` and `output_width` are the
    widths D of what goes in and comes out. `qk_ranks` and `vo_ranks` say how many directions the file stores for
    each key/value head: `head_dim` everywhere in a dense file, less in a compact one. `between` names what stands
    between W_Q and W_K of the first `unmerged` directions of each head. `pairs`: under RoPE of all of them, where Q-K
    stores less, the frequency pairs that it stores for each key/value head.
    """

    spec: AttentionSpec
    layer: int
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    query_width: int
    key_width: int
    output_width: int
    biases: frozenset[str]  # the letters of the projections that have one
    dtype: str  # of its weights and biases; the coarsest, should they differ
    qk_ranks: Ranks
    vo_ranks: Ranks
    pairs: tuple[PairRuns, ...] | None = None
    between: str = ""
    unmerged: int = 0

    @property
    def name(self) -> str:
        """Short and unique within a model: "encoder.self.3"."""
        return f"{self.spec.kind}.{self.layer}"

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def merges_qk(self) -> bool:
        return self.unmerged < self.head_dim

    @property
    def by_pairs(self) -> bool:
        """Whether directions i and i + d/2 turn together, for all i, and can go together."""
        rope = self.spec.rope
        return self.between == ROPE and not self.merges_qk and not self.spec.fused and not (rope and rope.interleaved)

    @property
    def before(self) -> int:
        """The directions of Q-K that are kept whatever its spectrum says, since it is of those behind them."""
        return self.unmerged if self.merges_qk else 0

    @property
    def merges(self) -> str:
        if not self.unmerged:
            return "Q-K, V-O"
        if self.merges_qk:
            return f"Q-K but {self.unmerged} of {self.head_dim} ({self.between}), V-O"
        return f"V-O ({self.between})"

    @property
    def moves_v_bias(self) -> bool:
        """Whether a value bias adds the same to every output, and there is a bias to hold that."""
        return "o" in self.biases and self.spec.sums_to_one

    @property
    def full(self) -> Ranks:
        return (self.head_dim,) * self.kv_heads

    def module(self, side: str) -> str:
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}[side]

    def stored(self, side: str) -> Ranks:
        """The rank of each head in the tensor of a projection, in its order."""
        return self._in_order(side, self.qk_ranks, self.vo_ranks)

    def _in_order(self, side: str, qk_ranks: Ranks, vo_ranks: Ranks) -> Ranks:
        order = head_order(self.spec, side, self.kv_heads, self.group)
        return tuple((qk_ranks if letter in "qk" else vo_ranks)[head] for letter, head in order)

    def shapes(self, qk_ranks: Ranks, vo_ranks: Ranks) -> dict[str, tuple[int, ...]]:
        """The names and shapes of this site's tensors when just so many directions are stored."""
        widths = {"q": self.query_width, "k": self.key_width, "v": self.key_width, "o": self.output_width}
        shapes: dict[str, tuple[int, ...]] = {}
        for side, width in widths.items():
            slots = sum(self._in_order(side, qk_ranks, vo_ranks))
            shape = (width, slots) if (side == "o") != self.spec.transposed else (slots, width)
            shapes[f"{self.module(side)}.weight"] = shape
            if side in self.biases:
                shapes[f"{self.module(side)}.bias"] = (width if side == "o" else slots,)
        return shapes

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of this site's tensors in its file."""
        return self.shapes(self.qk_ranks, self.vo_ranks)


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many entries tensors of these shapes have."""
    return sum(math.prod(shape) for shape in shapes.values())


def head_order(spec: AttentionSpec, side: str, kv_heads: int, group: int) -> list[tuple[str, int]]:
    """What the tensor of a projection holds, in order: for each head whose it is and its key/value head."""
    if not spec.fused or side == "o":
        return [(side, head) for head in range(kv_heads) for _ in range(group if side in "qo" else 1)]
    if spec.fused == "grouped":
        return [(letter, head) for head in range(kv_heads) for letter in (*"q" * group, "k", "v")]
    return [pair for letter in "qkv" for pair in head_order(replace(spec, fused=""), letter, kv_heads, group)]


def select(sites: list[Site], kinds: tuple[str, ...] = (), layers: frozenset[int] | None = None) -> list[Site]:
    """The sites of the given kinds and layers; no kinds means all, None means every layer."""
    known = list(dict.fromkeys(site.spec.kind for site in sites))
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise UsageError(f"--sites {unknown[0]}: this model has no such block", f"it has {', '.join(known)}")
    top = max(site.layer for site in sites)
    if layers is not None and max(layers) > top:
        raise UsageError(f"--layers {max(layers)}: the model's last layer is {top}", f"give layers from 0 to {top}")
    chosen = [
        site for site in sites if (not kinds or site.spec.kind in kinds) and (layers is None or site.layer in layers)
    ]
    if not chosen:
        raise UsageError("--sites and --layers together choose no block", f"the model's last layer is {top}")
    return chosen


def ragged_site(site: Site) -> dict[str, Ragged]:
    """The entries of `modules` for one site, by module name; only for those that are not full."""
    entries: dict[str, Ragged] = {}
    for side in "qkvo":
        ranks = site.stored(side)
        if side in "qk" and site.pairs is not None:
            pairs = tuple(runs for runs in site.pairs for _ in range(site.group if side == "q" else 1))
            entries[site.module(side)] = Ragged.of_pairs(site.head_dim, pairs)
        elif any(rank < site.head_dim for rank in ranks):
            entries[site.module(side)] = Ragged("columns" if side == "o" else "rows", site.head_dim, ranks)
    return entries


def with_ranks(site: Site, qk_ranks: Ranks, vo_ranks: Ranks, pairs: tuple[PairRuns, ...] | None = None) -> Site:
    """The same site as a compact file of those ranks, or with those pairs of Q-K, would store it."""
    if pairs is not None and pair_ranks(pairs) == site.full:
        pairs = None
    return replace(site, qk_ranks=qk_ranks, vo_ranks=vo_ranks, pairs=pairs)


def in_full(site: Site) -> Site:
    """The same site as a dense file stores it."""
    return with_ranks(site, site.full, site.full)
