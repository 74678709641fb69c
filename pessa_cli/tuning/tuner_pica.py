"""PiCa: updates in the column space of the weight, y = x W^T + (x P^T) M^T (Hwang et al. 2025, arXiv:2505.20211).

P (r, in) is frozen: the first right singular vectors of the torch weight (out, in). M (out, r) starts at zero and is
trained. With sharing, all layers of the same function and shape train one M, and each layer keeps its own P. The
adapter's file contains P, because recomputed singular vectors may have other signs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft.config import PeftConfig
from torch import Tensor, nn

from pessa_cli.tuning.peft_plugin import TunerMethod
from pessa_cli.tuning.truncated_svd import triplets
from pessa_cli.tuning.tuner_base import AdditiveLayer, Tuner, TunerConfig, option, working_dtype


@dataclass
class PicaConfig(TunerConfig):
    """The options of PiCa."""

    method: ClassVar[str] = "pica"

    r: int = option("Number of singular directions of a layer's input, at most all.", 32)
    share: bool = option("One M for all layers of the same function and shape, as in the paper.", True)
    niter: int | None = option("Iterations of a randomised SVD; the default is an exact SVD.")


class Shared(Mapping[str, nn.Parameter]):
    """The shared M of a layer by adapter name, looked up in the bank of the tuner.

    This is not a module, so that shared parameters are counted and saved once. It looks parameters up each time,
    because PEFT replaces them when it loads or casts an adapter.
    """

    def __init__(self, bank: nn.ModuleDict) -> None:
        self.bank = bank
        self.keys_of: dict[str, str] = {}

    def __getitem__(self, adapter: str) -> nn.Parameter:
        group: Any = self.bank[adapter] if adapter in self.keys_of else {}
        parameter: nn.Parameter = group[self.keys_of.get(adapter)]
        return parameter

    def __delitem__(self, adapter: str) -> None:
        del self.keys_of[adapter]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_of)

    def __len__(self) -> int:
        return len(self.keys_of)


class PicaLayer(AdditiveLayer):
    """A linear layer with PiCa adapters."""

    adapter_layer_names: tuple[str, ...] = ("pica_M",)  # (out, r); with sharing M is in `pica_shared`
    frozen_names = ("pica_P",)  # (r, in)

    def update_layer(self, adapter_name: str, config: PicaConfig, context: dict[str, Any] | None = None) -> None:
        assert context is not None
        if "pica_shared" not in self.adapter_layer_names:
            self.pica_shared = Shared(context["bank"])
            self.adapter_layer_names = ("pica_M", "pica_shared")
        if config.share:
            # The first layer of a function and shape creates the shared parameter.
            bank = context["bank"]
            if adapter_name not in bank:
                bank[adapter_name] = nn.ParameterDict()
            key = f"{context['function']}-{self.out_features}x{self.in_features}"
            if key not in bank[adapter_name]:
                bank[adapter_name][key] = nn.Parameter(self._start(config, self.original_weights()[0]))
            self.pica_shared.keys_of[adapter_name] = key
        super().update_layer(adapter_name, config)

    def initial(self, config: PicaConfig, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:  # noqa: ARG002
        _, _, v = triplets(weight, config.r, niter=config.niter)
        return {"pica_M": None if config.share else self._start(config, weight), "pica_shared": None, "pica_P": v}

    def _start(self, config: PicaConfig, weight: Tensor) -> Tensor:
        m = weight.new_zeros(self.out_features, min(config.r, *weight.shape), dtype=working_dtype(weight.dtype))
        return m if config.init_weights else m.normal_(std=0.1)

    def _get_available_adapters(self) -> set[str]:
        return set(self.pica_P)

    def _factors(self, adapter: str, like: Tensor | None = None) -> tuple[Tensor, Tensor]:
        m: Tensor = self.pica_shared[adapter] if adapter in self.pica_shared else self.pica_M[adapter]
        like = m if like is None else like
        return self.pica_P[adapter].to(like.device, like.dtype), m.to(like.device, like.dtype)

    def delta(self, adapter: str) -> Tensor:
        p, m = self._factors(adapter)
        dtype = working_dtype(m.dtype)
        return m.to(dtype) @ p.to(dtype)

    def change(self, adapter: str, x: Tensor) -> Tensor:
        p, m = self._factors(adapter, x)
        return nn.functional.linear(nn.functional.linear(x, p), m)


class PicaTuner(Tuner):
    """A model with PiCa adapters. Raises ValueError when adapters with sharing are injected into a bare model."""

    prefix = "pica_"
    tuner_layer_cls = PicaLayer

    def __init__(self, model: nn.Module, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        # Only `inject_adapter_in_model`, which add_adapter and load_adapter of transformers use, passes a single
        # configuration instead of a dictionary. It discards the tuner, and the shared parameters with it.
        if isinstance(peft_config, PeftConfig) and getattr(peft_config, "share", False):
            raise ValueError(
                "PiCa with sharing cannot be injected into a bare model, because its shared state is stored on the "
                "tuner: use `get_peft_model` or `PeftModel.from_pretrained`, or PicaConfig(share=False)"
            )
        super().__init__(model, peft_config, *args, **kwargs)

    def before_injection(self, model: nn.Module) -> None:  # noqa: ARG002
        self.pica_bank = nn.ModuleDict()  # adapter -> function and shape -> M

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        # A new adapter must not change which others are trained. PEFT ensures that only for modules in the model.
        trained = [(parameter, parameter.requires_grad) for parameter in self.pica_bank.parameters()]
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)

    def context(self, config: PicaConfig, target: nn.Module, name: str) -> dict[str, Any]:
        # The function of a layer is its path without layer numbers. Names of parameters must not contain dots.
        function = re.sub(r"\.\d+(?=\.)", "", name).replace(".", "-")
        return {**super().context(config, target, name), "bank": self.pica_bank, "function": function}

    def after_cast(self, adapter: str, to_float32: bool) -> None:
        if not to_float32 and adapter in self.pica_bank:
            # The bank is created in float32. Without autocasting PEFT expects the dtype of the base.
            for layer in self.modules():
                if isinstance(layer, PicaLayer) and adapter in layer.pica_shared:
                    shared = layer.pica_shared[adapter]
                    shared.data = shared.data.to(layer.base_dtype() or torch.float32)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        if adapter_name in self.pica_bank:
            del self.pica_bank[adapter_name]


METHODS = (TunerMethod("pica", PicaConfig, PicaTuner),)
