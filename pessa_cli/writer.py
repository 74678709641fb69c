"""Writing a checkpoint: safetensors files as streams, in a folder that is whole or not there.

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
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from pessa_cli.checkpoint import (
    CHUNK,
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_DTYPES,
    CheckpointReader,
    Header,
    read_json,
    write_json,
)
from pessa_cli.errors import PessaError, listed

if TYPE_CHECKING:
    import torch

CHUNKS_BEHIND = 8  # that the hash may be behind the writing
ADAPTER_FILE = "adapter_config.json"
JOURNAL_FILE = ".pessa-journal.json"
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _Digest:
    """SHA-256 of what is written, in a thread of its own, never more than a few chunks behind."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Add a chunk, which must not change from now on."""
        self._waiting.append(self._pool.submit(self._hash.update, chunk))
        if len(self._waiting) > CHUNKS_BEHIND:
            self._waiting.popleft().result()

    def close(self) -> str:
        """The digest of everything."""
        self._pool.shutdown()
        return self._hash.hexdigest()


class ShardWriter:
    """One safetensors file: the header is written first, the tensors then arrive in its order.

    As a context manager it is complete and on the disk when left; `sha256` is then that of the whole file. Raises
    PessaError for a tensor out of turn, of another dtype or shape than planned, and for one that never came.
    """

    def __init__(self, path: Path, plan: Header, metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, info in plan.items():
            offsets = [end, end := end + info.nbytes]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format asks for data that starts 8-aligned
        self._plan = plan
        self._order = iter(plan)
        self._digest = _Digest()
        self.sha256 = ""
        self._file: BinaryIO = path.open("wb")
        with self._closed_on_error():
            self._file.truncate(8 + len(encoded) + end)  # a disk too small for it says so now
            self._write([len(encoded).to_bytes(8, "little"), encoded])

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next planned tensor; its dtype and shape must be the planned ones."""
        import torch

        info = self._plan[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != getattr(torch, TORCH_DTYPES[info.dtype]):
            raise PessaError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, planned was {info}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self.write(name, [flat.view(torch.uint8).numpy().data] if flat.numel() else [])

    def write(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the next planned tensor from its raw bytes."""
        expected = next(self._order, None)
        if name != expected:
            raise PessaError(f"{name} came when it was the turn of {expected}")
        written = self._write(chunks)
        if written != self._plan[name].nbytes:
            raise PessaError(f"{name} came with {written:,} bytes, planned were {self._plan[name].nbytes:,}")

    def _write(self, chunks: Iterable[bytes | bytearray | memoryview]) -> int:
        total = 0
        for chunk in chunks:
            for start in range(0, len(chunk), CHUNK):
                piece = memoryview(chunk)[start : start + CHUNK]
                self._digest.update(piece)
                self._file.write(piece)
            total += len(chunk)
        return total

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._digest.close()
            self._file.close()
            raise

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._closed_on_error():
            missing = list(self._order)
            if error is None and missing:
                raise PessaError(f"{len(missing)} planned tensors were never written\n{listed(missing)}")
            if error is None:
                self._file.flush()
                os.fsync(self._file.fileno())
            self.sha256 = self._digest.close()
        self._file.close()


class CheckpointWriter:
    """Weights of a whole model: `plan` maps each file to its tensors, which arrive in the order of the plan.

    More than one file gets an index. Used as a context manager; see `ShardWriter` for what raises.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        self._folder, self._plan, self._metadata = folder, plan, metadata
        self._left = [(file, name) for file, tensors in plan.items() for name in tensors]
        self._left.reverse()
        self._shard: ShardWriter | None = None
        self._file = ""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next planned tensor."""
        self._turn(name).put(name, tensor)

    def copy(self, name: str, reader: CheckpointReader) -> None:
        """Copy the next planned tensor byte for byte, in chunks."""
        self._turn(name).write(name, reader.chunks(name))

    def _turn(self, name: str) -> ShardWriter:
        file, expected = self._left.pop() if self._left else ("", None)
        if name != expected:
            raise PessaError(f"{name} came when it was the turn of {expected}")
        if self._shard is None or file != self._file:
            if self._shard is not None:
                self._shard.__exit__(None, None, None)
            self._shard, self._file = ShardWriter(self._folder / file, self._plan[file], self._metadata), file
        return self._shard

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.__exit__(kind, error, trace)
        if error is None and self._left:
            raise PessaError(f"{len(self._left)} planned tensors were never written")
        if error is None and len(self._plan) > 1:
            write_index(self._folder, self._plan)


def run_identity(reader: CheckpointReader, *known: Any) -> str:
    """Identifies what is made from this source, for a run that goes on with another's parts."""
    files = [(file, stat.st_size, stat.st_mtime_ns) for file, stat in reader.stats().items()]
    return hashlib.sha256(json.dumps([*known, files], sort_keys=True).encode()).hexdigest()


def write_index(folder: Path, plan: Mapping[str, Header]) -> None:
    """Write the index of a sharded checkpoint."""
    weight_map = {name: file for file, tensors in plan.items() for name in tensors}
    total = sum(info.nbytes for tensors in plan.values() for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)


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
        raise PessaError(f"cannot write {out}: {error}", "give an -o in a folder you may write to") from None
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


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, read in chunks, or of a folder: of its files' names and digests."""
    if path.is_dir():
        files = [file for file in sorted(path.rglob("*")) if file.is_file()]
        listing = [(file.relative_to(path).as_posix(), sha256_of(file)) for file in files]
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
