"""Subclasses of transformers' attention modules whose forward can use bucketed attention.

They use the stock forward, with full-width heads, where bucketed attention does not apply: with an attention
implementation other than sdpa (eager returns attention weights), with adapters around the projections, on kinds of
devices without measured costs, and after `set_backend("scatter")`. In a version of transformers whose modules have
another forward, no module is replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import Cache, EncoderDecoderCache

from pessa_cli.compat.for_transformers import (
    attention_implementation,
    attention_kernel,
    attention_modules,
    store_cross_attention,
    stored_cross_attention,
)
from pessa_cli.compat.uses import BERT_ATTENTION, WHISPER_ATTENTION, change_of
from pessa_cli.runtime.bucketed_attention import CONTINUING, DECODING, ENCODING, BlockLayout, lay_out
from pessa_cli.runtime.buckets import Cost, get_backend
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut

WhisperAttention, BertSelfAttention = attention_modules()


class _PatchedAttention(nn.Module):
    """The parts that the patched attention modules share, with the bucket layout for their device."""

    layout: BlockLayout  # not a buffer, and created before any tracing, as the slots of the projections are
    decodes: bool
    is_causal: bool
    config: Any
    scaling: float
    layer_idx: int

    def projections(self) -> tuple[Any, Any, Any]:
        """Return the current Q, K and V modules, which may be adapters around the projections."""
        raise NotImplementedError

    @property
    def costs(self) -> dict[str, Cost]:
        """The costs by kind of device for the most frequent use of this block."""
        if not self.decodes:
            return ENCODING
        return CONTINUING if self.is_causal else DECODING

    def update_layout(self) -> None:
        """Compute the layout for the device of the weights, if they have moved to another one."""
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
            self.update_layout()
        return self

    def uses_buckets(self, x: Tensor) -> bool:
        """Return whether a call uses bucketed attention; the answer must not change while a cache is in use."""
        costs = self.costs
        backend = get_backend()
        return (
            backend != "scatter"
            and (backend == "bucketed" or (x.device.type in costs and self.layout.plan.pays))
            and attention_implementation(self.config) == "sdpa"
            and all(isinstance(projection, RaggedOut) for projection in self.projections())
        )

    def keys_and_values(self, x: Tensor, cache: Any) -> tuple[list[Tensor], list[Tensor]]:
        """Return the views by bucket of the keys and values of x, after those in the cache."""
        _, k_proj, v_proj = self.projections()
        k, v = k_proj(x, self.layout.k.slots), v_proj(x, self.layout.v.slots)
        if cache is not None:
            k, v = cache.update(k.unsqueeze(1), v.unsqueeze(1), self.layer_idx)  # the cache sees a single head
            k, v = k.squeeze(1), v.squeeze(1)
        return self.layout.k.of_rows(k), self.layout.v.of_rows(v)

    def attend(
        self, x: Tensor, k: list[Tensor], v: list[Tensor], mask: Tensor | None, dropout: float, **kwargs: Any
    ) -> Tensor:
        """Run the stock kernel once per bucket with the queries of x; returns the kept directions of all heads."""
        q = self.projections()[0](x, self.layout.q.slots)
        if x.shape[1] == 1:  # for a single query skip the stock wrapper, whose preparations have no effect

            def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scaling).transpose(1, 2)

        else:
            kernel = attention_kernel("sdpa")

            def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                result: Tensor = kernel(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)[0]
                return result

        return self.layout.attend(call, q, k, v, mask)


class NarrowWhisperAttention(_PatchedAttention, WhisperAttention):  # type: ignore[misc,valid-type]
    """WhisperAttention with bucketed attention: encoder and decoder self-attention, and cross-attention."""

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
        if not self.uses_buckets(hidden_states) or not isinstance(self.out_proj, RaggedIn):
            stock: tuple[Tensor, Tensor | None] = WhisperAttention.forward(
                self, hidden_states, key_value_states, past_key_values, attention_mask, **kwargs
            )
            return stock
        dropout = self.dropout if self.training else 0.0
        if isinstance(past_key_values, EncoderDecoderCache) and key_value_states is not None:
            result = self._cross_attention(
                hidden_states, key_value_states, past_key_values, attention_mask, dropout, **kwargs
            )
        else:
            source = hidden_states if key_value_states is None else key_value_states
            k, v = self.keys_and_values(source, _self_attention_cache(past_key_values))
            result = self.attend(hidden_states, k, v, attention_mask, dropout, **kwargs)
        return self.out_proj(result), None

    def _cross_attention(
        self, x: Tensor, encoded: Tensor, caches: Any, mask: Tensor | None, dropout: float, **kwargs: Any
    ) -> Tensor:
        """Attend to the encoder's output, whose keys and values are computed once and then read from the cache."""
        layout, stored = self.layout, stored_cross_attention(caches, self.layer_idx)
        if stored is None:
            k = layout.k.pack(self.k_proj(encoded, layout.k.slots))
            v = layout.v.pack(self.v_proj(encoded, layout.v.slots))
            stored = store_cross_attention(caches, self.layer_idx, k, v)
        k, v = stored
        if x.shape[:2] == (1, 1) and x.is_cpu and x.dtype == torch.float32 and mask is None and not dropout:
            return layout.attend_once(self.q_proj(x, layout.q.slots) * self.scaling, k, v)
        return self.attend(x, layout.k.of_packed(k), layout.v.of_packed(v), mask, dropout, **kwargs)


class NarrowBertSelfAttention(_PatchedAttention, BertSelfAttention):  # type: ignore[misc,valid-type]
    """BertSelfAttention with bucketed attention; W_O is in another module, so the result has full-width heads."""

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
        if not self.uses_buckets(hidden_states):
            stock: tuple[Tensor, Tensor | None] = BertSelfAttention.forward(
                self, hidden_states, attention_mask, past_key_values, **kwargs
            )
            return stock
        k, v = self.keys_and_values(hidden_states, _self_attention_cache(past_key_values))
        dropout = self.dropout.p if self.training else 0.0
        result = self.attend(hidden_states, k, v, attention_mask, dropout, **kwargs)
        return self.layout.in_slots(result), None


def _self_attention_cache(cache: Any) -> Any:
    """Return the self-attention part of an encoder-decoder cache; any other cache as it is."""
    return cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache


PATCHED: dict[type[nn.Module], type[_PatchedAttention]] = {
    stock: narrow
    for stock, narrow, use in (
        (WhisperAttention, NarrowWhisperAttention, WHISPER_ATTENTION),
        (BertSelfAttention, NarrowBertSelfAttention, BERT_ATTENTION),
    )
    if change_of(use) is None
}


def patch_attention(model: nn.Module) -> None:
    """Enable bucketed attention in each attention module of a compact model whose projections are all ragged.

    The module's class is replaced in place by a subclass, so weights, names, hooks and `isinstance` checks are kept.
    """
    for module in model.modules():
        kind = PATCHED.get(type(module))
        if kind is None:
            continue
        q, k, v = projections = kind.projections(module)  # type: ignore[arg-type]
        if not all(isinstance(projection, RaggedOut) for projection in projections) or q.ragged != k.ragged:
            continue
        if q.ragged.pairs is not None:  # kept frequency pairs are not the first directions of a head
            continue
        o = getattr(module, "out_proj", None)
        if o is not None and not (isinstance(o, RaggedIn) and o.ragged.ranks == v.ragged.ranks):
            continue
        module.__class__ = kind
        assert isinstance(module, _PatchedAttention)
        module.decodes = bool(getattr(module, "is_decoder", False))
        module.update_layout()
