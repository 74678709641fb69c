"""Attention modules for ONNX graphs: matrix products as wide as the kept directions of a head, without scattering.

Three identities make these graphs smaller than those of other exporters, also for unpruned models. The softmax scale is
multiplied into W_Q. The key bias is dropped, because it adds the same number to every score of a query and softmax
removes that. The value bias moves into the output bias, because attention weights sum to one. `exports.onnx` refuses
blocks with attention sinks, in which they do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pessa_cli.algebra.absorb import value_bias_effect
from pessa_cli.algebra.heads import HeadWeights

# The cost of a slot in addition to its entries, in entries: measured for one query against 1500 frames.
SLOT_COST = 8
ALIGNED = 4  # floats in 16 bytes


@dataclass(frozen=True)
class Head:
    """The kept directions of one head, r_qk of Q-K and r_vo of V-O, with the softmax scale in q and q_bias."""

    q: Tensor  # (r_qk, D)
    q_bias: Tensor  # (r_qk,)
    k: Tensor  # (r_qk, D)
    v: Tensor  # (r_vo, D)
    o: Tensor  # (r_vo, D_o)


@dataclass
class OnnxStep:
    """The key/value cache of a forward pass by block name: `past` is its input, `present` its output."""

    past: dict[str, tuple[Tensor, Tensor]]
    present: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


def kept_heads(weights: HeadWeights, scaling: float) -> tuple[list[Head], Tensor]:
    """The heads with a V-O that is not zero, and the output bias (D_o,), in float32.

    scaling: the softmax scale. A direction is kept when both of its sides are non-zero, so that compact and dense files
    of a model give equal heads. A block of zeros keeps one head, so that its shapes remain valid.
    """
    q = weights.q.flatten(0, 1).float() * scaling  # (H, d, D)
    k, v = weights.k.float(), weights.v.float()
    o = weights.o.flatten(1, 2).permute(1, 2, 0).float()  # (H, d, D_o)
    q_bias = q.new_zeros(q.shape[:2]) if weights.q_bias is None else weights.q_bias.flatten(0, 1).float() * scaling
    o_bias = o.new_zeros(o.shape[-1]) if weights.o_bias is None else weights.o_bias.float()
    o_bias = (o_bias.double() + value_bias_effect(weights)).float()
    qk = ((q != 0).any(-1) | (q_bias != 0)) & (k != 0).any(-1)  # (H, d)
    vo = (v != 0).any(-1) & (o != 0).any(-1)
    live = [head for head in range(len(q)) if vo[head].any()] or [0]
    return [Head(q[h, qk[h]], q_bias[h, qk[h]], k[h, qk[h]], v[h, vo[h]], o[h, vo[h]]) for h in live], o_bias


class HeadByHead(nn.Module):
    """Self-attention that computes one head after the other, each with its own width: for long inputs without a cache.

    Only the scores of one head are in memory at a time.
    """

    def __init__(self, heads: list[Head], o_bias: Tensor) -> None:
        super().__init__()
        self.q = nn.ModuleList([_linear(_at_least_one(head.q), _at_least_one(head.q_bias)) for head in heads])
        self.k = nn.ModuleList([_linear(_at_least_one(head.k)) for head in heads])
        self.v = nn.ModuleList([_linear(_at_least_one(head.v)) for head in heads])
        self.o: nn.Module = _linear(torch.cat([_at_least_one(head.o) for head in heads]).T, o_bias)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any) -> tuple[Tensor, None]:
        """Attend within hidden_states (batch, T, D). attention_mask (batch, 1, T, T) is added to the scores."""
        outputs = []
        for q, k, v in zip(self.q, self.k, self.v, strict=True):
            scores = q(hidden_states) @ k(hidden_states).transpose(1, 2)  # (batch, T, T)
            if attention_mask is not None:
                scores = scores + attention_mask.squeeze(1)
            outputs.append(scores.softmax(-1) @ v(hidden_states))
        return self.o(torch.cat(outputs, -1)), None


class CacheSlots(nn.Module):
    """Attention over slots of equal width, for few graph nodes and a small cache. A wide head takes several slots.

    The scores of a head are the sum of the scores of its key slots, and its attention weights apply to each of its
    value slots. Keys are (batch, n_k, S, w_k) and values (batch, n_v, S, w_v), like any other cache. key_width,
    value_width: None chooses the widths with the least cost of reading the cache.
    """

    def __init__(
        self,
        name: str,
        heads: list[Head],
        o_bias: Tensor,
        key_width: int | None = None,
        value_width: int | None = None,
    ) -> None:
        super().__init__()
        self.name = name
        self.key_width = key_width or best_width(len(head.k) for head in heads)
        self.value_width = value_width or best_width(len(head.v) for head in heads)
        q, owners = _in_slots([head.q for head in heads], self.key_width)
        q_bias, _ = _in_slots([head.q_bias for head in heads], self.key_width)
        self.q = _linear(q, q_bias)
        self.k = _linear(_in_slots([head.k for head in heads], self.key_width)[0])
        self.v = _linear(_in_slots([head.v for head in heads], self.value_width)[0])
        o, value_owners = _in_slots([head.o for head in heads], self.value_width)
        self.o: nn.Module = _linear(o.T, o_bias)
        one_each = list(range(len(heads)))
        sums = (torch.tensor(owners) == torch.arange(len(heads))[:, None]).float()
        self.sums: Tensor | None  # (H, n_k), 1 where a slot belongs to a head; None if every head has one slot
        self.owners: Tensor | None  # (n_v,), the head of each value slot; None if every head has one slot
        self.register_buffer("sums", None if owners == one_each else sums)
        self.register_buffer("owners", None if value_owners == one_each else torch.tensor(value_owners))

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        past_key_values: OnnxStep | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Attend from hidden_states (batch, T, D), and to key_value_states (batch, S, D) in cross-attention.

        attention_mask is broadcast to (batch, H, T, S) and added to the scores.
        """
        q = self._split(self.q(hidden_states), self.key_width)
        k, v = self._keys_and_values(hidden_states, key_value_states, past_key_values)
        scores = q @ k.transpose(2, 3)  # (batch, n_k, T, S)
        if self.sums is not None:
            scores = (self.sums @ scores.flatten(2)).reshape(scores.shape[0], -1, *scores.shape[2:])  # (batch, H, T, S)
        if attention_mask is not None:
            scores = scores + attention_mask
        weights = scores.softmax(-1)
        if self.owners is not None:
            weights = weights.index_select(1, self.owners)  # (batch, n_v, T, S)
        return self.o((weights @ v).transpose(1, 2).flatten(2)), None

    def _keys_and_values(
        self, hidden_states: Tensor, key_value_states: Tensor | None, step: OnnxStep | None
    ) -> tuple[Tensor, Tensor]:
        """The keys and values to attend to: cached ones, and new ones, which are added to `step.present`."""
        past = step.past.get(self.name) if step is not None else None
        if past is not None and key_value_states is not None:
            return past
        source = hidden_states if key_value_states is None else key_value_states
        k, v = self._split(self.k(source), self.key_width), self._split(self.v(source), self.value_width)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        if step is not None:
            step.present[self.name] = k, v
        return k, v

    @staticmethod
    def _split(x: Tensor, width: int) -> Tensor:
        return x.reshape(*x.shape[:2], -1, width).transpose(1, 2)  # (batch, slots, T, width)


def best_width(ranks: Iterable[int]) -> int:
    """The width of slots, a multiple of ALIGNED, that makes heads of these ranks cheapest to read."""
    each = list(ranks)
    widths = range(ALIGNED, max(*each, 1) + ALIGNED, ALIGNED)
    return min(widths, key=lambda width: (sum(_slots(rank, width) for rank in each) * (width + SLOT_COST), -width))


def _slots(rank: int, width: int) -> int:
    """The number of slots of a head."""
    return max(1, -(-rank // width))


def _in_slots(parts: list[Tensor], width: int) -> tuple[Tensor, list[int]]:
    """The rows of all heads in slots of `width`, padded with zeros, and the head of each slot."""
    counts = [_slots(len(part), width) for part in parts]
    padded = [_padded(part, count * width) for part, count in zip(parts, counts, strict=True)]
    return torch.cat(padded), [head for head, count in enumerate(counts) for _ in range(count)]


def _at_least_one(part: Tensor) -> Tensor:
    """One row of zeros for a head without directions, otherwise the part itself."""
    return _padded(part, max(1, len(part)))


def _padded(part: Tensor, rows: int) -> Tensor:
    """The part with rows of zeros appended, `rows` in all."""
    return torch.cat([part, part.new_zeros(rows - len(part), *part.shape[1:])])


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A frozen linear layer with this weight (out, in) and bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
