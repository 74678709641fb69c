"""Output folders that are either complete or absent.

An output is written into the folder `.NAME.partial` beside its final place, flushed to disk and renamed at the end.
The folder is locked while a run writes into it. A killed run leaves its finished shards there, and `--resume`
continues from them.
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
OTHER = "give another -o"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def run_identity(reader: CheckpointReader, *known: Any) -> str:
    """Return a hash of the source's weight files and of `known`, the options that determine the output.

    A run may reuse the finished parts of an earlier run only if both have the same identity.
    """
    files = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in reader.stats().items()]
    return hashlib.sha256(json.dumps([*known, files], sort_keys=True).encode()).hexdigest()


@dataclass
class Staging:
    """The temporary folder of an output, with a journal of its complete parts.

    A part is a file or a folder; `finished` maps its name to its SHA-256, and `parts` is the noun for parts in
    messages. The journal also holds the identity of the run that wrote it, see `run_identity`.
    """

    folder: Path
    out: Path
    resume: bool = False
    parts: str = "finished shards"
    finished: dict[str, str] = field(default_factory=dict)
    _run: str = ""

    def begin(self, run: str) -> None:
        """Reuse the parts that an earlier run with the identity `run` finished, and delete everything else.

        Raises PessaError if there are finished parts, and they belong to another run or the user did not give --resume.
        """
        self._run = run
        journal = self.folder / JOURNAL_FILE
        found = read_json(journal) if journal.exists() else {}
        shards = found.get("finished")
        if isinstance(shards, dict) and shards:
            left = f"{self.folder} holds {len(shards)} {self.parts} of an earlier run"
            if not self.resume:
                raise PessaError(left, f"give --resume to continue it, or delete it with: rm -r {self.folder}")
            if found.get("run") != run:
                raise PessaError(
                    f"{left} with another source, options or version of pessa",
                    f"give the same options as that run, or delete it with: rm -r {self.folder}",
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
        """Record in the journal that a part is complete and on disk; removes parts that no longer exist."""
        self.finished = {name: known for name, known in self.finished.items() if (self.folder / name).exists()}
        self.finished[file] = digest
        self._write_journal()

    def _write_journal(self) -> None:
        new = self.folder / f"{JOURNAL_FILE}.new"
        write_json(new, {"run": self._run, "finished": self.finished})
        new.replace(self.folder / JOURNAL_FILE)

    def put_in_place(self) -> None:
        """Rename the folder to its final name, and delete the model that had this name before, if there is one."""
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
        except BaseException:  # also KeyboardInterrupt: the old model must get its name back
            if old.exists():
                old.rename(self.out)
            place.rmdir()
            raise
        shutil.rmtree(place)


@contextmanager
def new_folder(
    out: Path, source: Path, force: bool = False, resume: bool = False, parts: str = "finished shards"
) -> Iterator[Staging]:
    """Create a temporary folder beside `out`, and rename it to `out` when the context ends without an exception.

    After an exception only the finished parts stay in it. With `force` an existing model at `out` is replaced, but
    never `source`, which is still being read, nor a folder that does not hold a model. Raises PessaError if `out`
    exists and must not be replaced, if it cannot be written, or if another run is writing it.
    """
    folder = partial_folder(out)
    made: list[Path] = []
    try:
        check_free(out, source, force)
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
        full = error.errno in FULL_DISK
        hint = "free some space on the disk and run again" if full else "check that folder and its disk, and run again"
        raise PessaError(f"could not write {out}: {error}", hint + _kept_parts(staging)) from error
    except PessaError as error:
        error.hint = (error.hint or "run again") + _kept_parts(staging)
        raise
    finally:
        if not _holds_shards(folder):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)
        _remove_empty(made)


def partial_folder(out: Path) -> Path:
    """Return the temporary folder in which the output `out` is written until it is complete."""
    return out.parent / f".{out.name}.partial"


def _holds_shards(folder: Path) -> bool:
    """Return whether the folder holds finished shards of this or an earlier run, which --resume can use."""
    try:
        return bool(read_json(folder / JOURNAL_FILE).get("finished"))
    except PessaError:
        return False


def _kept_parts(staging: Staging) -> str:
    """The end of an error's hint: which finished parts were kept and how to go on; empty if there are none."""
    if not staging.finished:
        return ""
    return (
        f"; {len(staging.finished)} {staging.parts} were kept in {staging.folder}: "
        f"give --resume to continue, or delete them with: rm -r {staging.folder}"
    )


def _lock(folder: Path) -> int:
    """Lock a folder against other runs; the lock holds until the returned file descriptor is closed.

    Raises PessaError if another run holds the lock.
    """
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not folder.exists() or not os.path.samestat(os.fstat(descriptor), folder.stat()):
            raise BlockingIOError  # another run renamed or deleted the folder after it was opened here
    except BlockingIOError:
        os.close(descriptor)
        raise PessaError(
            f"another run is writing into {folder}", "wait until it has finished, or give another -o"
        ) from None
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
    if place == read or place in read.parents:
        obstacle = f"the model is read from {out}"
    elif not _replaceable(out):
        obstacle = f"{out} is not a model"
    elif force:
        return
    else:
        raise PessaError(f"{out} exists", "give another -o, or --force to replace it")
    raise PessaError(f"{obstacle}, so --force does not replace it" if force else f"{out} exists, and {obstacle}", OTHER)


def _replaceable(out: Path) -> bool:
    """Return whether `out` is a model, an adapter or an empty folder, which --force may replace."""
    weights = (out / SINGLE_FILE).exists() or (out / INDEX_FILE).exists() or any(out.glob("*.onnx"))
    if ((out / CONFIG_FILE).exists() and weights) or (out / ADAPTER_FILE).exists():
        return True
    return out.is_dir() and not any(out.iterdir())


def _make_parents(out: Path) -> list[Path]:
    """Create the missing parent folders of `out`; returns those that were created, the deepest first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # the folder is not empty: it holds the output
            folder.rmdir()
