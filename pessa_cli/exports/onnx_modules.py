"""The modules that are traced for ONNX: Whisper's encoder, its decoder with and without a cache, and BERT.

They call layers of transformers, whose attention `exports.onnx` has replaced by that of `exports.onnx_attention`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pessa_cli.exports.onnx_attention import OnnxStep


class Encoder(nn.Module):
    """Whisper's encoder, from log-mel features to frames. The window length is fixed by the position embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_features: Tensor) -> Any:
        return self.encoder(input_features).last_hidden_state


class FirstPass(nn.Module):
    """Whisper's decoder over a prompt.

    Returns the logits and, for each layer, the keys and values of self-attention and of cross-attention.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.proj_out

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        step = OnnxStep({})
        logits = self.run(input_ids, encoder_hidden_states, step, 0)
        return logits, *(each for name in self.blocks() for each in step.present[name])

    def blocks(self) -> list[str]:
        """The names of the attention blocks in the order of their caches."""
        return [block.name for layer in self.decoder.layers for block in (layer.self_attn, layer.encoder_attn)]

    def run(self, input_ids: Tensor, frames: Tensor, step: OnnxStep, past: int) -> Tensor:
        """The logits (batch, T, vocabulary) of T new tokens after `past` cached ones."""
        positions = torch.arange(input_ids.shape[1]) + past  # (T,)
        hidden = self.decoder.embed_tokens(input_ids) + self.decoder.embed_positions.weight[positions]
        later = torch.arange(input_ids.shape[1] + past) > positions[:, None]  # (T, S)
        mask = later.to(hidden.dtype) * torch.finfo(hidden.dtype).min
        for layer in self.decoder.layers:
            hidden = layer(hidden, mask, frames, past_key_values=step)
        logits: Tensor = self.head(self.decoder.layer_norm(hidden))
        return logits


class LaterPass(FirstPass):
    """Whisper's decoder over new tokens, with a cache.

    Returns the logits and, for each layer, the keys and values of self-attention including the new tokens.
    """

    def forward(self, input_ids: Tensor, past_key_values: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        pairs = zip(past_key_values[::2], past_key_values[1::2], strict=True)
        step = OnnxStep(dict(zip(self.blocks(), pairs, strict=True)))
        # Layers only check that frames are given. The keys and values of the frames are in the cache.
        logits = self.run(input_ids, past_key_values[2], step, past_key_values[0].shape[2])
        return logits, *(each for name in self.blocks()[::2] for each in step.present[name])


class TextEncoder(nn.Module):
    """A BERT with or without a head, which returns its outputs as a tuple."""

    def __init__(self, model: Any, outputs: list[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(found[name] for name in self.outputs)
