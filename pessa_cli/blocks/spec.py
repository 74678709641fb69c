"""The types of the architecture table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Keys = tuple[str, ...]  # of config.json, dotted where they are nested; the first that is there counts


@dataclass(frozen=True)
class Rotation:
    """RoPE: the first directions of each head, or all of them, are turned by the position.

    share: keys of the share of each head that turns, `default` where there is none of them; count: keys of their
    number, all for null. interleaved: neighbours turn together, and not the two halves. layers: a key with a value for
    each layer, and that of those that turn. unless: a key that says that none does.
    """

    share: Keys = ()
    default: float = 1.0
    count: Keys = ()
    interleaved: bool = False
    layers: tuple[str, object] | None = None
    unless: str | None = None

    @property
    def partial(self) -> bool:
        return bool(self.share or self.count)


@dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention block: where its four projections are, and what stands between them.

    `q`, `k`, `v` and `o` are module names with `{i}` for the layer; `under` are parts of names, one of which must stand
    before them. `heads` and `kv_heads` are keys of config.json, or of what its key `config` holds; kv_heads may be a
    constant, and none of its keys means as many as heads.
    fused: q, k and v are one tensor: "blocks" of all q, all k and all v, or "grouped", for each key/value head its
    query heads, k and v. transposed: the weights are (in, out), as of Conv1D.
    rope: a rotation stands between W_Q and W_K. norms: names in the module of q of what lets nothing merge there,
    where it is; `normed`: it always is.
    key_bias_stays: something else than queries meets the keys. sums_to_one: do the rows of attention?
    beside: other names in the module of q that are no attention weights; elsewhere: ends of such names in other places.
    refused: keys of config.json for something between W_V and W_O. compact: does the stock code run ragged projections?
    where: (key, its default, value) that config.json must have for this row to count. sparse: not every layer has one.
    """

    kind: str
    q: str
    k: str
    v: str
    o: str
    heads: Keys
    kv_heads: Keys | int = ()
    fused: Literal["", "blocks", "grouped"] = ""
    transposed: bool = False
    rope: Rotation | None = None
    norms: tuple[str, ...] = ()
    normed: bool = False
    key_bias_stays: bool = False
    sums_to_one: bool = True
    beside: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    refused: Keys = ()
    compact: bool = True
    where: tuple[tuple[str, object, object], ...] = ()
    sparse: bool = False
    under: tuple[str, ...] = ()
    config: str = ""

    @property
    def merges(self) -> str:
        """What of a block can be merged, in words."""
        if self.normed:
            return "V-O (norms between W_Q and W_K)"
        if self.rope is None:
            words = "Q-K, V-O"
        elif self.rope.partial:
            words = "Q-K but for its rotated part, V-O"
        elif self.rope.interleaved or self.fused:
            words = "V-O (RoPE)"
        else:
            words = "V-O; Q-K by frequency pairs (RoPE)"
        if self.rope is not None and (self.rope.layers or self.rope.unless):
            words += "; Q-K, too, where nothing rotates"
        return words + (f"; V-O alone where there is a {self.norms[0].partition('.')[0]}" if self.norms else "")


@dataclass(frozen=True)
class Tower:
    """A model in a model of several: what its kinds of blocks are called, the key of its config, names that its tensors
    are under, and its rows.

    Without rows of its own it has those of the `model_type` that its config names.
    """

    kind: str
    config: str
    under: tuple[str, ...] = ()
    rows: tuple[AttentionSpec, ...] = ()

    def specs(self, rows: tuple[AttentionSpec, ...]) -> tuple[AttentionSpec, ...]:
        """Rows as those of this tower."""
        return tuple(
            replace(row, kind=f"{self.kind}.{row.kind.rpartition('.')[2]}", config=self.config, under=self.under)
            for row in rows
        )
