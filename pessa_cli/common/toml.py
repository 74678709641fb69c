"""TOML files with known tables and keys."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import file_size
from pessa_cli.common.text import shortened

MOST_BYTES = 2**20  # of a recipe
_CHOICES = {
    ("prune", "method"): ("svd", "vanilla"),
    ("prune", "layout"): ("compact", "dense"),
    ("verify", "level"): ("weights", "blocks", "outputs"),
}


def read_toml(path: Path, *tables: str) -> dict[str, Any]:
    """The content of a recipe. Raises UsageError for anything at the top but these tables."""
    try:
        size = file_size(path)
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise PessaError(f"{path} is not a readable recipe: {error}", "see the examples in configs/") from None
    unknown = [key for key in content if key not in tables]
    if unknown:
        known = " and ".join(f"[{table}]" for table in tables)
        raise UsageError(f"{path}: unknown table or key {shortened(unknown[0])}", f"a recipe has {known}")
    return content


def checked(path: Path, table: str, values: Any, known: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The values of one table, when each key is known and of its type. Raises UsageError otherwise."""
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {table} is no table", f"write [{table}] above its keys")
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{path}: [{table}] has no key {shortened(key)}", f"it has {', '.join(known)}")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            kind = type(value).__name__
            raise UsageError(f"{path}: {key} = {shortened(value)} is a {kind}", "see the examples in configs/")
        if isinstance(value, int) and abs(value) > 2**53:
            raise UsageError(f"{path}: {key} = {shortened(value)} is too large", "see the examples in configs/")
        choices = _CHOICES.get((table, key))
        if choices is not None and value not in choices:
            raise UsageError(f"{path}: {key} = {shortened(value)}", f"it is one of {', '.join(choices)}")
        if isinstance(value, list) and {type(site) for site in value} != {str}:
            example = {"sites": "encoder.self", "targets": "q_proj"}.get(key, "speech/")
            raise UsageError(f"{path}: {key} = {shortened(value)}", f'write it as ["{example}"]')
    return values
