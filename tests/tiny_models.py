"""Tiny models of every row of the table, from transformers' own configs, and inputs that each of them reads.

As data: for each `model_type`, and its variants behind a space, the class, its config and what it reads. Attention
weights are drawn from N(0, 0.4), as in `tiny`.
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
}


def build(name: str) -> PreTrainedModel:
    """A tiny model by name, float32, in eval mode."""
    kind, config, _ = TINIES[name]
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(transformers, kind)(getattr(transformers, kind).config_class(**config))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "norm" not in key.lower() and any(part in key.lower() for part in ("attn", "attention")):
                parameter.normal_(0, 0.4)
    return made.eval()


def inputs(name: str) -> dict[str, torch.Tensor]:
    """What a tiny model reads, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 80, (2, 9), generator=generator)
    said = torch.randint(5, 80, (2, 7), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

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
        case kind:
            raise KeyError(kind)


def outputs(name: str, model: Any) -> torch.Tensor:
    """What it says to them."""
    with torch.no_grad():
        found = model(**inputs(name))
    logits: torch.Tensor = found.logits
    return logits
