"""Base classes of pessa's PEFT tuners: configuration, replacing modules, merging, mixed batches.

A method defines what it trains and how that changes a linear layer. `AdditiveLayer` is for methods that add to the
weight. Only merging changes base weights, and it keeps the originals: disabling or unmerging restores the base model
bit for bit, and an adapter added while another one is merged starts from the weights of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pessa_cli.compat.for_peft import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    BufferDict,
    PeftLayer,
    PeftTuner,
    check_adapters_to_merge,
    extend_peft_type,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from pessa_cli.compat.for_transformers import Conv1D
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut

BASE = "__base__"  # the name that PEFT gives the base model in `adapter_names`


def option(text: str, default: Any = None) -> Any:
    """A field of a configuration with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class TunerConfig(PeftConfig):  # type: ignore[misc]
    """The fields that PEFT expects of every method.

    A subclass sets `method` to its name in lower case. Raises ValueError for combinations that PEFT does not allow.
    """

    method: ClassVar[str]

    target_modules: list[str] | str | None = option(
        "Names of the modules to adapt, or a regular expression; the default depends on the model's architecture."
    )
    exclude_modules: list[str] | str | None = option("Names of modules not to adapt, or a regular expression.")
    modules_to_save: list[str] | None = option("Other modules to train and save in full, such as a new head.")
    bias: str = option("Biases of the base to train: 'none', 'all' or '<method>_only'.", "none")
    init_weights: bool = option("False initialises at random instead of as the base model; for tests.", True)
    layers_to_transform: list[int] | int | None = option("Adapt only these layers.")
    layers_pattern: list[str] | str | None = option("Name of the list of layers, if PEFT does not know it.")
    requires: str = option("Python statement that registers this method with PEFT.", "import pessa_cli")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = extend_peft_type(self.method.upper())
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and not self.layers_to_transform:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified. ")


class TunerLayer(nn.Module, PeftLayer):
    """A linear layer with adapters of one method. The layer may also be a Conv1D, or compact, or quantised.

    A subclass lists the parts of an adapter by name, each beginning with "<method>_", and implements `initial`,
    `adapt` and `merge_into`. These get `weight` (out, in) and `bias` (out,) as floats, with the rows and columns that
    the layer stores. Raises TypeError for modules of other types.
    """

    if TYPE_CHECKING:  # nn.Module would type every attribute as a tensor or module, and PEFT has no types

        def __getattr__(self, name: str) -> Any: ...

    adapter_layer_names: tuple[str, ...] = ()  # parameters: trained and saved
    frozen_names: tuple[str, ...] = ()  # buffers: saved, but not trained
    setting_names: tuple[str, ...] = ()  # plain values, neither trained nor saved: computed from the config

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        context: dict[str, Any] | None = None,
        quantization: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.start_with(adapter_name)
        self.merged_adapters: list[str] = []
        self.originals: tuple[Tensor, Tensor | None] | None = None  # of the base, while merged
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer(), **(quantization or {}))
        base: Any = self.get_base_layer()
        self.transposed = isinstance(base, Conv1D)
        if not (isinstance(base, nn.Linear) or self.transposed or self.quantization_backend is not None):
            raise TypeError(f"{config.method} adapts linear layers, not {type(base).__name__}; see `target_modules`")
        shape = reversed(base.weight.shape) if self.transposed else (base.out_features, base.in_features)
        self.out_features, self.in_features = shape
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        for name in self.frozen_names:
            setattr(self, name, BufferDict(persistent=True))
        for name in self.setting_names:
            setattr(self, name, {})
        self.update_layer(adapter_name, config, context)

    @property
    def other_param_names(self) -> tuple[str, ...]:
        return self.frozen_names + self.setting_names

    def initial(self, config: Any, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:
        """The initial parts of an adapter by name, such that the output of the layer does not change.

        Tensors are float32 (float64 for a base in float64). On the meta device only their shapes matter, because the
        values are loaded from a file later. With `config.init_weights` false the parts are random and change the
        output. context: the keyword arguments from `Tuner.context`.
        """
        raise NotImplementedError

    def adapt(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        """Apply an adapter to the layer's output: `result` (..., out) is the output for `x` (..., in) without it."""
        raise NotImplementedError

    def merge_into(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after merging an adapter, in the dtype of the arguments."""
        raise NotImplementedError

    def original_weights(self) -> tuple[Tensor, Tensor | None]:
        """Weight (out, in) and bias (out,) of the base in their stored dtype, without any merged adapter."""
        weight, bias = self.originals or self._stored_weights()
        return weight.mT if self.transposed else weight, bias

    def _stored_weights(self) -> tuple[Tensor, Tensor | None]:
        bias = getattr(self.get_base_layer(), "bias", None)
        return self.get_base_weight(), None if bias is None else bias.data

    def update_layer(self, adapter_name: str, config: Any, context: dict[str, Any] | None = None) -> None:
        """Add an adapter to this layer."""
        weight, bias = (None if t is None else t.to(working_dtype(t.dtype)) for t in self.original_weights())
        assert weight is not None
        device = weight.device
        if _on_meta_device() and not weight.is_meta:
            weight, bias = weight.to("meta"), None if bias is None else bias.to("meta")
        with torch.no_grad():
            start = self.initial(config, weight, bias, **(context or {}))
        assert set(start) == {*self.adapter_layer_names, *self.other_param_names}, sorted(start)
        for name in self.setting_names:
            getattr(self, name)[adapter_name] = start[name]
        for name in self.adapter_layer_names:
            if start[name] is not None:  # None: this adapter has no such part
                getattr(self, name)[adapter_name] = nn.Parameter(start[name])
        self.move_to_base(adapter_name)
        for name in self.frozen_names:  # after moving, which would round buffers to the dtype of the base
            buffer = start[name]
            if buffer is None:
                continue
            if buffer.is_meta and device.type != "meta":  # PEFT replaces only meta parameters, not meta buffers
                buffer = torch.empty_like(buffer, device=device)
            getattr(self, name)[adapter_name] = buffer
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Tensor:
        if adapter_names is not None:
            return self._forward_mixed(x, adapter_names, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return result
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        for adapter in self.present(self.active_adapters):
            result = self.adapt(adapter, x, result)
        return result

    def _forward_mixed(self, x: Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> Tensor:
        """Run a mixed batch: input i uses the adapter `adapter_names[i]`."""
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        result: Tensor = self.base_layer(x, *args, **kwargs)
        parts = result.clone()
        for adapter in self.present(list(dict.fromkeys(adapter_names))):
            rows = torch.tensor([i for i, name in enumerate(adapter_names) if name == adapter], device=x.device)
            parts[rows] = self.adapt(adapter, x[rows], result[rows])
        return parts

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the weights of the base, in float32 with one final rounding, and keep the originals.

        With `safe_merge`, raises ValueError and changes nothing if a merged entry is not finite.
        """
        names = self.present(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        stored = self.original_weights()
        weight, bias = (None if t is None else t.to(working_dtype(t.dtype)) for t in stored)
        assert weight is not None
        merged = [*self.merged_adapters, *names]
        with torch.no_grad():
            for adapter in merged:
                weight, bias = self.merge_into(adapter, weight, bias)
        if safe_merge and not all(bool(t.isfinite().all()) for t in (weight, bias) if t is not None):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {', '.join(names)} seems to be broken")
        if self.originals is None:
            self.originals = self._stored_weights()
        self._store(weight.mT if self.transposed else weight, bias)
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Restore the original weights of the base."""
        if self.originals is not None:
            self._store(*self.originals)
        self.originals = None
        self.merged_adapters = []

    def _store(self, weight: Tensor, bias: Tensor | None) -> None:
        stored = self.get_base_weight()
        self.set_base_weight(weight.to(stored.device, stored.dtype).contiguous())
        base: Any = self.get_base_layer()
        if bias is not None:
            base.bias.data = bias.to(base.bias.device, base.bias.dtype)

    def present(self, names: list[str]) -> list[str]:
        """The adapters among `names` that this layer has."""
        return [name for name in names if self.trained(name)]

    def trained(self, adapter: str) -> list[nn.Parameter]:
        """The trained parameters of an adapter."""
        groups = [getattr(self, name) for name in self.adapter_layer_names]
        return [group[adapter] for group in groups if adapter in group]

    def __repr__(self) -> str:
        return f"{self.adapter_layer_names[0].partition('_')[0]}.{super().__repr__()}"


class AdditiveLayer(TunerLayer):
    """A layer of a method that adds dW to the weight W.

    A subclass implements `initial` and `delta`, and may implement `change` more cheaply.
    """

    def delta(self, adapter: str) -> Tensor:
        """dW, (out, in)."""
        raise NotImplementedError

    def change(self, adapter: str, x: Tensor) -> Tensor:
        """x dW^T, (..., out). Low-rank methods override this so that dW is not formed."""
        return nn.functional.linear(x, self.delta(adapter))

    def adapt(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:
        base = self.get_base_layer()
        trained = self.trained(adapter)[0]
        if isinstance(base, RaggedIn) and x.shape[-1] != base.weight.shape[1]:
            x = base.slots.fill(x)
        change = self.change(adapter, self.cast_input(x, trained.dtype))
        if isinstance(base, RaggedOut):
            change = base.slots.fill(change)
        return result + change.to(result.dtype)

    def merge_into(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.delta(adapter).to(weight.dtype), bias

    def get_delta_weight(self, adapter: str) -> Tensor:
        """dW in the orientation of the base's stored weight, for PEFT's conversion of adapters to LoRA."""
        delta = self.delta(adapter)
        return delta.mT if self.transposed else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:  # noqa: ARG002
        return not isinstance(self.get_base_layer(), (RaggedIn, RaggedOut))


class Tuner(PeftTuner):
    """A model with adapters of one method.

    A subclass sets `prefix`, which is "<method>_", and `tuner_layer_cls`.
    """

    target_module_mapping: ClassVar[dict[str, list[str]]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def context(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:  # noqa: ARG002
        """Keyword arguments for a layer's `initial` that depend on the modules around it."""
        return {}

    def adapt_module(self, config: Any, adapter: str, target: nn.Module, key: str) -> nn.Module | None:
        context = self.context(config, target, key)
        if isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter, config, context)
            return None
        quantization = get_quantization_kwargs(self.model)
        layer: nn.Module = self.tuner_layer_cls(target, adapter, config, context, quantization)
        if adapter not in self.active_adapters:
            layer.requires_grad_(False)
        return layer

    @contextmanager
    def with_adapter_names(self, names: list[str]) -> Iterator[None]:
        """Pass the `adapter_names` of a mixed batch to every layer."""
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        layers = [module for module in self.modules() if isinstance(module, TunerLayer)]
        known = {name for layer in layers for name in layer.adapter_names()}
        unknown = sorted(set(names) - known - {BASE})
        if unknown:
            raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
        hook = partial(_with_adapter_names, names=names)
        handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def base_weights(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) of a linear layer in the base, without any adapter on it or merged into it."""
    if isinstance(module, TunerLayer):
        return module.original_weights()
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    backend = resolve_quantization_backend(module)
    weight = module.weight.data if backend is None else backend.get_base_weight(module)
    bias = getattr(module, "bias", None)
    return weight.mT if isinstance(module, Conv1D) else weight, None if bias is None else bias.data


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that adapters are computed in: float32, or float64 for a base in float64."""
    return torch.promote_types(dtype, torch.float32)


def _with_adapter_names(
    _: nn.Module, args: Any, kwargs: dict[str, Any], names: list[str]
) -> tuple[Any, dict[str, Any]]:
    return args, {**kwargs, "adapter_names": names}


def _on_meta_device() -> bool:
    """Whether PEFT now creates parameters on the meta device (`low_cpu_mem_usage`), to load their values later."""
    return bool(nn.ParameterList([nn.Parameter(torch.empty(0))])[0].is_meta)
