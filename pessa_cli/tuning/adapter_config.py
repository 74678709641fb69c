"""Checks of an adapter's configuration, before PEFT builds layers of its sizes or runs its regular expressions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

PATTERNS = ("target_modules", "exclude_modules", "layers_pattern")  # a regular expression, or a list of names
BY_PATTERN = ("rank_pattern", "alpha_pattern")  # objects, of which PEFT matches the keys as regular expressions
RANKS = ("r", "init_r", "target_r")
# Limits on the keys of BY_PATTERN, on which the time to match them depends exponentially.
MOST_REPEATS, MOST_CHOICES = 3, 8


def check_adapter_config(config: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> None:
    """Raise ValueError, which begins with the key, for what PEFT would fail at, or take endless time or memory for.

    config: the content of adapter_config.json. shapes: of the adapter's tensors, one of whose sizes is its rank.
    """
    if not config.get("target_modules"):
        raise ValueError("target_modules is missing or empty")
    for key in PATTERNS:
        _check_names(key, config.get(key))
    layers = config.get("layers_to_transform")
    for layer in layers if isinstance(layers, list) else [layers]:
        if layer is not None and not isinstance(layer, int):
            raise ValueError(f"layers_to_transform has {str(layer)[:80]!r}, which is not the number of a layer")
    ranks = {key: config.get(key) for key in RANKS}
    for key in BY_PATTERN:
        values = config.get(key) or {}
        if not isinstance(values, dict):
            raise ValueError(f"{key} is no object")
        for pattern in values:
            _check_pattern(key, pattern)
            repeats, choices = (len(re.findall(signs, pattern)) for signs in (r"[*+?{]", r"\|"))
            if repeats > MOST_REPEATS or choices > MOST_CHOICES:
                raise ValueError(
                    f"{key} has {pattern[:80]!r}, with {repeats} repetitions and {choices} alternatives, more than "
                    f"{MOST_REPEATS} and {MOST_CHOICES}"
                )
        if key == "rank_pattern":
            ranks |= {f"{key} of {pattern[:80]}": rank for pattern, rank in values.items()}
    largest = max((size for shape in shapes for size in shape), default=0)
    for key, rank in ranks.items():
        if isinstance(rank, int | float) and rank > largest:
            raise ValueError(f"{key} is {rank:,}, but the largest size of its tensors is {largest:,}")


def _check_names(key: str, value: Any) -> None:
    if isinstance(value, str):
        _check_pattern(key, value)
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ValueError(f"{key} is neither a string nor a list of strings")
    elif key == "layers_pattern":  # PEFT matches each item
        for pattern in value or []:
            _check_pattern(key, pattern)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{key} has {pattern[:80]!r}, which is not a regular expression: {error}") from error
