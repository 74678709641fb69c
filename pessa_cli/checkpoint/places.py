"""Whether an output may be written to a place, and the lock by which one run at a time does it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.files import read_json
from pessa_cli.checkpoint.manifest import not_ours
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import TEMPORARY, reason

JOURNAL_FILE, LOCK_FILE = f"{TEMPORARY}journal.json", f"{TEMPORARY}lock"
OTHER = "give another -o"
Obstacle = Callable[[Path], str]  # why something may not be replaced; "" if it may


def partial_folder(out: Path) -> Path:
    """Return the folder beside the output `out` in which it is written until it is complete."""
    return out.parent / f".{out.name}.partial"


def partial_output(out: Path) -> Path:
    """Return the path of the output `out` until it is complete: a folder, or a file if the output is one."""
    return partial_folder(out) / "output"


def read_journal(place: Path) -> dict[str, Any]:
    """Return the journal of a partial folder; empty if there is none that can be read."""
    try:
        return read_json(place / JOURNAL_FILE)
    except PessaError:
        return {}


def claim(place: Path) -> int:
    """Make a partial folder, if it is not there, and lock it until the returned file descriptor is closed.

    The lock is on a file in it, because network file systems lock only files that are open for writing. Raises
    PessaError if something else has the name of the folder, or if another run holds the lock.
    """
    import fcntl

    for _ in range(100):
        with suppress(FileExistsError):
            place.mkdir()
        if place.is_symlink() or not place.is_dir():
            if os.path.lexists(place):
                raise _in_the_way(place, "a link" if place.is_symlink() else "a file")
            continue  # another run has deleted it just now
        try:
            if not _ours(place):
                raise _in_the_way(place, f"a folder without the {JOURNAL_FILE} that pessa writes")
            descriptor = os.open(place / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise
            raise PessaError(
                f"another run is writing into {place}", "wait until it has finished, or give another -o"
            ) from error
        if holds(descriptor, place):
            return descriptor
        os.close(descriptor)  # another run has deleted the folder before it was locked here
    raise PessaError(f"{place} appears and disappears again", "wait until other runs have finished")


def holds(descriptor: int, place: Path) -> bool:
    """Return whether a lock is on the partial folder of this name, which another run may have made anew."""
    return same(descriptor, place / LOCK_FILE)


def _ours(place: Path) -> bool:
    """Return whether pessa made a folder: it has a journal, or only the first or last files of a run."""
    only = all(path.name.startswith(TEMPORARY) for path in place.iterdir())
    return only or bool(read_journal(place))


def same(descriptor: int, place: Path) -> bool:
    """Return whether an open file or folder still has this name: another run may have made a new one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(place))
    except FileNotFoundError:
        return False


def _in_the_way(place: Path, kind: str) -> PessaError:
    return PessaError(
        f"{place}, where the output is to be written first, is {kind}", "move it away, or give another -o"
    )


def check_free(out: Path, sources: Sequence[Path], force: bool, obstacle: Obstacle = not_ours) -> None:
    """Raise PessaError when `out` may not be written: it exists, and is not to be replaced or must not be."""
    check_apart(out, sources)
    try:
        if not os.path.lexists(out):
            return
        found = f"{out} names no folder of its own" if out.name in ("", "..") else obstacle(out)
    except OSError as error:
        raise not_writable(out, error) from error
    if found and force:
        raise PessaError(f"--force does not replace {out}: {found}", f"move it away, or {OTHER}")
    if found:
        raise PessaError(f"{out} exists, and --force would not replace it: {found}", OTHER)
    if not force:
        raise PessaError(f"{out} exists", "give another -o, or --force to replace it")


def check_apart(out: Path, sources: Sequence[Path]) -> None:
    """Raise PessaError when `out` is one of the files and folders that are read, or is in one, or has one in it."""
    place = out.resolve()
    for source in sources:
        read = source.resolve()
        if read in place.parents:
            raise PessaError(f"{out} is inside {source}, which is only read", "give an -o outside of it")
        if place == read or place in read.parents:
            raise PessaError(f"{out} exists, and cannot be replaced because the run reads from it", OTHER)


def check_outside(path: Path, folder: Path, option: str) -> None:
    """Raise UsageError when a file to write, which `option` named, is in a folder that is only read."""
    if folder.resolve() in path.resolve().parents:
        raise UsageError(f"{option} {path} is inside {folder}, which is only read", "give a file outside of it")


def not_writable(out: Path, error: OSError) -> PessaError:
    """Return the error for an output that the operating system does not let us write."""
    return PessaError(f"cannot write {out}: {reason(error)}", "give an -o in a folder you may write to")


def make_parents(out: Path) -> list[Path]:
    """Create the missing parent folders of `out`; returns those that were created, the deepest first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    if out.parent.exists() and not out.parent.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(out.parent))
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Delete those of the folders that are empty."""
    for folder in folders:
        with suppress(OSError):  # the folder is not empty: it holds the output
            folder.rmdir()
