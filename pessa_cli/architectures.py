"""Which tensors make up attention in which kind of model: one row a kind of block, facts only.

A row declares what a checkpoint cannot say about itself. Biases, the number of layers, the head size and the
prefix that some model classes put before every name are discovered from the header by `sites`.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    where: (key, its default, value) that config.json must have for this row to count.
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
            words = "V-O"
        else:
            words = "V-O; Q-K by frequency pairs"
        if self.rope is not None and (self.rope.layers or self.rope.unless):
            words += "; both where nothing rotates"
        return words + ("; V-O where queries and keys are normed" if self.norms else "")


@dataclass(frozen=True)
class Tower:
    """A model in a model of several: the key of its config, names that its tensors are under, and its rows.

    They are those of `model_type`, or of what its config says where that is empty.
    """

    kind: str
    config: str
    under: tuple[str, ...] = ()
    model_type: str = ""


def _block(kind: str, module: str, names: str, heads: str | Keys, **more: object) -> AttentionSpec:
    """A row whose projections are in one module, by their names: "q k v o", or "qkv o" where they are fused."""
    *first, o = names.split()
    q, k, v = first * 3 if len(first) == 1 else first
    facts = {side: f"{module}.{name}" for side, name in zip("qkvo", (q, k, v, o), strict=True)}
    facts |= {"heads": (heads,) if isinstance(heads, str) else heads}  # type: ignore[dict-item]
    return AttentionSpec(kind=kind, **facts, **more)  # type: ignore[arg-type]


PROJ, BIASED_O = "q_proj k_proj v_proj o_proj", "q_proj k_proj v_proj out_proj"
HEADS, KV_HEADS = "num_attention_heads", ("num_key_value_heads",)
BUFFERS = ("bias", "masked_bias")  # causal masks, in old files

SEQ2SEQ = (
    _block("encoder.self", "encoder.layers.{i}.self_attn", BIASED_O, "encoder_attention_heads"),
    _block("decoder.self", "decoder.layers.{i}.self_attn", BIASED_O, "decoder_attention_heads"),
    _block("decoder.cross", "decoder.layers.{i}.encoder_attn", BIASED_O, "decoder_attention_heads"),
)
BERT = (
    AttentionSpec(
        kind="encoder.self",
        q="encoder.layer.{i}.attention.self.query",
        k="encoder.layer.{i}.attention.self.key",
        v="encoder.layer.{i}.attention.self.value",
        o="encoder.layer.{i}.attention.output.dense",
        heads=(HEADS,),
    ),
)


def _decoder(names: str = PROJ, **more: object) -> tuple[AttentionSpec, ...]:
    """LLaMA's rows, and those of all that are built like it."""
    facts: dict[str, object] = {"kv_heads": KV_HEADS, "rope": Rotation(), "beside": ("rotary_emb.inv_freq",)}
    return (_block("decoder.self", "layers.{i}.self_attn", names, HEADS, **facts | more),)


ARCHITECTURES: dict[str, tuple[AttentionSpec, ...]] = {
    "whisper": SEQ2SEQ,
    "bert": BERT,
    "llama": _decoder(),
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
    "m2m_100": SEQ2SEQ,  # NLLB, too
    "blenderbot": SEQ2SEQ,
    "speech_to_text": SEQ2SEQ,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": (_block("encoder.self", "transformer.layer.{i}.attention", "q_lin k_lin v_lin out_lin", "n_heads"),),
    "mpnet": (
        _block(
            *("encoder.self", "encoder.layer.{i}.attention.attn", "q k v o", HEADS),
            elsewhere=("encoder.relative_attention_bias.weight",),
        ),
    ),
    "opt": (_block("decoder.self", "decoder.layers.{i}.self_attn", BIASED_O, HEADS),),
    "wav2vec2": (_block("encoder.self", "encoder.layers.{i}.attention", BIASED_O, HEADS),),
    "hubert": (_block("encoder.self", "encoder.layers.{i}.attention", BIASED_O, HEADS),),
    "mistral": _decoder(),
    "mixtral": _decoder(),
    "gemma": _decoder(),
    "gemma2": _decoder(),
    "qwen2": _decoder(),
}
