"""Loading of compact models by transformers: pessa registers as a "quantizer", the extension point for weight formats.

model_type, architectures and tensor names are unchanged; `quantization_config` in config.json lists the ragged
projections. They are swapped while the model is on the meta device, and then the weights are loaded by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from pessa_cli.blocks.compact_format import LOAD_HINT, QUANT_METHOD, match_module, ragged_modules
from pessa_cli.blocks.names import module_names
from pessa_cli.common.errors import PessaError
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut, ragged_module


class PessaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a compact model; `modules` maps projections to ranks, "rows 64: 28 31 ..."."""

    def __init__(self, modules: dict[str, str], **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.modules = modules

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "modules": dict(self.modules)}


class PessaQuantizer(HfQuantizer):  # type: ignore[misc]
    """The loader hook that replaces the projections named in the config by ragged ones; nothing is quantised."""

    requires_calibration = False

    def update_attn_implementation(self, config: Any) -> Any:
        """Remove the hint that config.json holds for loading without pessa; the user's own choice is kept."""
        if config._attn_implementation == LOAD_HINT:
            config._attn_implementation = None
        return config

    update_tp_plan = update_attn_implementation  # transformers before 5.20 calls this hook in its place

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        modules = ragged_modules({"quantization_config": self.quantization_config.to_dict()})
        found: dict[str, str] = {}
        for entry, name in module_names(model, modules).items():
            module, ragged = model.get_submodule(name), modules[entry]
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            swapped = ragged_module(module, ragged)
            given = module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
            if (swapped.in_features, swapped.out_features) != tuple(given):
                raise PessaError(
                    f"{name} is {given[1]} x {given[0]} in the model, but its ranks in config.json are for "
                    f"{swapped.out_features} x {swapped.in_features}",
                    "config.json was changed after pruning; restore it",
                )
            model.set_submodule(name, swapped)
            # Use the name in this model's class, so that saving it is right, unless transformers renames the module.
            found[name if match_module(entry, [name]) else entry] = str(ragged)
        if not found:
            raise PessaError(
                f"none of the {len(modules)} pruned projections in config.json is in {type(model).__name__}",
                "load the class named under `architectures` in config.json",
            )
        self.quantization_config.modules = found
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for module in model.modules():
            if isinstance(module, (RaggedIn, RaggedOut)):
                module.to_device(module.weight.device)
            if hasattr(module, "config"):
                module.config._is_quantized = False
        # Imported here, because it imports transformers' modeling files.
        from pessa_cli.runtime.patched_attention import patch_attention

        patch_attention(model)
        model.config.attn_implementation = LOAD_HINT  # has no effect here, but save_pretrained writes it
        model.is_quantized = False  # the weights are floats, so half(), to(dtype) and training must be allowed
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def register() -> None:
    """Register `quant_method: pessa` with transformers; a second call does nothing."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(PessaConfig)
        register_quantizer(QUANT_METHOD)(PessaQuantizer)
