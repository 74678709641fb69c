"""The list of what pessa uses of other libraries beyond their documented interfaces, and its check at run time.

The list is for a test, which fails with the name of what a new release has changed. Bucketed attention reads it too: if
an attention module has another signature, compact models run with transformers' own attention, which is slower.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any, NamedTuple


class Use(NamedTuple):
    """A name of a library and how pessa uses it.

    module: where it is imported from. name: of a function, a class, or an attribute "Class.attribute". first: the names
    of its first parameters, in order, for what is called by position or overridden. others: names of parameters that
    are passed by keyword.
    """

    module: str
    name: str
    first: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


WHISPER_ATTENTION = Use(
    "transformers.models.whisper.modeling_whisper",
    "WhisperAttention.forward",
    ("self", "hidden_states", "key_value_states", "past_key_values", "attention_mask"),
)
BERT_ATTENTION = Use(
    "transformers.models.bert.modeling_bert",
    "BertSelfAttention.forward",
    ("self", "hidden_states", "attention_mask", "past_key_values"),
)
TUNER, LAYER = "BaseTuner", "BaseTunerLayer"
TUNERS_UTILS = "peft.tuners.tuners_utils"
QUANTIZATION = "peft.utils.quantization_utils"
USES: Mapping[str, tuple[Use, ...]] = {
    "transformers": (
        WHISPER_ATTENTION,
        BERT_ATTENTION,
        Use("transformers.pytorch_utils", "Conv1D"),
        Use("transformers.quantizers.auto", "AUTO_QUANTIZATION_CONFIG_MAPPING"),
        Use("transformers.quantizers.auto", "register_quantization_config", ("method",)),
        Use("transformers.quantizers.auto", "register_quantizer", ("name",)),
        Use("transformers.quantizers.base", "HfQuantizer._process_model_before_weight_loading", ("self", "model")),
        Use("transformers.quantizers.base", "HfQuantizer._process_model_after_weight_loading", ("self", "model")),
        Use("transformers.quantizers.base", "HfQuantizer.update_attn_implementation", ("self", "config")),
        Use("transformers.utils.quantization_config", "QuantizationConfigMixin"),
        Use("transformers", "PreTrainedConfig._attn_implementation"),
        Use("transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS"),
        Use("transformers", "EncoderDecoderCache"),
        Use("transformers", "DynamicCache.update", ("self", "key_states", "value_states", "layer_idx")),
        Use("transformers.conversion_mapping", "get_model_conversion_mapping", ("model",)),
        Use("transformers.core_model_loading", "WeightConverter"),
        Use("transformers.core_model_loading", "WeightRenaming"),
        Use(
            "transformers.core_model_loading",
            "rename_source_key",
            ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"),
        ),
        Use("transformers", "GenerationConfig._get_default_generation_params"),
        Use("transformers", "GenerationConfig.from_pretrained", others=("_from_model_config",)),
        Use("transformers", "PreTrainedModel._tied_weights_keys"),
        Use("transformers", "TrainingArguments.n_gpu"),
        Use("transformers", "PrinterCallback"),
        Use("transformers", "TrainingArguments.__init__", others=("bf16", "fp16", "use_cpu")),
        Use("transformers.utils", "is_torch_bf16_gpu_available"),
        Use("transformers", "GgufConfig.__init__", others=("dequantize",)),
    ),
    "peft": (
        Use("peft.tuners._buffer_dict", "BufferDict.__init__", others=("persistent",)),
        Use(TUNERS_UTILS, "check_adapters_to_merge", ("module", "adapter_names")),
        Use(TUNERS_UTILS, f"{LAYER}._move_adapter_to_device_of_base_layer", ("self", "adapter_name")),
        Use(TUNERS_UTILS, f"{LAYER}._get_base_layer_device_and_dtype", ("self", "base_layer")),
        Use(TUNERS_UTILS, f"{LAYER}._cast_input_dtype", ("self", "x", "dtype")),
        Use(TUNERS_UTILS, f"{LAYER}._get_available_adapters", ("self",)),
        Use(
            TUNERS_UTILS,
            f"{TUNER}._create_and_replace",
            ("self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
            ("parameter_name",),
        ),
        Use(TUNERS_UTILS, f"{TUNER}._replace_module", ("self", "parent", "child_name", "new_module", "child")),
        # Calls the method `_enable_peft_forward_hooks` of the tuner, if it has one.
        Use("peft", "PeftModel._enable_peft_forward_hooks", ("self",), ("adapter_names",)),
        Use(TUNERS_UTILS, f"{TUNER}._pre_injection_hook", ("self", "model", "config", "adapter_name")),
        Use(TUNERS_UTILS, f"{TUNER}._check_merge_allowed", ("self",)),
        Use(TUNERS_UTILS, f"{TUNER}._cast_adapter_dtype", ("self", "adapter_name", "autocast_adapter_dtype")),
        Use("peft.utils.constants", "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"),
        Use(QUANTIZATION, "get_quantization_kwargs", ("model",)),
        Use(QUANTIZATION, "resolve_quantization_backend"),
        Use("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
        Use("peft.utils", "register_peft_method", others=("name", "config_cls", "model_cls", "prefix")),
        *(Use("peft.utils", f"PeftType.{name}") for name in ("_member_names_", "_member_map_", "_value2member_map_")),
        Use("peft.tuners.lora.config", "CordaConfig"),
        Use("peft.tuners.lora.corda", "preprocess_corda", ("model", "lora_config"), ("run_model",)),
    ),
    "openai-whisper": (
        Use("whisper", "_ALIGNMENT_HEADS"),
        Use("whisper.model", "Linear"),
        Use("whisper.model", "ModelDimensions"),
        Use("whisper.model", "MultiHeadAttention.__init__", ("self", "n_state", "n_head")),
        Use("whisper.model", "MultiHeadAttention.qkv_attention", ("self", "q", "k", "v", "mask")),
        Use("whisper.model", "MultiHeadAttention.use_sdpa"),
        Use("whisper.model", "ResidualAttentionBlock.__init__", ("self", "n_state", "n_head", "cross_attention")),
        Use("whisper.model", "Whisper.__init__", ("self", "dims")),
    ),
}


def changes(library: str) -> list[str]:
    """Return what is missing or different in the installed version of a library, one line each; empty if nothing is."""
    return [text for use in USES[library] if (text := change_of(use)) is not None]


def change_of(use: Use) -> str | None:
    """Return what is missing or different about one name in the installed version; None if it is as expected."""
    try:
        found: Any = import_module(use.module)
        for part in use.name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f"{use.module}.{use.name}: {error}"
    if not use.first and not use.others:
        return None
    parameters = inspect.signature(found).parameters
    by_keyword = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters.values())
    names = tuple(parameters)
    if names[: len(use.first)] != use.first:
        return f"{use.module}.{use.name}: its parameters are {names}, not {use.first} first"
    missing = [] if by_keyword else [name for name in use.others if name not in parameters]
    return f"{use.module}.{use.name}: it has no parameter {missing[0]}" if missing else None
