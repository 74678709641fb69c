"""Values as people write them: sizes and layers."""

from __future__ import annotations

import re

from pessa_cli.common.errors import UsageError
from pessa_cli.common.text import shortened

MOST_PARTS = 200  # of a list of layers, between its commas


def size_of(text: str, flag: str) -> int:
    """Bytes of a size as people write it: 5GB, 1.5 MB. Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(kB|KB|MB|GB|TB)", text)
    if match is None:
        raise UsageError(f"{flag} {shortened(text)} is not a size", "write it like 5GB or 500MB")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2][0].upper()])


def parse_layers(text: str, flag: str = "--layers") -> frozenset[int]:
    """Layers as people write them: "0-15", "3", "0-3,12,20-23". Raises UsageError for anything else."""
    layers: set[int] = set()
    wrong = UsageError(f"{flag} {shortened(text)} is not a list of layers", "write it like 0-15 or 0-3,12")
    if text.count(",") > MOST_PARTS:
        raise wrong
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise wrong
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)
