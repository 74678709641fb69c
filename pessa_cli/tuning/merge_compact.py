"""Merging of adapters into ragged projections, which store only the kept directions of each head.

LoRA adds a matrix of full size to a projection, so cut directions get weights again. In a product of two projections
they have no effect as long as the other projection has none there: then only the kept directions need to be stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pessa_cli.blocks.compact_format import ModuleNames
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.compat.for_peft import PeftLayer
from pessa_cli.runtime.compact_linear import RaggedConvIn, RaggedConvOut, RaggedIn, RaggedOut
from pessa_cli.tuning.tuner_base import TunerConfig

RaggedLayer = RaggedOut | RaggedIn


def brings_back(sites: Iterable[AttentionSite], config: Any, targets: Iterable[str]) -> list[str]:
    """Return the adapted projections through which an adapter gives cut directions an effect again.

    sites: the blocks of a compact model. config: of the adapter. targets: the names of all adapted modules.
    """
    if isinstance(config, TunerConfig):  # these methods change the stored directions only
        return []
    names = ModuleNames(targets)
    only_adds = config.peft_type == PeftType.LORA and not config.use_dora
    found = []
    for site in sites:
        cut = site.ragged()
        for first, second in (("q", "k"), ("v", "o")):
            pair = [site.module(side) for side in (first, second)]
            adapted = [name for name in pair if names.find(name) is not None]
            if any(name in cut for name in pair) and (len(adapted) == 2 or (adapted and not only_adds)):
                found += adapted
    return found


def check_mergeable(model: nn.Module) -> None:
    """Raise PessaError if PEFT would add matrices of full shape to ragged weights when it merges in memory."""
    found = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, BaseTunerLayer) and not isinstance(layer, PeftLayer) and _is_cut(layer.get_base_layer())
    ]
    if found:
        folder = getattr(model, "name_or_path", "") or "MODEL"
        raise PessaError(
            f"PEFT cannot merge this adapter in memory: {len(found)} layers of the model are compact\n{listed(found)}",
            f"save the adapter with save_pretrained(ADAPTER), then: pessa merge {folder} ADAPTER -o merged",
        )


def _is_cut(layer: nn.Module) -> bool:
    """Whether a layer stores fewer rows or columns than a stock layer has."""
    if not isinstance(layer, RaggedLayer):
        return False
    return _as_linear(layer, layer.weight).shape != (layer.out_features, layer.in_features)


def whole(ragged: RaggedLayer) -> nn.Linear:
    """Return the stock layer that computes the same: the weights of a ragged one, with zeros in cut directions."""
    weight = _as_linear(ragged, ragged.weight.detach())
    index, size = _kept(ragged)
    axis = 0 if isinstance(ragged, RaggedOut) else 1
    linear = nn.Linear(ragged.in_features, ragged.out_features, ragged.bias is not None, "meta", weight.dtype)
    linear.weight = nn.Parameter(_spread(weight, index, size, axis))
    if ragged.bias is not None:
        bias = ragged.bias.detach()
        linear.bias = nn.Parameter(_spread(bias, index, size, 0) if axis == 0 else bias)
    return linear


def narrow(linear: nn.Linear, ragged: RaggedLayer) -> dict[str, Tensor]:
    """Return the parameters of a stock layer by name as the ragged one stores them."""
    index, _ = _kept(ragged)
    rows = isinstance(ragged, RaggedOut)
    found = {"weight": _as_linear(ragged, linear.weight.detach().index_select(0 if rows else 1, index)).contiguous()}
    if linear.bias is not None:
        bias = linear.bias.detach()
        found["bias"] = bias.index_select(0, index) if rows else bias
    return found


def _kept(ragged: RaggedLayer) -> tuple[Tensor, int]:
    """Return the indices of the stored rows or columns, and how many a stock layer has."""
    if isinstance(ragged, RaggedIn):
        return ragged.slots.index, ragged.in_features
    gather, stored = ragged.slots.index, ragged.weight.shape[1 if isinstance(ragged, RaggedConvOut) else 0]
    return (gather < stored).nonzero().squeeze(1), ragged.out_features


def _as_linear(ragged: RaggedLayer, weight: Tensor) -> Tensor:
    """Transpose the weight of a Conv1D to that of a linear layer, or back."""
    return weight.mT if isinstance(ragged, RaggedConvOut | RaggedConvIn) else weight


def _spread(stored: Tensor, index: Tensor, size: int, axis: int) -> Tensor:
    shape = list(stored.shape)
    shape[axis] = size
    return torch.zeros(shape, dtype=stored.dtype).index_copy(axis, index, stored)
