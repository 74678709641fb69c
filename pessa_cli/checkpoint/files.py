"""The files of a model folder: their names, JSON content and hashes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
ADAPTER_FILE = "adapter_config.json"
# Limits on files that are parsed before their content is validated; real files stay below half of each limit.
MOST_JSON = 32 * 2**20  # bytes of a JSON file or a safetensors header; parsed, it takes up to 25 times as much memory
MOST_DEPTH = 64  # nesting levels of JSON
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises the errors of `read_json_value`, and PessaError for no object."""
    value = read_json_value(path)
    if not isinstance(value, dict):
        raise PessaError(f"{path} holds a {type(value).__name__}, not a JSON object", "download the file again")
    return value


def read_json_value(path: Path) -> Any:
    """Return the value in a JSON file, of any type.

    Raises PessaError if the file is missing, unreadable, too large or too deeply nested.
    """
    try:
        size = file_size(path)
        if size > MOST_JSON:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_JSON:,}")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PessaError(f"{path} does not exist", "give the folder of a complete checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise PessaError(f"{path} is not readable JSON: {error}", "download the file again") from error
    if not _within_depth(value):
        raise PessaError(f"{path} is nested more than {MOST_DEPTH} levels deep", "download the file again")
    return value


def _within_depth(value: Any) -> bool:
    level = [value]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return True
    return False


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented UTF-8 JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        encoded = text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON can express with an escape and UTF-8 cannot
        encoded = json.dumps(value, indent=2).encode()
    path.write_bytes(encoded + b"\n")


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict for `json.loads(object_pairs_hook=...)`. Raises ValueError if a key is repeated."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, or of a folder, over the names and digests of its files."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        listing = [(file.relative_to(path).as_posix(), sha256_of(file)) for file in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def source_name(folder: Path) -> str:
    """Return a name for the model in a folder: `owner/name` for a snapshot of the hub, else the folder name.

    For a link it is the name of the link, which is what the user gave.
    """
    given = Path(os.path.abspath(folder)).name  # noqa: PTH100  # resolves ".." and no links
    folder = folder.resolve()
    place = folder.parent.parent.name.split("--")
    if folder.parent.name == "snapshots" and place[0] == "models" and len(place) > 1:
        return "/".join(place[1:])
    return given
