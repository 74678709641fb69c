"""Loading of compact models by transformers: pessa registers as a "quantizer", the extension point for weight formats.

model_type, architectures and tensor names are unchanged; `quantization_config` in config.json lists the narrower
modules. They are swapped while the model is on the meta device, and then the weights are loaded by name.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pessa_cli.blocks.compact_format import HINT_BEGINS, LOAD_HINT, QUANT_METHOD, match_module, ragged_modules
from pessa_cli.blocks.names import module_names
from pessa_cli.common.errors import PessaError
from pessa_cli.compat.for_transformers import (
    Conv1D,
    LoaderHook,
    QuantizationConfigMixin,
    attention_implementation,
    forget_attention_implementation,
    register_loader,
)
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut, narrow_module


class PessaConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The `quantization_config` of a compact model; `modules` maps names to "rows 64: 28 31 ..."; see Ragged."""

    def __init__(self, modules: dict[str, str], **_: Any) -> None:
        self.quant_method = QUANT_METHOD
        self.modules = modules

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method, "modules": dict(self.modules)}


class PessaQuantizer(LoaderHook):
    """The loader hook that replaces the modules named in the config by narrower ones; nothing is quantised."""

    def before_attention_is_chosen(self, config: Any) -> None:
        """Remove the hint that config.json holds for loading without pessa; the user's own choice is kept."""
        if str(attention_implementation(config)).startswith(HINT_BEGINS):
            forget_attention_implementation(config)

    def before_loading(self, model: nn.Module) -> None:
        modules = ragged_modules({"quantization_config": self.quantization_config.to_dict()})
        found: dict[str, str] = {}
        for entry, name in module_names(model, modules).items():
            module, ragged = model.get_submodule(name), modules[entry]
            if not isinstance(module, (nn.Linear, Conv1D)):
                continue
            inputs, outputs = module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
            side, width = outputs if ragged.rows else inputs, len(ragged.ranks) * ragged.head_dim
            if side != width:
                raise PessaError(
                    f"{name} is {outputs} x {inputs} in the model, but its entry in config.json is for {width} "
                    f"{'rows' if ragged.rows else 'columns'}",
                    "config.json was changed after pruning; restore it",
                )
            model.set_submodule(name, narrow_module(module, ragged))
            # Use the name in this model's class, so that saving it is right, unless transformers renames the module.
            found[name if match_module(entry, [name]) else entry] = str(ragged)
        if not found:
            raise PessaError(
                f"none of the {len(modules)} pruned modules in config.json is in {type(model).__name__}",
                "load the class named under `architectures` in config.json",
            )
        self.quantization_config.modules = found

    def after_loading(self, model: Any) -> None:
        for module in model.modules():
            if isinstance(module, (RaggedIn, RaggedOut)):
                module.to_device(module.weight.device)
        model.config.attn_implementation = LOAD_HINT  # has no effect here, but save_pretrained writes it
        try:
            # Imported here, because it imports transformers' modeling files.
            from pessa_cli.runtime.patched_attention import patch_attention
        except ImportError:  # another version of transformers has no such modules: all heads keep slots of head_dim
            return
        patch_attention(model)


def register() -> None:
    """Register `quant_method: pessa` with transformers; a second call does nothing."""
    register_loader(QUANT_METHOD, PessaConfig, PessaQuantizer)
