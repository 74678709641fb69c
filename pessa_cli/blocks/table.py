"""The architecture table: for each `model_type`, one row of facts per kind of attention block.

A row declares only what cannot be read from a checkpoint. Biases, the number of layers, the head size and the prefix
that some model classes put before every name are discovered from the header, see `blocks.discover`.
"""

from __future__ import annotations

from dataclasses import replace

from pessa_cli.blocks.spec import AttentionSpec, Keys, Rotation, Tower


def _block(kind: str, module: str, names: str, heads: str | Keys, **more: object) -> AttentionSpec:
    """Build a row whose projections are all in `module`; `names` is "q k v o", or "qkv o" for a fused tensor."""
    *first, o = names.split()
    q, k, v = first * 3 if len(first) == 1 else first
    facts = {side: f"{module}.{name}" for side, name in zip("qkvo", (q, k, v, o), strict=True)}
    facts |= {"heads": (heads,) if isinstance(heads, str) else heads}  # type: ignore[dict-item]
    return AttentionSpec(kind=kind, **facts, **more)  # type: ignore[arg-type]


PROJ, BIASED_O = "q_proj k_proj v_proj o_proj", "q_proj k_proj v_proj out_proj"
HEADS, KV_HEADS = "num_attention_heads", ("num_key_value_heads",)
PARTIAL = ("rope_parameters.partial_rotary_factor", "partial_rotary_factor")
QK_NORM = ("q_norm.*", "k_norm.*")
QK_LAYERNORM = ("q_layernorm.*", "k_layernorm.*")
FUSED_SELF = ("decoder.self", "h.{i}.self_attention", "query_key_value dense", HEADS)
# SigLIP's pooling head is one torch MultiheadAttention outside the layers; its tensors are copied.
POOLING = tuple(
    f"head.attention.{name}" for name in ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
)
BUFFERS = ("bias", "masked_bias")  # causal masks that old checkpoints store
BIGCODE = _block(
    *("decoder.self", "h.{i}.attn", "c_attn c_proj", "n_head"), fused="grouped", depth=("n_layer",), beside=BUFFERS
)
SEQ2SEQ = tuple(
    _block(kind, module, BIASED_O, f"{kind[:7]}_attention_heads", depth=(f"{kind[:7]}_layers",))
    for kind, module in (
        ("encoder.self", "encoder.layers.{i}.self_attn"),
        ("decoder.self", "decoder.layers.{i}.self_attn"),
        ("decoder.cross", "decoder.layers.{i}.encoder_attn"),
    )
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
VIT = (
    replace(
        BERT[0],
        q="encoder.layer.{i}.attention.attention.query",
        k="encoder.layer.{i}.attention.attention.key",
        v="encoder.layer.{i}.attention.attention.value",
    ),
)
CLIP = (_block("encoder.self", "encoder.layers.{i}.self_attn", BIASED_O, HEADS),)
T5 = tuple(
    _block(
        *(kind, module, "q k v o", "num_heads"),
        head_dim=("d_kv",),
        depth=depth,
        beside=("relative_attention_bias.weight",),
    )
    for kind, module, depth in (
        ("encoder.self", "encoder.block.{i}.layer.0.SelfAttention", ("num_layers",)),
        ("decoder.self", "decoder.block.{i}.layer.0.SelfAttention", ("num_decoder_layers", "num_layers")),
        ("decoder.cross", "decoder.block.{i}.layer.1.EncDecAttention", ("num_decoder_layers", "num_layers")),
    )
)


def _decoder(names: str = PROJ, **more: object) -> tuple[AttentionSpec, ...]:
    """Build the row of LLaMA, or of an architecture that differs from it only in `names` and `more`."""
    facts: dict[str, object] = {"kv_heads": KV_HEADS, "head_dim": ("head_dim",), "rope": Rotation()}
    facts["beside"] = ("rotary_emb.inv_freq",)
    return (_block("decoder.self", "layers.{i}.self_attn", names, HEADS, **facts | more),)


ARCHITECTURES: dict[str, tuple[AttentionSpec, ...]] = {
    "whisper": SEQ2SEQ,
    "bert": BERT,
    "llama": _decoder(),
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
    "m2m_100": SEQ2SEQ,  # also NLLB
    "blenderbot": SEQ2SEQ,
    "speech_to_text": SEQ2SEQ,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": (
        _block(
            *("encoder.self", "transformer.layer.{i}.attention", "q_lin k_lin v_lin out_lin", "n_heads"),
            depth=("n_layers",),
        ),
    ),
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
    "starcoder2": _decoder(),
    "gpt_oss": _decoder(beside=("sinks",), sums_to_one=False),
    "cohere": _decoder(rope=Rotation(interleaved=True), norms=QK_NORM),
    "cohere2": _decoder(rope=Rotation(interleaved=True, layers=("layer_types", "sliding_attention"))),
    "smollm3": _decoder(rope=Rotation(layers=("no_rope_layers", 1))),  # despite the key's name, 1 means with RoPE
    "stablelm": _decoder(rope=Rotation(PARTIAL, 0.25), norms=QK_LAYERNORM),
    "olmo": _decoder(refused=("clip_qkv",)),
    "olmo2": _decoder(norms=QK_NORM, normed=True),
    "olmo3": _decoder(norms=QK_NORM, normed=True),
    "qwen3": _decoder(norms=QK_NORM, normed=True),
    "gemma3_text": _decoder(norms=QK_NORM, normed=True),
    "phi": _decoder("q_proj k_proj v_proj dense", rope=Rotation(PARTIAL, 0.5), norms=QK_LAYERNORM),
    "phi3": _decoder("qkv_proj o_proj", fused="blocks", rope=Rotation(PARTIAL)),
    "gpt2": (
        _block(
            *("decoder.self", "h.{i}.attn", "c_attn c_proj", "n_head"),
            fused="blocks",
            transposed=True,
            depth=("n_layer",),
            beside=BUFFERS,
        ),
    ),
    "gptj": (
        _block(
            *("decoder.self", "h.{i}.attn", BIASED_O, "n_head"),
            rope=Rotation(count=("rotary_dim",), interleaved=True),
            depth=("n_layer",),
            beside=BUFFERS,
        ),
    ),
    "gpt_neo": (
        _block("decoder.self", "h.{i}.attn.attention", BIASED_O, "num_heads", depth=("num_layers",), beside=BUFFERS),
    ),
    "gpt_neox": (
        _block(
            *("decoder.self", "layers.{i}.attention", "query_key_value dense", HEADS),
            fused="grouped",
            rope=Rotation((*PARTIAL, "rotary_pct"), 0.25),
            beside=(*BUFFERS, "rotary_emb.inv_freq"),
        ),
    ),
    "gpt_bigcode": (
        replace(BIGCODE, kv_heads=1, where=(("multi_query", True, True),)),
        replace(BIGCODE, where=(("multi_query", True, False),)),
    ),
    "bloom": (
        # ALiBi is added to the scores, so it does not prevent merging Q-K.
        _block(*FUSED_SELF[:3], ("n_head", HEADS), fused="grouped", depth=("n_layer", "num_hidden_layers")),
    ),
    "falcon": (
        _block(
            *FUSED_SELF,
            fused="grouped",
            kv_heads=("num_kv_heads",),
            rope=Rotation(unless="alibi"),
            where=(("new_decoder_architecture", False, True),),
        ),
        _block(
            *FUSED_SELF,
            fused="grouped",
            kv_heads=1,
            rope=Rotation(unless="alibi"),
            where=(("new_decoder_architecture", False, False), ("multi_query", True, True)),
        ),
        _block(
            *FUSED_SELF,
            fused="grouped",
            rope=Rotation(unless="alibi"),
            where=(("new_decoder_architecture", False, False), ("multi_query", True, False)),
        ),
    ),
    "modernbert": (_block("encoder.self", "layers.{i}.attn", "Wqkv Wo", HEADS, fused="blocks", rope=Rotation()),),
    "moonshine": (
        _block(
            *("encoder.self", "encoder.layers.{i}.self_attn", PROJ, "encoder_num_attention_heads"),
            kv_heads=("encoder_num_key_value_heads",),
            head_dim=("head_dim",),
            depth=("encoder_num_hidden_layers",),
            rope=Rotation(PARTIAL, 0.9, interleaved=True),
        ),
        _block(
            *("decoder.self", "decoder.layers.{i}.self_attn", PROJ, "decoder_num_attention_heads"),
            kv_heads=("decoder_num_key_value_heads",),
            head_dim=("head_dim",),
            depth=("decoder_num_hidden_layers",),
            rope=Rotation(PARTIAL, 0.9, interleaved=True),
        ),
        _block(
            *("decoder.cross", "decoder.layers.{i}.encoder_attn", PROJ, "decoder_num_attention_heads"),
            kv_heads=("decoder_num_key_value_heads",),
            head_dim=("head_dim",),
            depth=("decoder_num_hidden_layers",),
        ),
    ),
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "albert": (  # layers share sets of weights; {i} is the number of the set
        _block(
            *("encoder.self", "encoder.albert_layer_groups.{i}.albert_layers.0.attention", "query key value dense"),
            HEADS,
            depth=("num_hidden_groups",),
            beside=("LayerNorm.*",),
        ),
    ),
    "deberta-v2": (
        AttentionSpec(
            kind="encoder.self",
            q="encoder.layer.{i}.attention.self.query_proj",
            k="encoder.layer.{i}.attention.self.key_proj",
            v="encoder.layer.{i}.attention.self.value_proj",
            o="encoder.layer.{i}.attention.output.dense",
            heads=(HEADS,),
            head_dim=("attention_head_size",),
            norms=("pos_key_proj.*", "pos_query_proj.*"),
            key_bias_stays=True,  # keys are also multiplied with projected relative positions, which differ by key
        ),
    ),
    "vit": VIT,
    "deit": VIT,
    "dinov2": VIT,
    "beit": (replace(VIT[0], beside=("relative_position_bias.*",)),),
    "clip_text_model": CLIP,
    "clip_vision_model": CLIP,
    "siglip_text_model": CLIP,
    "siglip_vision_model": (replace(CLIP[0], elsewhere=POOLING),),
    "wavlm": (
        _block(
            *("encoder.self", "encoder.layers.{i}.attention", BIASED_O, HEADS),
            beside=("gru_rel_pos_*", "rel_attn_embed.*"),
            compact=False,
        ),
    ),
}
TEXT = Tower("text", "text_config", ("language_model.",))
VISION = Tower("vision", "vision_config", ("vision_tower.",))
QWEN_VISION = Tower(
    *("vision", "vision_config", ("visual.",)),
    (
        _block(
            *("encoder.self", "blocks.{i}.attn", "qkv proj", "num_heads"),
            fused="blocks",
            rope=Rotation(),
            depth=("depth",),
        ),
    ),
)
TOWERS: dict[str, tuple[Tower, ...]] = {
    "clip": (
        Tower("text", "text_config", ("text_model.",), CLIP),
        Tower("vision", "vision_config", ("vision_model.",), CLIP),
    ),
    "siglip": (
        Tower("text", "text_config", ("text_model.",), CLIP),
        Tower("vision", "vision_config", ("vision_model.",), ARCHITECTURES["siglip_vision_model"]),
    ),
    "llava": (TEXT, VISION),
    "gemma3": (TEXT, VISION),
    "paligemma": (TEXT, VISION),
    "qwen2_vl": (replace(TEXT, under=(), rows=ARCHITECTURES["qwen2"]), QWEN_VISION),  # hub configs have no text_config
    "qwen2_5_vl": (replace(TEXT, under=(), rows=ARCHITECTURES["qwen2"]), QWEN_VISION),
    "qwen3_vl": (replace(TEXT, rows=ARCHITECTURES["qwen3"]), QWEN_VISION),
    "qwen2_audio": (
        TEXT,
        Tower(
            *("audio", "audio_config", ("audio_tower.",)),
            (
                _block(
                    *("encoder.self", "layers.{i}.self_attn", BIASED_O, "encoder_attention_heads"),
                    depth=("encoder_layers",),
                ),
            ),
        ),
    ),
    "mllama": (
        replace(
            TEXT,
            rows=(
                *_decoder(sparse=True),
                _block(
                    *("decoder.cross", "layers.{i}.cross_attn", PROJ, HEADS),
                    kv_heads=KV_HEADS,
                    norms=QK_NORM,
                    normed=True,
                    sparse=True,
                ),
            ),
        ),
        Tower(
            *("vision", "vision_config", ("vision_model.",)),
            (
                _block("encoder.self", "transformer.layers.{i}.self_attn", PROJ, "attention_heads"),
                _block(
                    *("encoder.global", "global_transformer.layers.{i}.self_attn", PROJ, "attention_heads"),
                    depth=("num_global_layers",),
                ),
            ),
        ),
    ),
}
FIRST_RELEASE = "0.1.0"
SINCE: dict[str, str] = {}  # the first release of rows that were added after FIRST_RELEASE
# Published models that the tests run, in addition to the tiny random model of each row.
PUBLISHED = {"whisper": "openai/whisper-tiny.en", "bert": "all-MiniLM-L6-v2", "llama": "SmolLM2-135M"}
