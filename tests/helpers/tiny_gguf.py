"""Tiny models as llama.cpp stores them, written by the gguf package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tiny_models import GROUPED, WIDE
from transformers import PreTrainedModel

Type = gguf.GGMLQuantizationType
LONG = {"hidden_size": 64, "intermediate_size": 96}  # rows of whole blocks of quantised types
# For each case: the class, its config, and the keys that llama.cpp writes beside the sizes.
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", GROUPED | LONG | {"rope_theta": 500.0}, {}),
    "llama wide": (
        "LlamaForCausalLM",
        GROUPED | {"hidden_size": 256, "num_hidden_layers": 1, "intermediate_size": 256},
        {},
    ),
    "llama linear": (
        "LlamaForCausalLM",
        GROUPED | LONG | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 4.0}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "llama 3.1": (
        "LlamaForCausalLM",
        GROUPED
        | LONG
        | {
            "rope_parameters": {
                **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0},
                **{"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
            }
        },
        {},
    ),
    "qwen2": ("Qwen2ForCausalLM", GROUPED | LONG | {"rope_theta": 500.0}, {}),
    "qwen3": ("Qwen3ForCausalLM", WIDE | LONG | {"head_dim": 20, "rope_theta": 500.0}, {"attention.key_length": 20}),
    "gemma2": (
        "Gemma2ForCausalLM",
        WIDE | LONG | {"sliding_window": 4, "query_pre_attn_scalar": 12, "attn_logit_softcapping": 20.0},
        {"attention.key_length": 12, "attention.sliding_window": 4, "attn_logit_softcapping": 20.0},
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        WIDE
        | LONG
        | {
            **{"sliding_window": 4, "query_pre_attn_scalar": 12, "num_hidden_layers": 7},
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        {
            **{"attention.key_length": 12, "attention.sliding_window": 4},
            **{"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
        },
    ),
    "phi3": (
        "Phi3ForCausalLM",
        GROUPED | LONG | {"sliding_window": 4, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
        {"attention.sliding_window": 4, "rope.dimension_count": 8},
    ),
    "starcoder2": (
        "Starcoder2ForCausalLM",
        GROUPED | LONG | {"use_bias": True, "sliding_window": None, "rope_theta": 500.0},
        {"attention.layer_norm_epsilon": 1e-5},
    ),
    "stablelm": (
        "StableLmForCausalLM",
        GROUPED | LONG | {"use_qkv_bias": True, "partial_rotary_factor": 0.25},
        {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 4, "use_parallel_residual": True},
    ),
}


def build(case: str) -> PreTrainedModel:
    """The model of a case; every tensor is random, so that none is what it is by default."""
    name, values, _ = MODELS[case]
    torch.manual_seed(0)
    config = getattr(transformers, name.replace("ForCausalLM", "TextConfig" if "Gemma3" in name else "Config"))
    model = getattr(transformers, name)(config(**values))
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            spread = 0.4 if "attn" in parameter_name else 0.1
            parameter.copy_(torch.randn(parameter.shape) * spread + (parameter.dim() == 1))
    found: PreTrainedModel = model.eval()
    return found


def write(
    path: Path, case: str = "llama", kind: Any = Type.F32, more: Mapping[str, Any] | None = None
) -> PreTrainedModel:
    """Write the model of a case as llama.cpp's converter does; return it with the weights after dequantisation.

    more: further keys of the architecture.
    """
    model = build(case)
    config, architecture = model.config, case.split()[0]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if hasattr(config, "rms_norm_eps"):
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    for key, value in (MODELS[case][2] | dict(more or {})).items():
        add = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
        add[type(value)](f"{architecture}.{key}", value)
    _add_tokenizer(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    stored: dict[str, torch.Tensor] = {}
    tied = config.tie_word_embeddings
    for ours, tensor in model.state_dict().items():
        if tied and ours.startswith("lm_head"):
            continue
        theirs = names.get_name(ours, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, ours
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
            theirs.split(".")[-2] if architecture == "llama" else "", 0
        )
        shift = 1 if architecture.startswith("gemma") and "norm" in theirs else 0
        stored[ours] = _add_tensor(writer, theirs, tensor, kind, heads, shift)
    if case == "llama 3.1":
        writer.add_tensor("rope_freqs.weight", _divisors(config.rope_parameters, config.hidden_size // 4))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.load_state_dict(stored, strict=not tied)
    return model


def _add_tensor(writer: Any, name: str, tensor: torch.Tensor, kind: Any, heads: int, shift: int) -> torch.Tensor:
    """Add a tensor in llama.cpp's order of rows; return what comes out of the file."""
    shape = tensor.shape
    array = tensor + shift
    if heads:  # halves of a head are interleaved, because llama.cpp rotates neighbours
        array = array.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape)
    as_kind = kind if tensor.dim() == 2 and shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F32
    data = _quantized(array.contiguous().numpy(), as_kind)
    writer.add_tensor(name, data, raw_dtype=as_kind)
    back = torch.from_numpy(np.array(gguf.quants.dequantize(data, as_kind), dtype=np.float32)).reshape(shape)
    if heads:
        back = back.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape)
    return back - shift


def _quantized(array: np.ndarray[Any, Any], kind: Any) -> np.ndarray[Any, Any]:
    """Quantise, or for types that the gguf package only reads, draw random blocks with small scales."""
    if kind not in (Type.Q4_K, Type.Q6_K):
        return np.asarray(gguf.quants.quantize(array, kind))
    items, nbytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (*array.shape[:-1], array.shape[-1] // items, nbytes), np.uint8)
    scales = np.array([0.0005, 0.00375, 0.0001], np.float16).view(np.uint8)
    if kind == Type.Q4_K:  # a scale and an offset
        blocks[..., :4] = scales[:4]
    else:
        blocks[..., -2:] = scales[4:]
    return blocks.reshape(*array.shape[:-1], -1)


def _divisors(rope: Mapping[str, Any], head_dim: int) -> np.ndarray[Any, Any]:
    """What llama.cpp's converter writes for Llama 3.1, with its own formula."""
    freqs = 1.0 / (rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
    context, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for freq in freqs:
        wavelength = 2 * torch.pi / freq
        if wavelength < context / high:
            factors.append(1)
        elif wavelength > context / low:
            factors.append(rope["factor"])
        else:
            smooth = (context / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def _add_tokenizer(writer: Any, size: int) -> None:
    """A byte-pair tokenizer of single characters and a few pairs."""
    writer.add_tokenizer_model("gpt2")
    letters = [chr(code) for code in range(0x21, 0x7B)]
    tokens = ["<unk>", "<s>", "</s>", *letters, "ab", "cd", "ef", "gh", "ij", "kl", "mn"]
    assert len(tokens) == size
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * size)
    writer.add_token_types([3] * 3 + [1] * (size - 3))
    writer.add_token_merges(["a b", "c d", "e f", "g h", "i j", "k l", "m n"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
