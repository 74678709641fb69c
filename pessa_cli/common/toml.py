"""TOML files with known tables and keys."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import file_size
from pessa_cli.common.text import shortened

MOST_BYTES = 2**20  # the largest recipe that is read
_CHOICES = {
    ("prune", "method"): ("svd", "vanilla"),
    ("prune", "layout"): ("compact", "dense"),
    ("verify", "level"): ("weights", "blocks", "outputs"),
}


def read_toml(path: Path, *tables: str) -> dict[str, Any]:
    """Return the content of a recipe file whose top level may hold only the given tables.

    Raises PessaError if the file cannot be read or parsed, and UsageError if it has another table or key at the top.
    """
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
    """Return `values`, one table of a recipe, after checking it against `known`, which maps each key to its type.

    Raises UsageError if the table has an unknown key, or a value of another type, too large or not among the choices.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {table} is not a table", f"write [{table}] above its keys")
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{path}: [{table}] has no key {shortened(key)}", f"it has {', '.join(known)}")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            kind = type(value).__name__
            raise UsageError(
                f"{path}: {key} = {shortened(value)} has the wrong type, {kind}", "see the examples in configs/"
            )
        if isinstance(value, int) and abs(value) > 2**53:
            raise UsageError(f"{path}: {key} = {shortened(value)} is too large", "see the examples in configs/")
        choices = _CHOICES.get((table, key))
        if choices is not None and value not in choices:
            raise UsageError(
                f"{path}: {key} = {shortened(value)} is not a known value", f"it is one of {', '.join(choices)}"
            )
        if isinstance(value, list) and {type(site) for site in value} != {str}:
            example = {"sites": "encoder.self", "targets": "q_proj"}.get(key, "speech/")
            raise UsageError(
                f"{path}: {key} = {shortened(value)} is not a list of strings", f'write it as ["{example}"]'
            )
    return values
