"""Outputs that are either complete or absent.

An output NAME is written into the folder `.NAME.partial` beside its final place, which holds a journal, the output
itself under the name `output`, and for a moment what the output replaces. At the end the output is renamed to its final
place, and the folder is deleted. The folder is locked from the beginning to the end, so that one run at a time writes
NAME. A killed run leaves its finished shards there, and `--resume` continues from them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.checkpoint.manifest import not_ours
from pessa_cli.checkpoint.places import (
    JOURNAL_FILE,
    LOCK_FILE,
    Obstacle,
    check_free,
    claim,
    holds,
    make_parents,
    not_writable,
    partial_folder,
    partial_output,
    read_journal,
    remove_empty,
    same,
)
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import FULL_DISK, TEMPORARY, rename_new, sync_folder, write_file

REPLACED, DELETED = "replaced", "deleted"  # in the partial folder, beside the journal and the output


def run_identity(reader: CheckpointReader, *known: Any) -> str:
    """Return a hash of the source's weight files and of `known`, the options that determine the output.

    A run may reuse the finished parts of an earlier run only if both have the same identity.
    """
    files = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in reader.stats().items()]
    return hashlib.sha256(json.dumps([*known, files], sort_keys=True).encode()).hexdigest()


@dataclass
class Staging:
    """The temporary place of an output, with a journal of its complete parts.

    A part is a file or a folder; `finished` maps its name to its SHA-256, and `parts` is the noun for parts in
    messages. The journal also holds the identity of the run that wrote it, see `run_identity`.
    """

    out: Path
    resume: bool = False
    parts: str = "finished shards"
    finished: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    _run: str = ""

    @property
    def place(self) -> Path:
        """The partial folder."""
        return partial_folder(self.out)

    @property
    def folder(self) -> Path:
        """The output while it is written: a folder, or a file if the output is one."""
        return partial_output(self.out)

    @property
    def left(self) -> str:
        """The parts that an earlier run finished, for a message."""
        return f"{self.place} holds {len(self.finished)} {self.parts} of an earlier run"

    def look(self) -> None:
        """Find the parts that an earlier run finished, and delete its output if there are none.

        Raises PessaError if there are such parts, and the user did not give --resume.
        """
        journal = read_journal(self.place)
        found = journal.get("finished")
        if isinstance(found, dict):
            self.finished = {str(name): str(digest) for name, digest in found.items() if (self.folder / name).exists()}
        self._run = str(journal.get("run", ""))
        if journal.get("complete") and os.path.lexists(self.folder) and not (self.finished and self.resume):
            raise PessaError(
                f"{self.place} holds the finished output of an earlier run, which could not be put in place",
                f"move {self.folder} where you want it, or delete it with: rm -r {self.place}",
            )
        if self.finished and not self.resume:
            raise PessaError(self.left, f"give --resume to continue it, or delete it with: rm -r {self.place}")
        if not self.finished:
            _delete(self.folder)
            self._write_journal()

    def begin(self, run: str) -> None:
        """Reuse the parts that an earlier run with the identity `run` finished, and delete everything else.

        Raises PessaError if there are finished parts of another run.
        """
        if self.finished and self._run != run:
            raise PessaError(
                f"{self.left} with another source, options or version of pessa",
                f"give the same options as that run, or delete it with: rm -r {self.place}",
            )
        self._run = run
        self.finished = {name: digest for name, digest in self.finished.items() if self._intact(name, digest)}
        for path in self.folder.iterdir():
            if path.name not in self.finished:
                _delete(path)
        self._write_journal()

    def _intact(self, file: str, digest: str) -> bool:
        path = self.folder / file
        return Path(file).name == file and path.exists() and sha256_of(path) == digest

    def done(self, file: str, digest: str) -> None:
        """Record in the journal that a part is complete and on disk; removes parts that no longer exist."""
        self.finished = {name: known for name, known in self.finished.items() if (self.folder / name).exists()}
        self.finished[file] = digest
        self._write_journal()

    def _write_journal(self) -> None:
        content = json.dumps({"run": self._run, "finished": self.finished, "complete": self.complete}, indent=2)
        write_file(self.place / JOURNAL_FILE, content.encode())

    def need(self, nbytes: int) -> None:
        """Raise PessaError if the disk has no room for this many more bytes, before they are computed."""
        disk = shutil.disk_usage(self.place)
        if disk.total and disk.free < nbytes:
            raise PessaError(
                f"{self.out} takes {nbytes:,} bytes, but only {disk.free:,} are free on its disk",
                "free some space on the disk, or give an -o on another disk",
            )

    def put_in_place(self, seen: int | None, obstacle: Obstacle) -> None:
        """Rename the output to its final name.

        seen: a descriptor of what had this name when the run began, which is then deleted. If it is no longer the same,
        or if `obstacle` finds that something was added to it, it gets its name back, and PessaError is raised.
        """
        _sync(self.folder)
        replaced = self.place / REPLACED
        try:
            if seen is not None and same(seen, self.out):
                self.out.rename(replaced)
                if not same(seen, replaced):
                    raise FileExistsError
                if changed := obstacle(replaced):
                    raise self._taken(f"it was changed during the run: {changed}")
            rename_new(self.folder, self.out)
        except FileExistsError as error:
            self.recover()
            raise self._taken("something has appeared there during the run") from error
        except BaseException:  # also KeyboardInterrupt: what was there must get its name back
            self.recover()
            raise
        self.recover()
        sync_folder(self.out.parent)

    def _taken(self, why: str) -> PessaError:
        """Return the error for a place that is taken at the end of a run; the output is then kept."""
        self.complete = True
        with suppress(PessaError):
            self._write_journal()
        return PessaError(
            f"{self.out} was left as it is: {why}",
            f"the finished output is in {self.folder}; move it where you want it",
        )

    def recover(self) -> None:
        """Undo the replacement of an output that was interrupted, or finish it if the output is in place already.

        Raises PessaError if neither is possible, because something else has the name of the output now.
        """
        replaced = self.place / REPLACED
        _delete(self.place / DELETED)
        if not os.path.lexists(replaced):
            return
        if not os.path.lexists(self.out):
            rename_new(replaced, self.out)
        elif not os.path.lexists(self.folder) or self.folder.samefile(self.out):  # the output is in place
            replaced.rename(self.place / DELETED)
        else:
            raise PessaError(
                f"{replaced} was moved there from {self.out}, where something else has appeared since",
                f"move both where you want them, and delete the rest with: rm -r {self.place}",
            )

    def leave(self) -> None:
        """Delete the partial folder, unless it holds something that is worth keeping."""
        kept = any((self.folder / name).exists() for name in self.finished)
        complete = read_journal(self.place).get("complete") and os.path.lexists(self.folder)
        with suppress(OSError):
            if kept or complete or os.path.lexists(self.place / REPLACED):
                (self.place / LOCK_FILE).unlink()
                return
            for path in (self.place / DELETED, self.folder):
                _delete(path)
            names = [path.name for path in self.place.glob(f"{TEMPORARY}*") if path.name != LOCK_FILE]
            for name in (*names, LOCK_FILE):  # the journal after what it describes, and the lock last
                (self.place / name).unlink()
            self.place.rmdir()

    @property
    def kept(self) -> str:
        """The end of an error's hint: which finished parts were kept and how to go on; empty if there are none."""
        if self.complete or not self.finished:
            return ""
        return (
            f"; {len(self.finished)} {self.parts} were kept in {self.place}: "
            f"give --resume to continue, or delete them with: rm -r {self.place}"
        )


@contextmanager
def new_folder(
    out: Path,
    sources: Sequence[Path],
    force: bool = False,
    resume: bool = False,
    parts: str = "finished shards",
) -> Iterator[Staging]:
    """Create a temporary folder, and rename it to `out` when the context ends without an exception.

    After an exception only the finished parts stay in it. With `force` an existing output of pessa or an empty folder
    at `out` is replaced, but only if it is still the same at the end, and never one of `sources`, which are still being
    read. Raises PessaError if `out` exists and must not be replaced, if it cannot be written, or if another run is
    writing it.
    """
    with _new_output(out, sources, force, resume, parts, not_ours) as staging:
        staging.folder.mkdir(exist_ok=True)
        yield staging


@contextmanager
def new_file(out: Path, sources: Sequence[Path], force: bool, obstacle: Obstacle) -> Iterator[Path]:
    """The path of a temporary file that is renamed to `out` as in `new_folder`.

    obstacle: returns why the file at `out` may not be replaced, or "" if it may.
    """
    with _new_output(out, sources, force, False, "parts", obstacle) as staging:
        yield staging.folder


@contextmanager
def _new_output(
    out: Path, sources: Sequence[Path], force: bool, resume: bool, parts: str, obstacle: Obstacle
) -> Iterator[Staging]:
    staging = Staging(out, resume, parts)
    place = staging.place
    made: list[Path] = []
    lock = seen = None
    working = False
    try:
        check_free(out, sources, force, obstacle)
        made = make_parents(out)
        lock = claim(place)
        staging.recover()
        check_free(out, sources, force, obstacle)  # again, since nobody else can write it from here on
        with suppress(FileNotFoundError):  # while it is open, nothing else can get its number
            seen = os.open(out, os.O_RDONLY | os.O_NOFOLLOW)
        staging.look()
        working = True
        yield staging
        if not holds(lock, place):
            raise PessaError(f"{place} was moved or deleted during the run", "run again, and leave it alone meanwhile")
        staging.put_in_place(seen, obstacle)
    except OSError as error:
        if not working:
            raise not_writable(out, error) from error
        full = error.errno in FULL_DISK
        hint = "free some space on the disk and run again" if full else "check that folder and its disk, and run again"
        raise PessaError(f"{out} was not written: {error}", hint + staging.kept) from error
    except PessaError as error:
        if working:
            error.hint = (error.hint or "run again") + staging.kept
        raise
    finally:
        if lock is not None:
            if holds(lock, place):
                staging.leave()
            os.close(lock)
        if seen is not None:
            os.close(seen)
        remove_empty(made)


def _delete(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Flush a file, or all files and folders below a folder, to disk."""
    for each in (path, *path.rglob("*")):
        if each.is_dir():
            sync_folder(each)
        else:
            with each.open("rb") as file:
                os.fsync(file.fileno())
