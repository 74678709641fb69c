"""What pessa uses of transformers beyond its documented interface.

This module is imported while transformers itself is being imported, so what needs transformers' modeling files is
imported inside functions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

__all__ = ["Conv1D", "QuantizationConfigMixin"]


class LoaderHook(HfQuantizer):  # type: ignore[misc]
    """A "quantizer" of transformers that changes modules around the loading of weights; nothing is quantised."""

    requires_calibration = False

    def before_loading(self, model: nn.Module) -> None:
        """Change a model on the meta device, before its weights are loaded by name."""
        raise NotImplementedError

    def after_loading(self, model: nn.Module) -> None:
        """Change a model that has its weights."""
        raise NotImplementedError

    def before_attention_is_chosen(self, config: Any) -> None:
        """Change a config before transformers chooses the attention implementation."""
        raise NotImplementedError

    def update_attn_implementation(self, config: Any) -> Any:
        self.before_attention_is_chosen(config)
        return config

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        self.before_loading(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        self.after_loading(model)
        model.is_quantized = False  # the weights are floats, so half(), to(dtype) and training must be allowed
        for module in model.modules():
            if hasattr(module, "config"):
                module.config._is_quantized = False
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register_loader(name: str, config: type, hook: type[LoaderHook]) -> None:
    """Register a value of `quant_method` with transformers; a second call does nothing."""
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config)
        register_quantizer(name)(hook)


def attention_implementation(config: Any) -> str | None:
    """Return the attention implementation of a config, such as "sdpa"; None if none is chosen yet."""
    found: str | None = config._attn_implementation
    return found


def forget_attention_implementation(config: Any) -> None:
    """Let transformers choose the attention implementation, as if the config named none."""
    config._attn_implementation = None


def attention_modules() -> tuple[Any, Any]:
    """Return the classes of the attention modules that bucketed attention extends: Whisper's and BERT's."""
    from transformers.models.bert.modeling_bert import BertSelfAttention
    from transformers.models.whisper.modeling_whisper import WhisperAttention

    return WhisperAttention, BertSelfAttention


def attention_kernel(name: str) -> Any:
    """Return transformers' wrapper of an attention kernel: (module, q, k, v, mask, **options) -> (output, weights)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS[name]


def stored_cross_attention(caches: Any, layer: int) -> tuple[Tensor, Tensor] | None:
    """Return the keys and values of a layer's cross-attention in an EncoderDecoderCache; None if it has none yet."""
    if not caches.is_updated.get(layer):
        return None
    stored = caches.cross_attention_cache.layers[layer]
    return stored.keys, stored.values


def store_cross_attention(caches: Any, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Store the keys and values of a layer's cross-attention, and return them as the cache has them."""
    keys, values = caches.cross_attention_cache.update(keys, values, layer)
    caches.is_updated[layer] = True
    return keys, values


def renamed_tensors(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Map names of tensors in a checkpoint to those in the model, by transformers' renaming when it loads weights.

    Names that lead to no tensor of the model are left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping, tensors = get_model_conversion_mapping(model), model.state_dict()
    rules = [[rule for rule in mapping if isinstance(rule, kind)] for kind in (WeightRenaming, WeightConverter)]
    found = {name: rename_source_key(name, *rules, model.base_model_prefix, tensors)[0] for name in names}
    return {name: key for name, key in found.items() if key in tensors}


def generation_defaults() -> dict[str, Any]:
    """Return the settings that `generate` uses where a GenerationConfig has None."""
    from transformers import GenerationConfig

    found: dict[str, Any] = GenerationConfig._get_default_generation_params()
    return found


def generation_in_config(folder: Path, config_file: str, **options: Any) -> Any:
    """Return the GenerationConfig that transformers takes from config.json where a folder has no file for it."""
    from transformers import GenerationConfig

    return GenerationConfig.from_pretrained(folder, config_file, _from_model_config=True, **options)


def tied_weights(kind: Any) -> Iterable[str]:
    """Return patterns of the names of tensors that a class ties to others."""
    return kind._tied_weights_keys or ()


def use_one_device(arguments: Any) -> None:
    """Let a Trainer use one device of those that the process sees; further ones are used by further processes."""
    arguments._n_gpu = min(1, arguments.n_gpu)


def recomputing(wanted: bool) -> dict[str, Any]:
    """Return the TrainingArguments for gradient checkpointing, whose names depend on the version of transformers."""
    from transformers import TrainingArguments

    known = {field.name for field in fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def bfloat16_is_fast() -> bool:
    """Return whether the accelerator computes in bfloat16; without that, the Trainer refuses to train in it."""
    from transformers.utils import is_torch_bf16_gpu_available

    return bool(is_torch_bf16_gpu_available())
