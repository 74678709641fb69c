"""The file pessa.json, which lists the files of an output: with it, pessa knows what it wrote and may replace."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.files import read_json, write_json
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed

MANIFEST_FILE = "pessa.json"
CARD_FILE = "README.md"
UNHASHED = (MANIFEST_FILE, CARD_FILE)  # the manifest cannot hold its own hash, and users edit the card


def write_manifest(folder: Path, about: Mapping[str, Any], hashes: Mapping[str, str]) -> dict[str, Any]:
    """Write the pessa.json of a folder and return its content: `about`, and the SHA-256 of each file by name."""
    content = dict(about) | {"sha256": dict(sorted(hashes.items()))}
    write_json(folder / MANIFEST_FILE, content)
    return content


def not_ours(folder: Path) -> str:
    """Return why `folder` may not be replaced: something in it is not from pessa. Return "" if it may be.

    It may be replaced if it is empty, or if its pessa.json names every file in it. Files that were edited since count
    as pessa's.
    """
    if folder.is_symlink():
        return f"{folder} is a link"
    if not folder.is_dir():
        return f"{folder} is not a folder"
    files = _files(folder)
    first = next(files, None)
    if first is None:
        return ""
    try:
        manifest = read_json(folder / MANIFEST_FILE)
        known = manifest["sha256"] if manifest["pessa"] else {}
        names = {*known, *UNHASHED}
    except (PessaError, KeyError, TypeError):
        return f"{folder} was not written by pessa: it has no valid {MANIFEST_FILE}"
    # pessa writes no links: one in the place of its file leads to a copy that others may rely on.
    foreign = sorted(name for name in (first, *files) if name not in names or (folder / name).is_symlink())
    return f"{folder} holds files that pessa did not write\n{listed(foreign)}" if foreign else ""


def _files(folder: Path) -> Iterator[str]:
    """Yield the relative names of everything below a folder that is not a folder, including hidden files and links."""
    for place, folders, files in os.walk(folder, onerror=_raise):
        linked = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*files, *linked):
            yield Path(place, name).relative_to(folder).as_posix()


def _raise(error: OSError) -> None:
    raise error
