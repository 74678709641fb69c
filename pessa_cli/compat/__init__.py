"""What pessa uses of other libraries beyond their documented interfaces: one module for each library.

A release of a library may rename or change any of it. `compat.uses` lists these names with the arguments that pessa
passes, and a test compares the list with the installed version. No other package uses private names of these libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.compat.for_peft import (
        TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    )
    from pessa_cli.compat.for_peft import BufferDict as BufferDict
    from pessa_cli.compat.for_peft import PeftLayer as PeftLayer
    from pessa_cli.compat.for_peft import PeftTuner as PeftTuner
    from pessa_cli.compat.for_peft import check_adapters_to_merge as check_adapters_to_merge
    from pessa_cli.compat.for_peft import check_before_merging as check_before_merging
    from pessa_cli.compat.for_peft import corda as corda
    from pessa_cli.compat.for_peft import extend_peft_type as extend_peft_type
    from pessa_cli.compat.for_peft import get_quantization_kwargs as get_quantization_kwargs
    from pessa_cli.compat.for_peft import register_method as register_method
    from pessa_cli.compat.for_peft import resolve_quantization_backend as resolve_quantization_backend
    from pessa_cli.compat.for_transformers import Conv1D as Conv1D
    from pessa_cli.compat.for_transformers import LoaderHook as LoaderHook
    from pessa_cli.compat.for_transformers import QuantizationConfigMixin as QuantizationConfigMixin
    from pessa_cli.compat.for_transformers import attention_implementation as attention_implementation
    from pessa_cli.compat.for_transformers import attention_kernel as attention_kernel
    from pessa_cli.compat.for_transformers import attention_modules as attention_modules
    from pessa_cli.compat.for_transformers import bfloat16_is_fast as bfloat16_is_fast
    from pessa_cli.compat.for_transformers import forget_attention_implementation as forget_attention_implementation
    from pessa_cli.compat.for_transformers import generation_defaults as generation_defaults
    from pessa_cli.compat.for_transformers import generation_in_config as generation_in_config
    from pessa_cli.compat.for_transformers import recomputing as recomputing
    from pessa_cli.compat.for_transformers import register_loader as register_loader
    from pessa_cli.compat.for_transformers import renamed_tensors as renamed_tensors
    from pessa_cli.compat.for_transformers import store_cross_attention as store_cross_attention
    from pessa_cli.compat.for_transformers import stored_cross_attention as stored_cross_attention
    from pessa_cli.compat.for_transformers import tied_weights as tied_weights
    from pessa_cli.compat.for_transformers import use_one_device as use_one_device
    from pessa_cli.compat.for_whisper import Linear as Linear
    from pessa_cli.compat.for_whisper import ModelDimensions as ModelDimensions
    from pessa_cli.compat.for_whisper import MultiHeadAttention as MultiHeadAttention
    from pessa_cli.compat.for_whisper import ResidualAttentionBlock as ResidualAttentionBlock
    from pessa_cli.compat.for_whisper import Whisper as Whisper
    from pessa_cli.compat.for_whisper import alignment_heads as alignment_heads
    from pessa_cli.compat.for_whisper import uses_fused_attention as uses_fused_attention
    from pessa_cli.compat.hooks import guarded as guarded
    from pessa_cli.compat.uses import BERT_ATTENTION as BERT_ATTENTION
    from pessa_cli.compat.uses import WHISPER_ATTENTION as WHISPER_ATTENTION
    from pessa_cli.compat.uses import change_of as change_of
    from pessa_cli.compat.uses import changes as changes
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "for_peft": [
                "BufferDict",
                "PeftLayer",
                "PeftTuner",
                "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
                "check_adapters_to_merge",
                "check_before_merging",
                "corda",
                "extend_peft_type",
                "get_quantization_kwargs",
                "register_method",
                "resolve_quantization_backend",
            ],
            "for_transformers": [
                "Conv1D",
                "LoaderHook",
                "QuantizationConfigMixin",
                "attention_implementation",
                "attention_kernel",
                "attention_modules",
                "bfloat16_is_fast",
                "forget_attention_implementation",
                "generation_defaults",
                "generation_in_config",
                "recomputing",
                "register_loader",
                "renamed_tensors",
                "store_cross_attention",
                "stored_cross_attention",
                "tied_weights",
                "use_one_device",
            ],
            "for_whisper": [
                "Linear",
                "ModelDimensions",
                "MultiHeadAttention",
                "ResidualAttentionBlock",
                "Whisper",
                "alignment_heads",
                "uses_fused_attention",
            ],
            "hooks": ["guarded"],
            "uses": ["BERT_ATTENTION", "WHISPER_ATTENTION", "change_of", "changes"],
        },
    )
