"""The files of a model folder, and the symbolic links among them.

A link out of the folder may point to a private file, which would then become a part of the output. Links into the hub's
cache point to files of models: snapshots consist of links to the folder `blobs` beside them, and a download into a
local folder may consist of such links, too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from pessa_cli.checkpoint.contents import why_left_out
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed

MOST_FILES = 10_000  # below a model's folder, with the folders
READ = (".safetensors", ".index.json")  # the ends of names of files that are read for the weights


class _Entry(NamedTuple):
    """A file or folder below a folder, with its relative name; or a link that leads to no file, or out of it."""

    name: str
    path: Path
    fault: Literal["outside", "nowhere", "special"] | None


def visible_files(folder: Path, enter_links: bool = True) -> dict[str, Path]:
    """Map the relative names of the files below a folder to their paths, without hidden ones.

    Links are followed; `check_links` says whether they may be. enter_links: also enter folders outside of this one.
    Raises PessaError if there are more than MOST_FILES.
    """
    return {entry.name: entry.path for entry in _listing(folder, enter_links) if entry.path.is_file()}


def hidden_files(folder: Path) -> list[str]:
    """Return the names of the hidden files and folders in a folder; those of folders end with a slash."""
    return sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name.startswith("."))


def check_links(folder: Path, follow: bool = False, everything: bool = False) -> None:
    """Check the links among the files of a model folder, which may itself be a link.

    follow: allow links that lead out of the folder and of the hub's cache. everything: also look at files that no
    output takes over. Raises PessaError with the names and targets of the links that may not be followed, and of those
    that lead nowhere, and of what is neither a file nor a folder.
    """
    try:
        faults = [entry for entry in _listing(folder, follow) if entry.fault]
    except OSError as error:
        raise PessaError(f"{folder} cannot be read: {error}", "check the permissions of its files") from error
    if not everything:
        faults = [entry for entry in faults if _matters(entry)]
    special = [entry.name for entry in faults if entry.fault == "special"]
    nowhere = [f"{entry.name} -> {entry.path.readlink()}" for entry in faults if entry.fault == "nowhere"]
    outside = [f"{entry.name} -> {os.path.realpath(entry.path)}" for entry in faults if entry.fault == "outside"]
    if special:
        raise PessaError(
            f"{folder} has pipes, sockets or devices in the place of files\n{listed(special)}",
            "put the files in their place, or delete them",
        )
    if nowhere:
        raise PessaError(
            f"{folder} has links that lead to no file, or in a circle\n{listed(nowhere)}",
            "restore the files, for example by a new download, `dvc pull` or `git annex get`, or delete the links",
        )
    if outside:
        raise PessaError(
            f"{folder} has links that lead out of it, to files that would become a part of the output\n"
            f"{listed(outside)}",
            "give --follow-links if these files belong to the model; otherwise delete the links",
        )


def _matters(entry: _Entry) -> bool:
    """Return whether a file may be read or copied: it is not left out, or it could be a shard of the weights."""
    name = entry.name + "/" * entry.path.is_dir()
    return why_left_out(name) is None or name.endswith(READ)


def _listing(folder: Path, follow: bool) -> list[_Entry]:
    found = list(islice(_entries(folder, follow), MOST_FILES + 1))
    if len(found) > MOST_FILES:  # a few folders with links to one another can stand for any number of files
        raise PessaError(
            f"{folder} has more than {MOST_FILES:,} files, or links that make them so many",
            "give a folder with the files of the model only",
        )
    return found


def _entries(folder: Path, follow: bool, parts: str = "", roots: tuple[Path, ...] = ()) -> Iterator[_Entry]:
    """Yield the visible files and folders below a folder in order, and the links with faults.

    follow: enter and yield links that lead out, as if they did not. roots: the model's folder, and the folders above
    this one, without links in their paths.
    """
    real = Path(os.path.realpath(folder))
    for path in sorted(real.iterdir()):
        if path.name.startswith("."):
            continue
        name, fault = parts + path.name, _fault(path, (*roots, real), follow)
        yield _Entry(name, path, fault)
        if fault is None and path.is_dir():
            yield from _entries(path, follow, f"{name}/", (*roots, real))


def _fault(path: Path, roots: tuple[Path, ...], follow: bool) -> Literal["outside", "nowhere", "special"] | None:
    target = Path(os.path.realpath(path))
    if path.is_symlink() and (not _exists(target) or target in roots):  # a link to a folder above it never ends
        return "nowhere"
    if not path.is_file() and not path.is_dir():
        return "special"
    if not path.is_symlink():
        return None
    allowed = follow or target.is_relative_to(roots[0]) or _is_cached(target, roots[0])
    return None if allowed else "outside"


def _exists(path: Path) -> bool:
    """Return whether a file exists and may be seen."""
    try:
        return path.exists()
    except OSError:
        return False


def _is_cached(target: Path, folder: Path) -> bool:
    """Return whether a file is a blob of the hub's cache: of the snapshot that the folder is in, or of any model."""
    blobs = [place for place in target.parents if place.name == "blobs"]
    own = [place.parent for place in folder.parents if place.name == "snapshots"]
    return any(place.parent.name.startswith("models--") or place.parent in own for place in blobs)
