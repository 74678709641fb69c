"""The types of the architecture table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Keys = tuple[str, ...]  # alternative keys of config.json, dotted if nested; the first that exists is used


@dataclass(frozen=True)
class Rotation:
    """Rotary position embeddings (RoPE): all directions of each head, or the first of them, are rotated by position.

    share: config keys of the rotated fraction of each head; `default` is the fraction if none of the keys exists.
    count: config keys of the number of rotated directions, used in place of the fraction if one of them exists.
    interleaved: whether directions 2i and 2i + 1 form a pair; otherwise i and i + d/2 do.
    layers: a config key with one value per layer, and the value that means that the layer is rotated.
    unless: a config key that disables the rotation in all layers if its value is true.
    """

    share: Keys = ()
    default: float = 1.0
    count: Keys = ()
    interleaved: bool = False
    layers: tuple[str, object] | None = None
    unless: str | None = None

    @property
    def partial(self) -> bool:
        """Whether config.json may limit the rotation to a part of each head."""
        return bool(self.share or self.count)


@dataclass(frozen=True)
class AttentionSpec:
    """One row of the architecture table: where the projections of one kind of block are, and what is between them.

    kind: the kind of block, such as "encoder.self".
    q, k, v, o: module names of the projections, with `{i}` for the layer.
    heads, kv_heads: config keys of the numbers of heads; `kv_heads` may also be a constant, and if none of its keys
    exists there is one key/value head per query head.
    head_dim: config keys of the size of each head; if none exists, it is the width divided by the number of heads.
    depth: config keys of the number of layers.
    fused: whether q, k and v are one tensor: "blocks" has all of q, then all of k, then all of v; "grouped" has for
    each key/value head its query heads, its key head and its value head.
    transposed: whether weights are stored as (in, out), as transformers' Conv1D does.
    rope: the rotation between W_Q and W_K, if there is one.
    norms: name patterns, within the module that holds q, of modules between W_Q and W_K that prevent merging, if
    present; normed: whether such norms are always present.
    key_bias_stays: whether the key bias affects the output, because keys are multiplied with more than the queries.
    sums_to_one: whether attention weights sum to one over the keys (false with attention sinks).
    beside: name patterns of other tensors within the module that holds q, which are copied; elsewhere: endings of the
    names of such tensors in other modules.
    refused: config keys that, when set, put an operation between W_V and W_O, so that the model cannot be pruned.
    compact: whether the stock model code runs ragged projections.
    where: conditions (config key, its default, required truth value) under which the row applies.
    sparse: whether some layers have no block of this kind.
    under: name parts, one of which must be part of the prefix of the projections' names.
    config: the key of config.json whose object holds the config keys above; empty for config.json itself.
    """

    kind: str
    q: str
    k: str
    v: str
    o: str
    heads: Keys
    kv_heads: Keys | int = ()
    head_dim: Keys = ()
    depth: Keys = ("num_hidden_layers",)
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
        """Describe which products of a block can be merged, for tables and messages."""
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
    """One submodel of a multimodal model, such as the text model of CLIP.

    kind: the first part of the names of its kinds of blocks. config: the key of config.json that holds its config.
    under: name parts of the prefix of its tensors. rows: its rows of the architecture table; without rows, those of the
    `model_type` in its config are used.
    """

    kind: str
    config: str
    under: tuple[str, ...] = ()
    rows: tuple[AttentionSpec, ...] = ()

    def specs(self, rows: tuple[AttentionSpec, ...]) -> tuple[AttentionSpec, ...]:
        """Return the rows with the kind, config key and prefix of this submodel."""
        return tuple(
            replace(row, kind=f"{self.kind}.{row.kind.rpartition('.')[2]}", config=self.config, under=self.under)
            for row in rows
        )
