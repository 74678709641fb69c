"""The cross-attention heads of Whisper whose attention follows the audio in time, for timestamps of words."""

from __future__ import annotations

from typing import Any

Heads = list[tuple[int, int]]  # of (layer, head)


def alignment_heads(found: Any, layers: int, heads: int) -> Heads | None:
    """Return the alignment heads of a decoder from a list of [layer, head] in a file, in order.

    A distilled model often has the list of its teacher, which has more layers. Then none of its heads means anything
    here, and these are the heads that openai-whisper takes for a model without a list (`usual_heads`). None if `found`
    is no list of pairs of numbers from 0.
    """
    if not isinstance(found, list) or not all(
        isinstance(pair, list) and [type(index) for index in pair] == [int, int] and min(pair) >= 0 for pair in found
    ):
        return None
    if any(layer >= layers or head >= heads for layer, head in found):
        return usual_heads(layers, heads)
    return sorted({(layer, head) for layer, head in found})


def usual_heads(layers: int, heads: int) -> Heads:
    """Return all heads of the last half of the layers: openai-whisper's choice for a model without a list."""
    return [(layer, head) for layer in range(layers // 2, layers) for head in range(heads)]
