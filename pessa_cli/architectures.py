"""Which tensors make up attention in which kind of model: one row a kind of block, facts only.

A row declares what a checkpoint cannot say about itself. Biases, the number of layers, the head size and the
prefix that some model classes put before every name are discovered from the header by `sites`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """One kind of attention block: where its four projections are, and what stands between them.

    `q`, `k`, `v` and `o` are module names with `{i}` for the layer. `heads` and `kv_heads` are keys of
    config.json. `rope`: a rotation stands between W_Q and W_K, so Q-K does not merge, but goes by frequency pairs.
    `beside`: names in the same module as q, without their prefix, that are not attention weights and are copied.
    """

    kind: str
    q: str
    k: str
    v: str
    o: str
    heads: str
    kv_heads: str | None = None
    rope: bool = False
    beside: tuple[str, ...] = ()

    @property
    def merges(self) -> str:
        return "V-O" if self.rope else "Q-K, V-O"


def _named(kind: str, module: str, heads: str, o: str = "out_proj", **more: object) -> AttentionSpec:
    """A row whose projections are called q_proj, k_proj and v_proj inside one module."""
    names = {side: f"{module}.{side}_proj" for side in "qkv"}
    return AttentionSpec(kind=kind, **names, o=f"{module}.{o}", heads=heads, **more)  # type: ignore[arg-type]


ARCHITECTURES: dict[str, tuple[AttentionSpec, ...]] = {
    "whisper": (
        _named("encoder.self", "encoder.layers.{i}.self_attn", "encoder_attention_heads"),
        _named("decoder.self", "decoder.layers.{i}.self_attn", "decoder_attention_heads"),
        _named("decoder.cross", "decoder.layers.{i}.encoder_attn", "decoder_attention_heads"),
    ),
    "bert": (
        AttentionSpec(
            kind="encoder.self",
            q="encoder.layer.{i}.attention.self.query",
            k="encoder.layer.{i}.attention.self.key",
            v="encoder.layer.{i}.attention.self.value",
            o="encoder.layer.{i}.attention.output.dense",
            heads="num_attention_heads",
        ),
    ),
    "llama": (
        _named(
            "decoder.self",
            "layers.{i}.self_attn",
            "num_attention_heads",
            o="o_proj",
            kv_heads="num_key_value_heads",
            rope=True,
            beside=("rotary_emb.inv_freq",),
        ),
    ),
}
