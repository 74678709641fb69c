"""The attention modules of transformers with bucketed attention: stock classes with a second forward.

Each falls back to the stock forward, on full slots, wherever bucketing does not apply: with kernels other than sdpa
(eager is asked for by those who want the weights of attention), with adapters around the projections, on devices
whose costs nobody has measured, and when `set_backend("scatter")` says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.whisper.modeling_whisper import WhisperAttention

from pessa_cli.runtime.bucketed_attention import CONTINUING, DECODING, ENCODING, BlockLayout, lay_out
from pessa_cli.runtime.buckets import Cost, get_backend
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut


class _Narrow(nn.Module):
    """What both kinds of module share: the layout for the device they are on."""

    layout: BlockLayout  # a plain attribute, made before anything is traced, as the indices of the projections are
    decodes: bool
    is_causal: bool
    config: Any
    scaling: float
    layer_idx: int

    def projections(self) -> tuple[Any, Any, Any]:
        """Q, K and V, whatever stands there now."""
        raise NotImplementedError

    @property
    def costs(self) -> dict[str, Cost]:
        """By kind of device, for what this block does most."""
        if not self.decodes:
            return ENCODING
        return CONTINUING if self.is_causal else DECODING

    def adopt(self) -> None:
        """Lay the heads out for the device that the weights are on, if it is a new one."""
        q, _, v = self.projections()
        device = q.weight.device
        layout = getattr(self, "layout", None)
        if device.type == "meta" or (layout is not None and layout.live.index.device == device):
            return
        costs = self.costs
        ranks = q.ragged.ranks, v.ragged.ranks, q.ragged.head_dim
        self.layout = lay_out(*ranks, costs.get(device.type, costs["cpu"])).to(device)

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if all(isinstance(projection, RaggedOut) for projection in self.projections()):
            self.adopt()
        return self

    def bucketed(self, x: Tensor) -> bool:
        """Whether this call is to be bucketed; nothing in here changes while a cache is in use."""
        costs = self.costs
        backend = get_backend()
        return (
            backend != "scatter"
            and (backend == "bucketed" or (x.device.type in costs and self.layout.plan.pays))
            and self.config._attn_implementation == "sdpa"
            and all(isinstance(projection, RaggedOut) for projection in self.projections())
        )

    def keys_and_values(self, x: Tensor, cache: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Views of the keys and values of x, and of all that a cache has before."""
        _, k_proj, v_proj = self.projections()
        k, v = k_proj(x, self.layout.k.slots), v_proj(x, self.layout.v.slots)
        if cache is not None:
            k, v = cache.update(k.unsqueeze(1), v.unsqueeze(1), self.layer_idx)  # to a cache this is one head
            k, v = k.squeeze(1), v.squeeze(1)
        return self.layout.k.of_rows(k), self.layout.v.of_rows(v)

    def attend(
        self, x: Tensor, k: list[Tensor], v: list[Tensor], mask: Tensor | None, dropout: float, **kwargs: Any
    ) -> Tensor:
        """The live results of the stock kernel, once a bucket; x is what asks."""
        q = self.projections()[0](x, self.layout.q.slots)
        if x.shape[1] == 1:  # what the stock kernel does with a single query, without its preparations

            def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scaling).transpose(1, 2)

        else:
            kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

            def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                result: Tensor = kernel(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)[0]
                return result

        return self.layout.attend(call, q, k, v, mask)


class NarrowWhisperAttention(_Narrow, WhisperAttention):  # type: ignore[misc]
    """WhisperAttention: of the encoder, of the decoder, and across."""

    q_proj: Any
    k_proj: Any
    v_proj: Any
    dropout: float

    def projections(self) -> tuple[Any, Any, Any]:
        return self.q_proj, self.k_proj, self.v_proj

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.bucketed(hidden_states) or not isinstance(self.out_proj, RaggedIn):
            stock: tuple[Tensor, Tensor | None] = WhisperAttention.forward(
                self, hidden_states, key_value_states, past_key_values, attention_mask, **kwargs
            )
            return stock
        dropout = self.dropout if self.training else 0.0
        if isinstance(past_key_values, EncoderDecoderCache) and key_value_states is not None:
            result = self._across(hidden_states, key_value_states, past_key_values, attention_mask, dropout, **kwargs)
        else:
            source = hidden_states if key_value_states is None else key_value_states
            k, v = self.keys_and_values(source, _own(past_key_values))
            result = self.attend(hidden_states, k, v, attention_mask, dropout, **kwargs)
        return self.out_proj(result), None

    def _across(
        self, x: Tensor, encoded: Tensor, caches: Any, mask: Tensor | None, dropout: float, **kwargs: Any
    ) -> Tensor:
        """Live results over the encoder's frames, whose keys and values are made once and then from the cache."""
        layout, cache = self.layout, caches.cross_attention_cache
        if caches.is_updated.get(self.layer_idx):
            k, v = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            k = layout.k.pack(self.k_proj(encoded, layout.k.slots))
            v = layout.v.pack(self.v_proj(encoded, layout.v.slots))
            k, v = cache.update(k, v, self.layer_idx)
            caches.is_updated[self.layer_idx] = True
        if x.shape[:2] == (1, 1) and x.is_cpu and x.dtype == torch.float32 and mask is None and not dropout:
            return layout.attend_once(self.q_proj(x, layout.q.slots) * self.scaling, k, v)
        return self.attend(x, layout.k.of_packed(k), layout.v.of_packed(v), mask, dropout, **kwargs)


class NarrowBertSelfAttention(_Narrow, BertSelfAttention):  # type: ignore[misc]
    """BertSelfAttention; W_O is in another module, so the results go there in full slots."""

    query: Any
    key: Any
    value: Any
    dropout: nn.Dropout

    def projections(self) -> tuple[Any, Any, Any]:
        return self.query, self.key, self.value

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        if not self.bucketed(hidden_states):
            stock: tuple[Tensor, Tensor | None] = BertSelfAttention.forward(
                self, hidden_states, attention_mask, past_key_values, **kwargs
            )
            return stock
        k, v = self.keys_and_values(hidden_states, _own(past_key_values))
        dropout = self.dropout.p if self.training else 0.0
        result = self.attend(hidden_states, k, v, attention_mask, dropout, **kwargs)
        return self.layout.in_slots(result), None


def _own(cache: Any) -> Any:
    """The part of a cache that is for what a decoder itself has written."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


NARROW: dict[type[nn.Module], type[_Narrow]] = {
    WhisperAttention: NarrowWhisperAttention,
    BertSelfAttention: NarrowBertSelfAttention,
}


def narrow(model: nn.Module) -> None:
    """Give each attention module of a loaded compact model, where all its projections are ragged, its second forward.

    The class is changed in place: weights, names, hooks and what `isinstance` says stay.
    """
    for module in model.modules():
        kind = NARROW.get(type(module))
        if kind is None:
            continue
        q, k, v = projections = kind.projections(module)  # type: ignore[arg-type]
        if not all(isinstance(projection, RaggedOut) for projection in projections) or q.ragged != k.ragged:
            continue
        if q.ragged.pairs is not None:  # which are not the first of their slots
            continue
        o = getattr(module, "out_proj", None)
        if o is not None and not (isinstance(o, RaggedIn) and o.ragged.ranks == v.ragged.ranks):
            continue
        module.__class__ = kind
        assert isinstance(module, _Narrow)
        module.decodes = bool(getattr(module, "is_decoder", False))
        module.adopt()
