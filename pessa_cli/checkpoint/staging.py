"""The folder that an output is written in until it is complete, and how it gets its final name.

An output is written into `.NAME.partial` beside its place, flushed to the disk and renamed at the end. The folder
is locked while a run writes into it; what a killed run leaves there is what `--resume` goes on from.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    read_json,
    sha256_of,
    write_json,
)
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError

JOURNAL_FILE = ".pessa-journal.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_identity(reader: CheckpointReader, *known: Any) -> str:
    """Identifies what is made from this source, for a run that goes on with another's parts."""
    files = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in reader.stats().items()]
    return hashlib.sha256(json.dumps([*known, files], sort_keys=True).encode()).hexdigest()


@dataclass
class Staging:
    """The folder an output is written in, with a journal of the parts that are complete: name -> SHA-256.

    `run` identifies what is being written; a journal of another run is of no use to this one. A part is a file or a
    folder; `parts` is what messages call them.
    """

    folder: Path
    out: Path
    resume: bool = False
    parts: str = "finished shards"
    finished: dict[str, str] = field(default_factory=dict)
    _run: str = ""

    def begin(self, run: str) -> None:
        """Take over the shards that an earlier run finished, or start anew when there are none.

        Raises PessaError when there are some, and they are of another run or the user did not ask to resume.
        """
        self._run = run
        journal = self.folder / JOURNAL_FILE
        found = read_json(journal) if journal.exists() else {}
        shards = found.get("finished")
        if isinstance(shards, dict) and shards:
            left = f"{self.folder} holds {len(shards)} {self.parts} of an earlier run"
            if not self.resume:
                raise PessaError(left, f"--resume goes on with it; rm -r {self.folder} gives it up")
            if found.get("run") != run:
                raise PessaError(
                    f"{left} with another source, options or version of pessa",
                    f"repeat its options, or rm -r {self.folder} and start anew",
                )
            self.finished = {file: digest for file, digest in shards.items() if self._intact(file, digest)}
        for path in self.folder.iterdir():
            if path.name not in self.finished:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._write_journal()

    def _intact(self, file: str, digest: str) -> bool:
        path = self.folder / file
        return Path(file).name == file and path.exists() and sha256_of(path) == digest

    def done(self, file: str, digest: str) -> None:
        """Note a part that is complete and on the disk; parts that are gone by now are forgotten."""
        self.finished = {name: known for name, known in self.finished.items() if (self.folder / name).exists()}
        self.finished[file] = digest
        self._write_journal()

    def _write_journal(self) -> None:
        new = self.folder / f"{JOURNAL_FILE}.new"
        write_json(new, {"run": self._run, "finished": self.finished})
        new.replace(self.folder / JOURNAL_FILE)

    def put_in_place(self) -> None:
        """Rename the folder to its final name; a model that has the name gives way at the last moment."""
        with suppress(FileNotFoundError):
            (self.folder / JOURNAL_FILE).unlink()
        for path in self.folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        if not self.out.exists():
            self.folder.rename(self.out)
            return
        place = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.replaced-", dir=self.out.parent))
        old = place / self.out.name
        try:
            self.out.rename(old)
            self.folder.rename(self.out)
        except BaseException:  # Ctrl-C, too
            if old.exists():
                old.rename(self.out)
            place.rmdir()
            raise
        shutil.rmtree(place)


@contextmanager
def new_folder(
    out: Path, source: Path, force: bool = False, resume: bool = False, parts: str = "finished shards"
) -> Iterator[Staging]:
    """A folder beside `out` that becomes `out` at the end; when anything is raised, only finished parts stay in it.

    `force` lets another model give way, but never `source`, which is still being read, nor a folder that is no
    model. Raises PessaError in these cases, where nothing can be written, and where another run writes just now.
    """
    folder = partial_folder(out)
    made: list[Path] = []
    try:
        _check_free(out, source, force)
        made = _make_parents(out)
        folder.mkdir(exist_ok=True)
        lock = _lock(folder)
    except OSError as error:
        _remove_empty(made)
        raise _not_writable(out, error) from None
    staging = Staging(folder, out, resume, parts)
    try:
        yield staging
        staging.put_in_place()
    except OSError as error:
        hint = "free some space and run again" if error.errno in FULL_DISK else "see what is wrong there, and run again"
        raise PessaError(f"could not write {out}: {error}", hint + _what_stays(staging)) from error
    except PessaError as error:
        error.hint = (error.hint or "run again") + _what_stays(staging)
        raise
    finally:
        if not _holds_shards(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        _remove_empty(made)


def partial_folder(out: Path) -> Path:
    """Where an output is written until it is complete."""
    return out.parent / f".{out.name}.partial"


def _holds_shards(folder: Path) -> bool:
    """Whether a run, this one or an earlier one, has left shards that --resume can use."""
    try:
        return bool(read_json(folder / JOURNAL_FILE).get("finished"))
    except PessaError:
        return False


def _what_stays(staging: Staging) -> str:
    if not staging.finished:
        return ""
    return (
        f"; {len(staging.finished)} {staging.parts} stay in {staging.folder}: "
        f"--resume goes on with them, rm -r {staging.folder} gives them up"
    )


def _lock(folder: Path) -> int:
    """Lock a folder against other runs, for as long as the returned descriptor is open."""
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise BlockingIOError  # the other run ended between our two looks
    except BlockingIOError:
        os.close(descriptor)
        raise PessaError(f"another run is writing into {folder} just now", "wait for it, or give another -o") from None
    return descriptor


def check_free(out: Path, source: Path, force: bool) -> None:
    """Raise PessaError when `out` may not be written: it exists, or `force` would replace what must stay."""
    try:
        _check_free(out, source, force)
    except OSError as error:
        raise _not_writable(out, error) from None


def _not_writable(out: Path, error: OSError) -> PessaError:
    return PessaError(f"cannot write {out}: {error}", "give an -o in a folder you may write to")


def _check_free(out: Path, source: Path, force: bool) -> None:
    place, read = out.resolve(), source.resolve()
    if read in place.parents:
        raise PessaError(f"{out} is inside {source}, which is only read", "give an -o outside of it")
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise PessaError(f"{out} exists", "give another -o, or --force to replace it")
    if place == read or place in read.parents:
        raise PessaError(f"{out} is where the model is read from, so --force does not replace it", "give another -o")
    weights = (out / SINGLE_FILE).exists() or (out / INDEX_FILE).exists() or any(out.glob("*.onnx"))
    model = ((out / CONFIG_FILE).exists() and weights) or (out / ADAPTER_FILE).exists()
    if not model and not (out.is_dir() and not any(out.iterdir())):
        raise PessaError(f"{out} is not a model, so --force does not replace it", "give another -o")


def _make_parents(out: Path) -> list[Path]:
    """Make the folders above `out`; returns those that are new, the deepest first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # not empty: it now holds the output
            folder.rmdir()
