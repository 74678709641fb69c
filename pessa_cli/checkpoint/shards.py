"""Streaming writers for safetensors files: the header is written first, then the tensors in the header's order."""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import INDEX_FILE, write_json
from pessa_cli.checkpoint.reader import CHUNK, CheckpointReader, Header
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed

if TYPE_CHECKING:
    import torch


CHUNKS_BEHIND = 8  # how many chunks hashing may lag behind writing, which bounds the memory


class _Digest:
    """The SHA-256 of the written chunks, computed in a separate thread that lags at most CHUNKS_BEHIND chunks."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)
        self._waiting: deque[Future[None]] = deque()

    def update(self, chunk: bytes | bytearray | memoryview) -> None:
        """Add a chunk; the caller must not change it afterwards, since it is hashed later."""
        self._waiting.append(self._pool.submit(self._hash.update, chunk))
        if len(self._waiting) > CHUNKS_BEHIND:
            self._waiting.popleft().result()

    def close(self) -> str:
        """Wait for the thread, and return the digest of all chunks in hexadecimal."""
        self._pool.shutdown()
        return self._hash.hexdigest()


class ShardWriter:
    """A writer for one safetensors file, used as a context manager.

    The header is written at once, from `plan`; the tensors must then be put in the plan's order. When the context ends,
    the file is complete and flushed to disk, and `sha256` is its digest. Raises PessaError if a tensor is put out of
    order or with another dtype, shape or size than planned, or if a planned tensor was never put.
    """

    def __init__(self, path: Path, plan: Header, metadata: Mapping[str, str]) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, info in plan.items():
            offsets = [end, end := end + info.nbytes]
            header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)  # the format requires that the data start at a multiple of 8 bytes
        self._plan = plan
        self._order = iter(plan)
        self._digest = _Digest()
        self.sha256 = ""
        self._file: BinaryIO = path.open("wb")
        with self._closed_on_error():
            self._file.truncate(8 + len(encoded) + end)  # a disk that is too small for the file fails here, early
            self._write([len(encoded).to_bytes(8, "little"), encoded])

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next planned tensor. Raises PessaError if its name, dtype or shape is not the planned one."""
        import torch

        info = self._plan[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != getattr(torch, TORCH_DTYPES[info.dtype]):
            raise PessaError(
                f"{name} was put as {tensor.dtype} {tuple(tensor.shape)}, but {info.dtype} {info.shape} was planned"
            )
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self.write(name, [flat.view(torch.uint8).numpy().data] if flat.numel() else [])

    def write(self, name: str, chunks: Iterable[bytes | bytearray | memoryview]) -> None:
        """Write the next planned tensor from its raw bytes. Raises PessaError if its name or size is not planned."""
        expected = next(self._order, None)
        if name != expected:
            raise PessaError(f"{name} was put out of order: {expected} is the next planned tensor")
        written = self._write(chunks)
        if written != self._plan[name].nbytes:
            raise PessaError(f"{name} was put with {written:,} bytes, but {self._plan[name].nbytes:,} were planned")

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
    """A writer for all weight files of a model, used as a context manager.

    `plan` maps each file name to its tensors, which must be put in the plan's order. With more than one file an index
    is written at the end. Raises PessaError in the same cases as `ShardWriter`.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        self._folder, self._plan, self._metadata = folder, plan, metadata
        self._left = [(file, name) for file, tensors in plan.items() for name in tensors]
        self._left.reverse()
        self._shard: ShardWriter | None = None
        self._file = ""

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next planned tensor."""
        self._shard_of(name).put(name, tensor)

    def copy(self, name: str, reader: CheckpointReader) -> None:
        """Copy the next planned tensor byte for byte, in chunks."""
        self._shard_of(name).write(name, reader.chunks(name))

    def _shard_of(self, name: str) -> ShardWriter:
        """Return the writer for the next planned tensor, which must be `name`; finishes the shard before it."""
        file, expected = self._left.pop() if self._left else ("", None)
        if name != expected:
            raise PessaError(f"{name} was put out of order: {expected} is the next planned tensor")
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


def write_index(folder: Path, plan: Mapping[str, Header]) -> None:
    """Write model.safetensors.index.json for a sharded checkpoint."""
    weight_map = {name: file for file, tensors in plan.items() for name in tensors}
    total = sum(info.nbytes for tensors in plan.values() for info in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / INDEX_FILE, index)
