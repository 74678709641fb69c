"""The architecture table's rows of MLPs: for each `model_type` and each tower, one row per kind of MLP.

As in `blocks.table`, a row declares only what cannot be read from a checkpoint. In every architecture of the table the
activation acts on each channel alone and nothing but dropout stands between it and the matrix that reads the channels.
"""

from __future__ import annotations

from dataclasses import replace

from pessa_cli.blocks.mlp_spec import MlpSpec
from pessa_cli.blocks.spec import Keys


def _mlp(kind: str, layer: str, names: str, width: str | Keys = "intermediate_size", **more: object) -> MlpSpec:
    """Build a row; `names` are those of the matrices within the layer, of which the last reads the channels."""
    *into, out = names.split()
    keys = (width,) if isinstance(width, str) else width
    return MlpSpec(kind=kind, layer=layer, into=tuple(into), out=out, width=keys, **more)  # type: ignore[arg-type]


FC, GATED = "mlp.fc1 mlp.fc2", "mlp.gate_proj mlp.up_proj mlp.down_proj"
GPT, NEOX = "mlp.c_fc mlp.c_proj", "mlp.dense_h_to_4h mlp.dense_4h_to_h"
LAYERS, ENCODER, DECODER = "layers.{i}", "encoder.layers.{i}", "decoder.layers.{i}"


def _decoder(names: str = GATED, **more: object) -> tuple[MlpSpec, ...]:
    """Build the row of LLaMA, or of an architecture that differs from it only in `names` and `more`."""
    return (_mlp("decoder.mlp", LAYERS, names, **more),)  # type: ignore[arg-type]


def _gpt(names: str, width: str | Keys, **more: object) -> tuple[MlpSpec, ...]:
    """Build the row of an architecture with layers named "h", whose default is four channels per input."""
    facts: dict[str, object] = {"ratio": 4, "depth": ("n_layer",)}
    return (_mlp("decoder.mlp", "h.{i}", names, width, **facts | more),)


def _routed(*patterns: str) -> tuple[MlpSpec, ...]:
    """Build the row of a decoder whose MLPs are routed experts alone."""
    return (MlpSpec(kind="decoder.mlp", layer=LAYERS, routed=patterns),)


def _t5(usual: str) -> tuple[MlpSpec, ...]:
    """Build the rows of T5; `usual` is the default of `feed_forward_proj`, which says whether the MLPs are gated."""
    return tuple(
        _mlp(
            *(f"{stack}.mlp", f"{stack}.block.{{i}}"),
            " ".join(f"layer.{place}.DenseReluDense.{name}" for name in names),
            "d_ff",
            depth=depth,
            where=(("feed_forward_proj", usual, pattern),),
        )
        for stack, place, depth in (
            ("encoder", 1, ("num_layers",)),
            ("decoder", 2, ("num_decoder_layers", "num_layers")),
        )
        for names, pattern in ((("wi", "wo"), "(?!gated-).*"), (("wi_0", "wi_1", "wo"), "gated-.*"))
    )


SEQ2SEQ = tuple(
    _mlp(f"{stack}.mlp", f"{stack}.layers.{{i}}", "fc1 fc2", f"{stack}_ffn_dim", depth=(f"{stack}_layers",))
    for stack in ("encoder", "decoder")
)
VIT = (_mlp("encoder.mlp", "encoder.layer.{i}", "intermediate.dense output.dense"),)
BERT = (replace(VIT[0], beside=("output.LayerNorm.*",)),)
CLIP = (_mlp("encoder.mlp", ENCODER, FC),)
WAV2VEC2 = (
    _mlp(
        *("encoder.mlp", ENCODER, "feed_forward.intermediate_dense feed_forward.output_dense"),
        beside=("adapter_layer.*",),  # of MMS, one for each language
    ),
)
DINOV2 = _mlp("encoder.mlp", "encoder.layer.{i}", FC, (), ratio=("mlp_ratio",))
FALCON = _gpt(NEOX, "ffn_hidden_size", depth=("num_hidden_layers",))
MLPS: dict[str, tuple[MlpSpec, ...]] = {
    "whisper": SEQ2SEQ,
    "bert": BERT,
    "llama": _decoder(),
    "bart": SEQ2SEQ,
    "mbart": SEQ2SEQ,
    "marian": SEQ2SEQ,
    "pegasus": SEQ2SEQ,
    "m2m_100": SEQ2SEQ,
    "blenderbot": SEQ2SEQ,
    "speech_to_text": SEQ2SEQ,
    "roberta": BERT,
    "xlm-roberta": BERT,
    "camembert": BERT,
    "electra": BERT,
    "distilbert": (
        _mlp("encoder.mlp", "transformer.layer.{i}", "ffn.lin1 ffn.lin2", "hidden_dim", depth=("n_layers",)),
    ),
    "mpnet": BERT,
    "opt": (_mlp("decoder.mlp", DECODER, "fc1 fc2", "ffn_dim"),),
    "wav2vec2": WAV2VEC2,
    "hubert": WAV2VEC2,
    "mistral": _decoder(),
    "mixtral": _routed("block_sparse_moe.*", "mlp.*"),
    "gemma": _decoder(),
    "gemma2": _decoder(),
    "qwen2": _decoder(),
    "starcoder2": _decoder(GPT),
    "gpt_oss": _routed("mlp.*"),
    "cohere": _decoder(),
    "cohere2": _decoder(),
    "smollm3": _decoder(),
    "stablelm": _decoder(),
    "olmo": _decoder(),
    "olmo2": _decoder(),
    "olmo3": _decoder(),
    "qwen3": _decoder(),
    "gemma3_text": _decoder(),
    "phi": _decoder(FC),
    "phi3": _decoder("mlp.gate_up_proj mlp.down_proj", parts=2),
    "gpt2": _gpt(GPT, "n_inner", transposed=True),
    "gptj": _gpt("mlp.fc_in mlp.fc_out", "n_inner"),
    "gpt_neo": _gpt(GPT, "intermediate_size", depth=("num_layers",)),
    "gpt_neox": _decoder(NEOX),
    "gpt_bigcode": _gpt(GPT, "n_inner"),
    "bloom": _gpt(NEOX, (), depth=("n_layer", "num_hidden_layers")),
    "falcon": FALCON,
    "modernbert": (_mlp("encoder.mlp", LAYERS, "mlp.Wi mlp.Wo", parts=2),),
    "moonshine": (
        _mlp("encoder.mlp", ENCODER, FC, depth=("encoder_num_hidden_layers",)),
        _mlp("decoder.mlp", DECODER, FC, depth=("decoder_num_hidden_layers",), parts=2),
    ),
    "t5": _t5("relu"),
    "mt5": _t5("gated-gelu"),
    "umt5": _t5("gated-gelu"),
    "albert": (
        _mlp(
            *("encoder.mlp", "encoder.albert_layer_groups.{i}.albert_layers.0", "ffn ffn_output"),
            depth=("num_hidden_groups",),
        ),
    ),
    "deberta-v2": BERT,
    "vit": VIT,
    "deit": VIT,
    "dinov2": (
        replace(DINOV2, where=(("use_swiglu_ffn", False, False),)),
        replace(
            DINOV2,
            into=("mlp.weights_in",),
            out="mlp.weights_out",
            parts=2,
            two_thirds=True,
            compact=False,  # transformers splits the tensor in two when it loads it
            where=(("use_swiglu_ffn", False, True),),
        ),
    ),
    "beit": VIT,
    "clip_text_model": CLIP,
    "clip_vision_model": CLIP,
    "siglip_text_model": CLIP,
    "siglip_vision_model": CLIP,
    "wavlm": WAV2VEC2,
}


def _visual(names: str, **more: object) -> tuple[MlpSpec, ...]:
    """Build the row of the vision tower of a Qwen-VL."""
    return (_mlp("encoder.mlp", "blocks.{i}", names, depth=("depth",), **more),)  # type: ignore[arg-type]


# The rows of the towers of multimodal models, by the kind of the tower; those of other towers are the rows of the
# `model_type` in their config. The MLPs outside the layers (pooling heads, mergers, projectors) are copied.
TOWER_MLPS: dict[str, dict[str, tuple[MlpSpec, ...]]] = {
    "clip": {"text": CLIP, "vision": CLIP},
    "siglip": {"text": CLIP, "vision": CLIP},
    "qwen2_vl": {"text": _decoder(), "vision": _visual(FC, width=(), ratio=("mlp_ratio",))},
    "qwen2_5_vl": {"text": _decoder(), "vision": _visual(GATED)},
    "qwen3_vl": {"text": _decoder(), "vision": _visual("mlp.linear_fc1 mlp.linear_fc2")},
    "qwen2_audio": {"audio": (_mlp("encoder.mlp", LAYERS, "fc1 fc2", "encoder_ffn_dim", depth=("encoder_layers",)),)},
    "mllama": {
        "text": _decoder(),
        "vision": (
            _mlp("encoder.mlp", "transformer.layers.{i}", FC),
            _mlp("encoder.global_mlp", "global_transformer.layers.{i}", FC, depth=("num_global_layers",)),
        ),
    },
}
