"""What pessa uses of openai-whisper beyond its documented functions. This imports openai-whisper, and so torch."""

from __future__ import annotations

from collections.abc import Mapping

from whisper import _ALIGNMENT_HEADS
from whisper.model import Linear, ModelDimensions, MultiHeadAttention, ResidualAttentionBlock, Whisper

__all__ = ["Linear", "ModelDimensions", "MultiHeadAttention", "ResidualAttentionBlock", "Whisper"]


def alignment_heads() -> Mapping[str, bytes]:
    """Return openai-whisper's alignment heads by model name, as base85 of a compressed array of (layer, head) bools."""
    found: Mapping[str, bytes] = _ALIGNMENT_HEADS
    return found


def uses_fused_attention() -> bool:
    """Return whether openai-whisper now computes attention without scores; word timestamps turn this off."""
    return bool(getattr(MultiHeadAttention, "use_sdpa", False))
