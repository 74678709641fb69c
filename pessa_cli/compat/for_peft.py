"""What pessa uses of HF PEFT beyond its documented interface. This imports PEFT, and so torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    check_adapters_to_merge,
)
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.quantization_utils import get_quantization_kwargs, resolve_quantization_backend
from torch import Tensor, nn

__all__ = [
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "BufferDict",
    "check_adapters_to_merge",
    "get_quantization_kwargs",
    "resolve_quantization_backend",
]


class PeftLayer(BaseTunerLayer):  # type: ignore[misc]
    """PEFT's base class of layers with adapters, with public names for what pessa's layers use of it."""

    def start_with(self, adapter: str) -> None:
        """Set the state that PEFT expects of a new layer: enabled, with one active adapter."""
        self._disable_adapters = False
        self._active_adapter = adapter

    def move_to_base(self, adapter: str) -> None:
        """Move an adapter's parameters to the device of the base layer, and to its dtype if that is a float."""
        self._move_adapter_to_device_of_base_layer(adapter)

    def base_dtype(self) -> torch.dtype | None:
        """Return the dtype of the base layer; None if it has no floating-point weights."""
        _, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        return dtype if dtype is not None and dtype.is_floating_point else None

    def cast_input(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cast an input to the dtype of an adapter, unless autocast does so."""
        cast: Tensor = self._cast_input_dtype(x, dtype)
        return cast

    def adapter_names(self) -> set[str]:
        """Return the names of all adapters on this layer."""
        return set(self._get_available_adapters())


class PeftTuner(BaseTuner):  # type: ignore[misc]
    """PEFT's base class of tuners, with public names for the methods that a method of pessa defines."""

    def adapt_module(self, config: Any, adapter: str, target: nn.Module, key: str) -> nn.Module | None:
        """Add an adapter to a module; returns the layer to put in its place, or None if it is in place already."""
        raise NotImplementedError

    def with_adapter_names(self, names: list[str]) -> Any:
        """Return a context in which a forward pass uses an adapter for each input of a mixed batch."""
        raise NotImplementedError

    def before_injection(self, model: nn.Module) -> None:
        """Prepare for the first adapter."""

    def after_cast(self, adapter: str, to_float32: bool) -> None:
        """Called when PEFT has cast an adapter's parameters, to float32 or to the dtype of the base."""

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,  # noqa: ARG002
    ) -> None:
        layer = self.adapt_module(peft_config, adapter_name, target, current_key)
        if layer is not None:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *_: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
            return
        with self.with_adapter_names(names):
            yield

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:  # noqa: ARG002
        self.before_injection(model)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        self.after_cast(adapter_name, autocast_adapter_dtype)


def check_before_merging(check: Callable[[nn.Module], None]) -> None:
    """Let `check` see a model with adapters before PEFT merges them in memory, and so raise an error in time.

    A second call does nothing.
    """
    allowed = BaseTuner._check_merge_allowed
    if hasattr(allowed, "__wrapped__"):
        return

    @wraps(allowed)
    def checked(self: Any) -> None:
        check(self.model)
        allowed(self)

    BaseTuner._check_merge_allowed = checked


def register_method(name: str, config: Any, model: Any) -> None:
    """Register a method with PEFT under `name`, in lower case, unless it is registered already.

    PEFT has no extension point: `register_peft_method` accepts only members of its enum `PeftType`. Since version 0.21
    everything else is delegated to the classes of a method, so extending the enum suffices.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if extend_peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=f"{name}_")


def extend_peft_type(name: str) -> Any:
    """The member of PEFT's enum of this name, added if it does not exist.

    An added member can be found by name and by value, copied and pickled, like any other.
    """
    from peft.utils import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member


def corda() -> tuple[Any, Any]:
    """Return PEFT's configuration of CorDA and the function that prepares a model for it.

    Raises ImportError where the package attrs is missing, which PEFT 0.21 imports there without depending on it.
    """
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    return CordaConfig, preprocess_corda
