"""Spectra as small bar charts of characters."""

from __future__ import annotations

from math import log10
from statistics import geometric_mean

BLOCKS, ASCII = "▁▂▃▄▅▆▇█", "_.-:=+*#"


def sparkline(spectrum: list[list[float]], encoding: str, width: int = 20) -> str:
    """Draw the geometric mean of the heads' spectra as `width` bars, on a logarithmic scale of four decades."""
    bars_of = BLOCKS if "utf" in encoding.lower() else ASCII
    top = max(max(head) for head in spectrum)
    if top == 0:
        return bars_of[0] * width
    means = [geometric_mean([max(value, top * 1e-9) for value in column]) for column in zip(*spectrum, strict=True)]
    bars = []
    for i in range(min(width, len(means))):
        value = means[i * len(means) // min(width, len(means))]
        level = 1 + log10(value / top) / 4  # 1 at the top, 0 at a ten-thousandth
        bars.append(bars_of[min(len(bars_of) - 1, max(0, int(level * len(bars_of))))])
    return "".join(bars)
