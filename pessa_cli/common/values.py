"""Parsers and checks of option values: sizes, lists of layers, and devices."""

from __future__ import annotations

import re

from pessa_cli.common.errors import UsageError
from pessa_cli.common.text import shortened

MOST_PARTS = 200  # the most commas in a list of layers


def size_of(text: str, flag: str) -> int:
    """Parse a size such as 5GB or "1.5 MB" into bytes, with decimal units. Raises UsageError for any other text."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(kB|KB|MB|GB|TB)", text)
    if match is None:
        raise UsageError(f"{flag} {shortened(text)} is not a size", "write it as 5GB or 500MB")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2][0].upper()])


def parse_layers(text: str, flag: str = "--layers") -> frozenset[int]:
    """Parse a list of layers such as "3", "0-15" or "0-3,12,20-23". Raises UsageError for any other text."""
    layers: set[int] = set()
    wrong = UsageError(f"{flag} {shortened(text)} is not a list of layers", "write it as 0-15 or 0-3,12")
    if text.count(",") > MOST_PARTS:
        raise wrong
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise wrong
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)


def check_device(device: str, dtype: str = "float32") -> None:
    """Raise UsageError if torch cannot make tensors of this dtype on a device and read them back.

    MPS has no float64, and tensors on meta have no values.
    """
    import torch

    try:
        torch.zeros(1, dtype=getattr(torch, dtype), device=device).cpu()
    except (RuntimeError, AssertionError, TypeError, ImportError, NotImplementedError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(f"--device {device} cannot be used: {reason}", "give cpu, or leave --device out") from error
