"""Tiny models of every row of the architecture table, from transformers' own configs, and inputs for each of them.

They are described as data: for each `model_type`, with the name of a variant after a space, the class, its config and
the kind of inputs. Attention weights are drawn from N(0, 0.4), as in `tiny`.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
ROBERTA = TEXT | {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
LLM = TEXT | TOKENS
GROUPED = LLM | {"num_key_value_heads": 2}
WIDE = GROUPED | {"head_dim": 12}
MIXED = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
BART: dict[str, Any] = TOKENS | {
    "vocab_size": 100,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
    "scale_embedding": True,
}
HEARING = {"max_source_positions": 60, "max_target_positions": 40}
W2V: dict[str, Any] = TOKENS | {
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16],
    "conv_stride": [5, 2],
    "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
    "apply_spec_augment": False,
}
DISTIL = {"vocab_size": 100, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64}
OPT = {key: value for key, value in ROBERTA.items() if key != "intermediate_size"} | {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
GPT = {"vocab_size": 100, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4} | {
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FALCON = {key: value for key, value in LLM.items() if key != "intermediate_size"} | {
    "ffn_hidden_size": 48,
    "bias": False,
    "alibi": False,
}
MOONSHINE = {"hidden_layers": 2, "attention_heads": 4, "key_value_heads": 4}
UNSCALED = 12  # T5 does not divide scores by its square root, which is absorbed in W_Q
T5: dict[str, Any] = {
    "vocab_size": 100,
    "d_model": 32,
    "d_kv": UNSCALED,
    "d_ff": 48,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
DEBERTA = TEXT | {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "max_relative_positions": -1,
    "pad_token_id": 0,
    "type_vocab_size": 0,
}
VIT: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "num_channels": 3,
}
CLIP_TEXT = LLM | {"max_position_embeddings": 40}
DEFAULT_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = DEFAULT_ROPE | {"mrope_section": [1, 1, 2]}
QWEN_VL: dict[str, Any] = {
    "text_config": GROUPED | {"rope_parameters": MROPE},
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}

TINIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "whisper": (
        "WhisperForConditionalGeneration",
        BART | {"num_mel_bins": 8, "max_source_positions": 30, "suppress_tokens": None, "begin_suppress_tokens": None},
        "speech",
    ),
    "bert": ("BertForMaskedLM", TEXT | {"pad_token_id": 0}, "text"),
    "llama": ("LlamaForCausalLM", GROUPED, "text"),
    "bart": ("BartForConditionalGeneration", BART, "texts"),
    "mbart": ("MBartForConditionalGeneration", BART, "texts"),
    "marian": ("MarianMTModel", BART, "texts"),
    "pegasus": ("PegasusForConditionalGeneration", BART, "texts"),
    "m2m_100": ("M2M100ForConditionalGeneration", BART, "texts"),
    "blenderbot": ("BlenderbotForConditionalGeneration", BART, "texts"),
    "speech_to_text": (
        "Speech2TextForConditionalGeneration",
        {key: value for key, value in BART.items() if key not in ("max_position_embeddings", "forced_eos_token_id")}
        | HEARING
        | {"input_feat_per_channel": 8, "conv_channels": 16},
        "frames",
    ),
    "roberta": ("RobertaForMaskedLM", ROBERTA, "text"),
    "xlm-roberta": ("XLMRobertaForMaskedLM", ROBERTA, "text"),
    "camembert": ("CamembertForMaskedLM", ROBERTA, "text"),
    "electra": ("ElectraForMaskedLM", TEXT | {"embedding_size": 16, "pad_token_id": 0}, "text"),
    "distilbert": ("DistilBertForMaskedLM", DISTIL | {"pad_token_id": 0}, "text"),
    "mpnet": ("MPNetForMaskedLM", ROBERTA, "text"),
    "opt": ("OPTForCausalLM", OPT, "text"),
    "wav2vec2": ("Wav2Vec2ForCTC", W2V, "audio"),
    "hubert": ("HubertForCTC", W2V, "audio"),
    "mistral": ("MistralForCausalLM", WIDE | {"sliding_window": 4}, "text"),
    "mixtral": ("MixtralForCausalLM", GROUPED | MOE, "text"),
    "gemma": ("GemmaForCausalLM", WIDE | {"num_key_value_heads": 1}, "text"),
    "gemma2": ("Gemma2ForCausalLM", WIDE | {"sliding_window": 4, "query_pre_attn_scalar": 20}, "text"),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | {"use_sliding_window": True, "sliding_window": 4}, "text"),
    "starcoder2": ("Starcoder2ForCausalLM", GROUPED | {"sliding_window": 4, "use_bias": True}, "text"),
    "gpt_oss": ("GptOssForCausalLM", WIDE | MOE | MIXED, "text"),
    "cohere": ("CohereForCausalLM", GROUPED, "text"),
    "cohere norms": ("CohereForCausalLM", GROUPED | {"use_qk_norm": True}, "text"),
    "cohere2": ("Cohere2ForCausalLM", GROUPED | MIXED, "text"),
    "smollm3": ("SmolLM3ForCausalLM", GROUPED | {"no_rope_layers": [1, 0]}, "text"),
    "stablelm": (
        "StableLmForCausalLM",
        GROUPED | {"hidden_size": 64, "use_qkv_bias": True, "partial_rotary_factor": 0.25},
        "text",
    ),
    "stablelm norms": (
        "StableLmForCausalLM",
        GROUPED | {"hidden_size": 64, "qk_layernorm": True, "partial_rotary_factor": 0.25},
        "text",
    ),
    "olmo": ("OlmoForCausalLM", GROUPED, "text"),
    "olmo2": ("Olmo2ForCausalLM", GROUPED, "text"),
    "olmo3": ("Olmo3ForCausalLM", GROUPED | MIXED, "text"),
    "qwen3": ("Qwen3ForCausalLM", WIDE, "text"),
    "gemma3_text": ("Gemma3ForCausalLM", WIDE | MIXED | {"query_pre_attn_scalar": 20}, "text"),
    "phi": ("PhiForCausalLM", LLM | {"hidden_size": 64, "partial_rotary_factor": 0.5}, "text"),
    "phi norms": ("PhiForCausalLM", LLM | {"hidden_size": 64, "qk_layernorm": True}, "text"),
    "phi3": ("Phi3ForCausalLM", GROUPED | {"sliding_window": 4}, "text"),
    "phi3 partial": ("Phi3ForCausalLM", GROUPED | {"partial_rotary_factor": 0.5}, "text"),
    "gpt2": ("GPT2LMHeadModel", GPT, "text"),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}, "text"),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {key: value for key, value in LLM.items() if "num" not in key}
        | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        "text",
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", LLM | {"hidden_size": 64, "rotary_pct": 0.25}, "text"),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", GPT | {"multi_query": True}, "text"),
    "gpt_bigcode mha": ("GPTBigCodeForCausalLM", GPT | {"multi_query": False}, "text"),
    "bloom": ("BloomForCausalLM", TOKENS | {"vocab_size": 100, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "text"),
    "falcon": ("FalconForCausalLM", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}, "text"),
    "falcon 7b": ("FalconForCausalLM", FALCON | {"new_decoder_architecture": False, "multi_query": True}, "text"),
    "falcon rw": (
        "FalconForCausalLM",
        FALCON
        | {
            "new_decoder_architecture": False,
            "multi_query": False,
            "alibi": True,
            "bias": True,
            "parallel_attn": False,
        },
        "text",
    ),
    "modernbert": (
        "ModernBertForMaskedLM",
        TEXT | TOKENS | {"cls_token_id": 1, "sep_token_id": 2, "local_attention": 6, "global_attn_every_n_layers": 2},
        "text",
    ),
    "moonshine": (
        "MoonshineForConditionalGeneration",
        TOKENS
        | {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 48, "decoder_start_token_id": 1}
        | {f"{side}_num_{what}": n for side in ("encoder", "decoder") for what, n in MOONSHINE.items()}
        | {"partial_rotary_factor": 0.5, "max_position_embeddings": 64},
        "sound",
    ),
    "t5": ("T5ForConditionalGeneration", T5, "texts"),
    "mt5": ("MT5ForConditionalGeneration", T5 | GATED, "texts"),
    "umt5": ("UMT5ForConditionalGeneration", T5 | GATED, "texts"),
    "albert": (
        "AlbertForMaskedLM",
        TEXT | {"embedding_size": 16, "num_hidden_layers": 3, "num_hidden_groups": 1, "pad_token_id": 0},
        "text",
    ),
    "deberta-v2": ("DebertaV2ForMaskedLM", DEBERTA, "text"),
    "deberta-v2 apart": ("DebertaV2ForMaskedLM", DEBERTA | {"share_att_key": False}, "text"),
    "vit": ("ViTForImageClassification", VIT | {"num_labels": 5}, "image"),
    "deit": ("DeiTForImageClassification", VIT | {"num_labels": 5}, "image"),
    "dinov2": ("Dinov2ForImageClassification", VIT | {"num_labels": 5, "mlp_ratio": 2}, "image"),
    "beit": ("BeitForImageClassification", VIT | {"num_labels": 5, "use_relative_position_bias": True}, "image"),
    "clip_text_model": ("CLIPTextModel", CLIP_TEXT, "caption"),
    "clip_vision_model": ("CLIPVisionModel", VIT, "image"),
    "siglip_text_model": ("SiglipTextModel", CLIP_TEXT | {"projection_size": 32}, "caption"),
    "siglip_vision_model": ("SiglipVisionModel", VIT, "image"),
    "clip": ("CLIPModel", {"text_config": CLIP_TEXT, "vision_config": VIT, "projection_dim": 16}, "image and caption"),
    "siglip": (
        "SiglipModel",
        {"text_config": CLIP_TEXT | {"projection_size": 32}, "vision_config": VIT},
        "image and caption",
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": GROUPED | {"model_type": "llama"},
            "vision_config": VIT | {"model_type": "clip_vision_model"},
            "image_token_index": 90,
            "vision_feature_layer": -1,
        },
        "image in text",
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": WIDE | MIXED | {"query_pre_attn_scalar": 20},
            "vision_config": VIT,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
            "boi_token_index": 91,
            "eoi_token_index": 92,
        },
        "small image in text",
    ),
    "paligemma": (
        "PaliGemmaForConditionalGeneration",
        {
            "text_config": WIDE | {"model_type": "gemma", "num_key_value_heads": 1},
            "vision_config": VIT | {"model_type": "siglip_vision_model", "projection_dim": 32},
            "image_token_index": 90,
            "projection_dim": 32,
        },
        "image in text",
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        QWEN_VL | {"vision_config": QWEN_VISION | {"embed_dim": 32, "mlp_ratio": 2}},
        "patches in text",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        QWEN_VL
        | {
            "vision_config": QWEN_VISION
            | {"out_hidden_size": 32, "intermediate_size": 48, "window_size": 8, "fullatt_block_indexes": [1]}
        },
        "patches in text",
    ),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        QWEN_VL
        | {
            "text_config": WIDE | {"rope_parameters": MROPE | {"mrope_section": [2, 2, 2]}},
            "vision_config": QWEN_VISION
            | {
                "out_hidden_size": 32,
                "intermediate_size": 48,
                "deepstack_visual_indexes": [0],
                "num_position_embeddings": 16,
            },
        },
        "patches in text",
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        {
            "text_config": GROUPED | {"model_type": "qwen2"},
            "audio_config": {
                "model_type": "qwen2_audio_encoder",
                "num_mel_bins": 8,
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "max_source_positions": 20,
            },
            "audio_token_index": 90,
        },
        "sound in text",
    ),
    "mllama": (
        "MllamaForConditionalGeneration",
        {
            "text_config": GROUPED
            | {"num_hidden_layers": 3, "cross_attention_layers": [1], "rope_parameters": DEFAULT_ROPE},
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_global_layers": 1,
                "attention_heads": 4,
                "num_attention_heads": 4,
                "intermediate_size": 48,
                "vision_output_dim": 64,
                "image_size": 16,
                "patch_size": 4,
                "max_num_tiles": 2,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1], [1, 2]],
            },
            "image_token_index": 99,
        },
        "tiles and text",
    ),
    "wavlm": ("WavLMForCTC", W2V | {"num_buckets": 16, "max_bucket_distance": 40}, "audio"),
}


def build(name: str, kind: str = "", **more: Any) -> PreTrainedModel:
    """Build a tiny model by name, in float32 and eval mode.

    kind: another class than that of the table; more: further values of its config.
    """
    usual, config, _ = TINIES[name]
    kind, config = kind or usual, config | more
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "norm" not in key.lower() and any(part in key.lower() for part in ("attn", "attention")):
                parameter.normal_(0, 0.4 * UNSCALED**-0.5 if key.endswith("Attention.q.weight") else 0.4)
            if key.endswith("_attn_gate") or "gate_attn" in key or "gate_ffn" in key:
                parameter.fill_(0.5)  # initialised as zero, which would hide the attention behind it
            if key.endswith("mm_input_projection_weight"):
                parameter.normal_(0, 0.4)
    return made.eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """Return the inputs of a tiny model, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 80, (2, 9), generator=generator)
    said = torch.randint(5, 80, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def of_image(count: int) -> dict[str, torch.Tensor]:
        text = torch.randint(5, 80, (2, count + 6), generator=generator)
        text[:, 2 : 2 + count] = 90
        types = {} if name == "llava" else {"token_type_ids": (text == 90).long()}
        return {"input_ids": text, "attention_mask": torch.ones_like(text)} | types

    match TINIES[name][2]:
        case "text":
            return {"input_ids": ids, "attention_mask": mask}
        case "texts":
            return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": said}
        case "speech":
            return {"input_features": noise(2, 8, 60), "decoder_input_ids": said}
        case "frames":
            return {
                "input_features": noise(2, 60, 8),
                "attention_mask": torch.ones(2, 60).long(),
                "decoder_input_ids": said,
            }
        case "audio":
            return {"input_values": noise(2, 400)}
        case "sound":
            return {"input_values": noise(2, 6000), "decoder_input_ids": said}
        case "image":
            return {"pixel_values": noise(2, 3, 16, 16)}
        case "caption":
            ids[:, -1] = 2
            return {"input_ids": ids}
        case "image and caption":
            ids[:, -1] = 2
            return {"input_ids": ids, "pixel_values": noise(2, 3, 16, 16)}
        case "image in text":
            return of_image(16) | {"pixel_values": noise(2, 3, 16, 16)}
        case "small image in text":
            return of_image(4) | {"pixel_values": noise(2, 3, 16, 16)}
        case "sound in text":
            heard = torch.ones(2, 40).long()
            given = of_image(10)
            del given["token_type_ids"]
            return given | {"input_features": noise(2, 8, 40), "feature_attention_mask": heard}
        case "patches in text":
            text = torch.randint(5, 80, (2, 12), generator=generator)
            text[:, 2:8] = torch.tensor([92, 90, 90, 90, 90, 93])
            return {
                "input_ids": text,
                "attention_mask": torch.ones_like(text),
                "mm_token_type_ids": (text == 90).int(),
                "pixel_values": noise(32, 3 * 2 * 4 * 4),
                "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            }
        case "tiles and text":
            return {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "pixel_values": noise(2, 1, 2, 3, 16, 16),
                "aspect_ratio_ids": torch.full((2, 1), 2),
                "aspect_ratio_mask": torch.ones(2, 1, 2).long(),
                "cross_attention_mask": torch.ones(2, 9, 1, 2).long(),
            }
        case kind:
            raise KeyError(kind)


def outputs(name: str, model: Any) -> torch.Tensor:
    """Return its outputs for these inputs."""
    with torch.no_grad():
        found = model(**inputs(name))
    what = ("logits", "last_hidden_state", "text_embeds", "image_embeds")
    return torch.cat([found[key].flatten() for key in what if found.get(key) is not None])
