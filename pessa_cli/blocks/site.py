"""Sites: the blocks of a checkpoint with their module names, widths and stored ranks."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self, TypeVar

from pessa_cli.blocks.compact_format import PairRuns, Ragged, Ranks, pair_ranks
from pessa_cli.blocks.seam import Seam, Symmetry
from pessa_cli.blocks.spec import AttentionSpec, BlockSpec
from pessa_cli.common.errors import UsageError

ROPE = "RoPE"


class Site(ABC):
    """One block of one checkpoint: an attention block or an MLP.

    spec: its row of the architecture table. layer: the number of its layer. dtype: of the weights and biases; if they
    differ, the coarsest.
    """

    spec: BlockSpec
    layer: int
    dtype: str

    @property
    def kind(self) -> str:
        """The kind of block, such as "encoder.self"."""
        return self.spec.kind

    @property
    def name(self) -> str:
        """The site's unique name within the model, such as "encoder.self.3"."""
        return f"{self.kind}.{self.layer}"

    @property
    @abstractmethod
    def modules(self) -> Mapping[str, str]:
        """The names of its modules as in the file, by what they are in the block, such as "q", "k", "v" and "o"."""

    @property
    @abstractmethod
    def last(self) -> str:
        """What the module is that gives the block's output: a key of `modules`."""

    @property
    @abstractmethod
    def seams(self) -> tuple[Seam, ...]:
        """The hidden widths of the block, with what the file stores of them."""

    @abstractmethod
    def shapes(self, ranks: Mapping[str, Ranks]) -> dict[str, tuple[int, ...]]:
        """Return the names and shapes of this site's tensors if these ranks were stored, by the name of the seam."""

    @abstractmethod
    def keeping(self, ranks: Mapping[str, Ranks], pairs: tuple[PairRuns, ...] | None = None) -> Self:
        """Return the site as a compact file with these ranks, and under RoPE these frequency pairs, would store it."""

    @abstractmethod
    def ragged(self) -> dict[str, Ragged]:
        """Return its entries of `quantization_config` by module name; what is stored in full has none."""

    @property
    def compact(self) -> bool:
        """Whether the stock model code runs narrower modules."""
        return self.spec.compact

    @property
    @abstractmethod
    def function(self) -> str:
        """Describe the numbers of the block that pruning does not change."""

    def module(self, letter: str) -> str:
        """Return the name of one of its modules as in the file."""
        return self.modules[letter]

    def seam(self, name: str) -> Seam:
        """Return one of its seams by name."""
        return next(seam for seam in self.seams if seam.name == name)

    @property
    def ranks(self) -> dict[str, Ranks]:
        """How many directions or channels of each group the file stores, by the name of the seam."""
        return {seam.name: seam.ranks for seam in self.seams}

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of this site's tensors in the file."""
        return self.shapes(self.ranks)

    def in_full(self) -> Self:
        """Return the site as a dense file stores it."""
        return self.keeping({seam.name: seam.full for seam in self.seams})


@dataclass(frozen=True)
class AttentionSite(Site):
    """One attention block of one checkpoint.

    q, k, v, o: module names as in the file.
    heads, kv_heads: the numbers of query heads and of key/value heads; head_dim: the original size d of each head.
    query_width, key_width, output_width: the sizes D of the inputs of W_Q, of W_K and W_V, and of the output of W_O.
    qk_ranks, vo_ranks: how many directions the file stores for each key/value head: `head_dim` in a dense file, fewer
    in a compact one.
    pairs: the stored frequency pairs of each key/value head, if RoPE rotates all directions and Q-K is pruned.
    between: the operation between W_Q and W_K that prevents merging the first `unmerged` directions of each head.
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
    biases: frozenset[str]  # the letters of the projections that have a bias
    dtype: str  # of the weights and biases; if they differ, the coarsest
    qk_ranks: Ranks
    vo_ranks: Ranks
    pairs: tuple[PairRuns, ...] | None = None
    between: str = ""
    unmerged: int = 0

    @property
    def modules(self) -> Mapping[str, str]:
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}

    @property
    def last(self) -> str:
        return "o"

    @property
    def seams(self) -> tuple[Seam, ...]:
        symmetry: Symmetry = "linear" if self.merges_qk else "pairs" if self.by_pairs else "fixed"
        return (
            Seam("qk", self.head_dim, self.qk_ranks, symmetry, self.always_kept, self.pairs),
            Seam("vo", self.head_dim, self.vo_ranks, "linear"),
        )

    @property
    def function(self) -> str:
        widths = f"{self.query_width}, {self.key_width} -> {self.output_width}"
        return f"{self.heads} heads of {self.head_dim} dimensions ({self.kv_heads} for keys and values), {widths}"

    @property
    def group(self) -> int:
        """The number of query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def merges_qk(self) -> bool:
        """Whether W_Q and W_K can be merged in at least some directions of each head."""
        return self.unmerged < self.head_dim

    @property
    def by_pairs(self) -> bool:
        """Whether RoPE rotates all directions, in pairs i and i + d/2, so that Q-K is pruned by frequency pairs."""
        rope = self.spec.rope
        return self.between == ROPE and not self.merges_qk and not self.spec.fused and not (rope and rope.interleaved)

    @property
    def always_kept(self) -> int:
        """How many leading Q-K directions of each head are always kept; the Q-K spectrum covers only the others."""
        return self.unmerged if self.merges_qk else 0

    @property
    def merges(self) -> str:
        """Describe which products of this block are merged, for tables."""
        if not self.unmerged:
            return "Q-K, V-O"
        if self.merges_qk:
            return f"Q-K but {self.unmerged} of {self.head_dim} ({self.between}), V-O"
        return f"V-O ({self.between})"

    @property
    def moves_v_bias(self) -> bool:
        """Whether the value bias can move into the output bias: attention weights sum to one, and W_O has a bias."""
        return "o" in self.biases and self.spec.sums_to_one

    @property
    def full(self) -> Ranks:
        """The ranks of Q-K, and of V-O, of an unpruned block."""
        return (self.head_dim,) * self.kv_heads

    def stored(self, side: str) -> Ranks:
        """Return the stored rank of each head in the tensor of a projection, in the tensor's order of heads."""
        return self._in_order(side, self.ranks)

    def _in_order(self, side: str, ranks: Mapping[str, Ranks]) -> Ranks:
        order = head_order(self.spec, side, self.kv_heads, self.group)
        return tuple(ranks["qk" if letter in "qk" else "vo"][head] for letter, head in order)

    def shapes(self, ranks: Mapping[str, Ranks]) -> dict[str, tuple[int, ...]]:
        widths = {"q": self.query_width, "k": self.key_width, "v": self.key_width, "o": self.output_width}
        shapes: dict[str, tuple[int, ...]] = {}
        for side, width in widths.items():
            slots = sum(self._in_order(side, ranks))
            shape = (width, slots) if (side == "o") != self.spec.transposed else (slots, width)
            shapes[f"{self.module(side)}.weight"] = shape
            if side in self.biases:
                shapes[f"{self.module(side)}.bias"] = (width if side == "o" else slots,)
        return shapes

    def keeping(self, ranks: Mapping[str, Ranks], pairs: tuple[PairRuns, ...] | None = None) -> Self:
        if pairs is not None and pair_ranks(pairs) == self.full:
            pairs = None
        return replace(self, qk_ranks=ranks["qk"], vo_ranks=ranks["vo"], pairs=pairs)

    def ragged(self) -> dict[str, Ragged]:
        entries: dict[str, Ragged] = {}
        for side in "qkvo":
            ranks = self.stored(side)
            if side in "qk" and self.pairs is not None:
                pairs = tuple(runs for runs in self.pairs for _ in range(self.group if side == "q" else 1))
                entries[self.module(side)] = Ragged.of_pairs(self.head_dim, pairs)
            elif any(rank < self.head_dim for rank in ranks):
                entries[self.module(side)] = Ragged("columns" if side == "o" else "rows", self.head_dim, ranks)
        return entries


Block = TypeVar("Block", bound=Site)


def count(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the total number of entries of tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes.values())


def head_order(spec: AttentionSpec, side: str, kv_heads: int, group: int) -> list[tuple[str, int]]:
    """Return the heads in the tensor of a projection, in order, as (projection letter, key/value head).

    Without fusing all letters are that of the projection itself; a fused tensor holds heads of q, k and v.
    """
    if not spec.fused or side == "o":
        return [(side, head) for head in range(kv_heads) for _ in range(group if side in "qo" else 1)]
    if spec.fused == "grouped":
        return [(letter, head) for head in range(kv_heads) for letter in (*"q" * group, "k", "v")]
    return [pair for letter in "qkv" for pair in head_order(replace(spec, fused=""), letter, kv_heads, group)]


def select(sites: Sequence[Block], kinds: tuple[str, ...] = (), layers: frozenset[int] | None = None) -> list[Block]:
    """Return the sites of the given kinds and layers; no kinds means all kinds, and None means all layers.

    A kind is the whole name of one, such as "encoder.self" or "encoder.mlp", or "encoder" for all kinds of a stack,
    "attention" for all attention blocks, "mlp" for all MLPs, or "all". Raises UsageError if the model has no block of a
    kind or no such layer, or if no site is selected.
    """
    known = list(dict.fromkeys(site.kind for site in sites))
    for kind in kinds:
        if not any(_is_of(site.kind, kind) for site in sites):
            raise UsageError(f"--sites {kind}: this model has no such blocks", f"it has {', '.join(known)}")
    top = max(site.layer for site in sites)
    if layers is not None and max(layers) > top:
        raise UsageError(f"--layers {max(layers)}: the model's last layer is {top}", f"give layers from 0 to {top}")
    chosen = [
        site
        for site in sites
        if (not kinds or any(_is_of(site.kind, kind) for kind in kinds)) and (layers is None or site.layer in layers)
    ]
    if not chosen:
        raise UsageError(
            "--sites and --layers together select no block",
            f"choose other kinds or layers: blocks of this model are {', '.join(known)}, and its last layer is {top}",
        )
    return chosen


def _is_of(kind: str, chosen: str) -> bool:
    """Whether a kind of block is what the user's word for one or several kinds stands for."""
    stack, _, last = kind.rpartition(".")
    words = (kind, stack, "mlp" if last == "mlp" else "attention", "all")
    return chosen in words
