"""The types of the architecture table."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, TypeVar

Keys = tuple[str, ...]  # alternative keys of config.json, dotted if nested; the first that exists is used
Row = TypeVar("Row", bound="BlockSpec")


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


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """What all rows of the architecture table have: which blocks a row is about, and where they are.

    kind: the kind of block, such as "encoder.self".
    depth: config keys of the number of layers.
    transposed: whether weights are stored as (in, out), as transformers' Conv1D does.
    beside: name patterns of other tensors beside those of the row, which are copied.
    where: conditions (config key, its default, required truth value or a regular expression for the whole value) under
    which the row applies.
    sparse: whether some layers have no block of this kind.
    compact: whether the stock model code runs ragged matrices.
    under: name parts, one of which must be part of the prefix of the blocks' names.
    config: the key of config.json whose object holds the config keys above; empty for config.json itself.
    """

    kind: str
    depth: Keys = ("num_hidden_layers",)
    transposed: bool = False
    beside: tuple[str, ...] = ()
    where: tuple[tuple[str, object, object], ...] = ()
    sparse: bool = False
    compact: bool = True
    under: tuple[str, ...] = ()
    config: str = ""

    @property
    def title(self) -> str:
        """What a message calls a block of this kind, such as "encoder.self attention"."""
        raise NotImplementedError

    @property
    def modules(self) -> dict[str, str]:
        """The module names of the block's matrices, with `{i}` for the layer, by what they are in the block."""
        raise NotImplementedError

    @property
    def stem(self) -> str:
        """The name of the list of layers that the blocks are in, with its final dot."""
        return next(iter(self.modules.values())).partition("{i}")[0]

    def within(self, part: str) -> Self:
        """Return the row for the submodel `part` alone, such as "encoder", whose name is no part of its names."""
        raise NotImplementedError

    def applies(self, config: Mapping[str, Any]) -> bool:
        """Whether config.json meets the conditions under which the row applies."""
        return all(
            re.fullmatch(wanted, str(config.get(key, default))) is not None
            if isinstance(wanted, str)
            else bool(config.get(key, default)) == wanted
            for key, default, wanted in self.where
        )


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(BlockSpec):
    """One row of the architecture table: where the projections of one kind of block are, and what is between them.

    q, k, v, o: module names of the projections, with `{i}` for the layer.
    heads, kv_heads: config keys of the numbers of heads; `kv_heads` may also be a constant, and if none of its keys
    exists there is one key/value head per query head.
    head_dim: config keys of the size of each head; if none exists, it is the width divided by the number of heads.
    fused: whether q, k and v are one tensor: "blocks" has all of q, then all of k, then all of v; "grouped" has for
    each key/value head its query heads, its key head and its value head.
    rope: the rotation between W_Q and W_K, if there is one.
    norms: name patterns, within the module that holds q, of modules between W_Q and W_K that prevent merging, if
    present; normed: whether such norms are always present.
    key_bias_stays: whether the key bias affects the output, because keys are multiplied with more than the queries.
    sums_to_one: whether attention weights sum to one over the keys (false with attention sinks).
    beside: name patterns of other tensors within the module that holds q, which are copied; elsewhere: endings of the
    names of such tensors in other modules.
    refused: config keys that, when set, put an operation between W_V and W_O, so that the model cannot be pruned.
    """

    q: str
    k: str
    v: str
    o: str
    heads: Keys
    kv_heads: Keys | int = ()
    head_dim: Keys = ()
    fused: Literal["", "blocks", "grouped"] = ""
    rope: Rotation | None = None
    norms: tuple[str, ...] = ()
    normed: bool = False
    key_bias_stays: bool = False
    sums_to_one: bool = True
    elsewhere: tuple[str, ...] = ()
    refused: Keys = ()

    @property
    def title(self) -> str:
        """What a message calls a block of this kind, such as "encoder.self attention"."""
        return f"{self.kind} attention"

    @property
    def modules(self) -> dict[str, str]:
        """The module names of the projections, with `{i}` for the layer, by their letters."""
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}

    def within(self, part: str) -> Self:
        """Return the row for the submodel `part` alone, such as "encoder", whose name is no part of its names."""
        short = {side: name.removeprefix(f"{part}.") for side, name in self.modules.items()}
        return replace(self, **short)  # type: ignore[arg-type]

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

    def specs(self, rows: tuple[Row, ...]) -> tuple[Row, ...]:
        """Return the rows with the kind, config key and prefix of this submodel."""
        return tuple(
            replace(row, kind=f"{self.kind}.{row.kind.rpartition('.')[2]}", config=self.config, under=self.under)
            for row in rows
        )
