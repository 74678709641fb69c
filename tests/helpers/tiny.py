"""Tiny models with attention weights large enough that every error changes the outputs.

With default initialisation the weights are so small that attention is nearly uniform. With weights drawn from N(0, 0.4)
every projection and bias matters.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

ATTENTION = ("self_attn", "encoder_attn", "attention")


def build(name: str) -> PreTrainedModel:
    """Build a tiny model by name, in float32 and eval mode."""
    torch.manual_seed(0)
    model = {"whisper": _whisper, "bert": _bert, "llama": _llama, "llama-biased": _llama_biased}[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(part in key for part in ATTENTION) and "norm" not in key.lower():
                parameter.normal_(0, 0.4)
    return model.eval()


NAMES = ("whisper", "bert", "llama", "llama-biased")


def save(name: str, folder: Path, **kwargs: Any) -> Path:
    """Save a tiny model to a folder; keyword arguments are those of save_pretrained."""
    build(name).save_pretrained(folder, **kwargs)
    return folder


def inputs(model: PreTrainedModel, batch: int = 2) -> dict[str, torch.Tensor]:
    """Return sample inputs for a tiny model, the same on every call."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 90, (batch, 9), generator=generator)
    if model.config.model_type == "whisper":
        features = torch.randn(batch, 8, 60, generator=generator).to(model.dtype)
        return {"input_features": features, "decoder_input_ids": ids}
    mask = torch.ones_like(ids)
    mask[-1, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def _whisper() -> PreTrainedModel:
    return WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=100,
            num_mel_bins=8,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_source_positions=30,
            max_target_positions=40,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            suppress_tokens=None,
            begin_suppress_tokens=None,
        )
    )


def whisper_with_tokenizer(source: Path, folder: Path) -> Path:
    """Save a tiny Whisper with the processor, the tokenizer and the special tokens of a real one."""
    theirs = read_config(source)
    kept = [key for key in theirs if key.endswith(("_id", "_tokens")) or key in ("vocab_size", "num_mel_bins")]
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_target_positions": 40}
    WhisperForConditionalGeneration(
        WhisperConfig(**sizes, **heads, **{key: theirs[key] for key in kept})
    ).save_pretrained(folder)
    for name in ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / name, folder / name)
    return folder


def _bert() -> PreTrainedModel:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            max_position_embeddings=40,
        )
    )


def _llama_config(**more: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        **more,
    )


def _llama() -> PreTrainedModel:
    return LlamaForCausalLM(_llama_config())


def _llama_biased() -> PreTrainedModel:
    """A LLaMA with biases on all four projections, and heads wider than hidden_size / heads."""
    return LlamaForCausalLM(_llama_config(attention_bias=True, head_dim=12))


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json unchanged, not interpreted by a config class."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def load(folder: Path, **options: Any) -> Any:
    """Load the model in the class that its config names; options are those of from_pretrained."""
    kind = getattr(transformers, read_config(folder)["architectures"][0])
    return kind.from_pretrained(folder, **options).eval()


def close(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    """Return whether two models give the same outputs for the sample inputs."""
    with torch.no_grad():
        x, y = a(**inputs(a)).logits, b(**inputs(b)).logits
    return float((x.float() - y.float()).norm() / x.float().norm()) < tolerance
