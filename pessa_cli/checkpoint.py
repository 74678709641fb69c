"""Checkpoints on disk: safetensors files read and written tensor by tensor, never whole.

The reader knows every tensor's dtype, shape and place from the headers alone; the writer is told all of that
before the first byte, so that tensors can be put in any order. torch is imported only where a tensor is made.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from pessa_cli.errors import PessaError, listed

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
CONFIG_FILE = "config.json"
CHUNK = 16 * 2**20  # bytes copied at a time

TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it: the format's dtype name ("F16") and the shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.count * ITEM_BYTES[self.dtype]


Header = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int
    nbytes: int


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises PessaError when it is missing, unreadable or no object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PessaError(f"{path} does not exist", "give the folder of a complete checkpoint") from None
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PessaError(f"{path} is not readable JSON: {error}", "download the file again") from None
    if not isinstance(value, dict):
        raise PessaError(f"{path} holds a {type(value).__name__}, not a JSON object", "download the file again")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """The tensors of one file with their absolute offsets, and its metadata."""
    from safetensors import SafetensorError, safe_open

    try:
        # The format's own library is the judge of validity: lengths, offsets, overlaps, duplicate keys.
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        raise PessaError(f"{path} does not exist", "download the missing shard") from None
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise PessaError(
            f"{path} ({size:,} bytes) is not a complete safetensors file: {error}", "download the file again"
        ) from None
    with path.open("rb") as raw:
        length = int.from_bytes(raw.read(8), "little")
        header = json.loads(raw.read(length))
    header.pop("__metadata__", None)
    unknown = [f"{name}: {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in ITEM_BYTES]
    if unknown:
        raise PessaError(
            f"{path} holds tensors of a dtype that pessa does not copy\n{listed(unknown)}",
            "quantise after pruning: give the float checkpoint that this one was made from",
        )
    return {
        name: (TensorInfo(entry["dtype"], tuple(entry["shape"])), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }, metadata


class CheckpointReader:
    """A folder with `config.json` and safetensors weights, single file or sharded with an index.

    `header` maps each tensor's name to its dtype and shape; `config` is the parsed config.json. Only headers are
    read until `get` or `chunks` is called. Raises PessaError for a folder that is no model, a missing or
    truncated shard, an index that disagrees with its shards, or weights that are only there as pickles.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise PessaError(f"{folder} is not a folder", "give the folder of a Hugging Face checkpoint")
        self.folder = folder
        self.files = self._weight_files(folder)
        self.config = read_json(folder / CONFIG_FILE)
        self.metadata: dict[str, str] = {}
        self._places: dict[str, _Place] = {}
        infos: dict[str, TensorInfo] = {}
        for file in self.files:
            tensors, metadata = _read_header(folder / file)
            self.metadata.update(metadata)
            for name, (info, offset) in tensors.items():
                if name in infos:
                    twice = f"{self._places[name].file} and {file}"
                    raise PessaError(f"{folder}: {name} is in two shards, {twice}", "download the folder again")
                infos[name] = info
                self._places[name] = _Place(file, offset, info.nbytes)
        self.header: Header = infos
        self._check_index()

    @staticmethod
    def _weight_files(folder: Path) -> list[str]:
        if (folder / SINGLE_FILE).exists():
            return [SINGLE_FILE]
        if (folder / INDEX_FILE).exists():
            weight_map = read_json(folder / INDEX_FILE).get("weight_map")
            if not isinstance(weight_map, dict) or not {type(file) for file in weight_map.values()} == {str}:
                raise PessaError(f"{folder / INDEX_FILE} has no weight_map", "download the file again")
            files = sorted(set(weight_map.values()))
            outside = [file for file in files if Path(file).name != file or file in ("", "..")]
            if outside:
                raise PessaError(
                    f"{folder / INDEX_FILE} points outside its folder: {outside[0]}",
                    "do not use this checkpoint; its index was tampered with",
                )
            missing = [file for file in files if not (folder / file).exists()]
            if missing:
                raise PessaError(
                    f"{len(missing)} of {len(files)} shards of {folder} are missing\n{listed(missing)}",
                    "download the missing shards",
                )
            return files
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise PessaError(
                f"{folder} holds pickled weights only ({pickles[0]}), which can run code when they are loaded",
                'if you trust them, convert once: python -c "from transformers import AutoModel as M; '
                f"M.from_pretrained('{folder}').save_pretrained('{folder}-safetensors')\" "
                "(with the model's own class for its head), then copy the tokenizer files over",
            )
        raise PessaError(
            f"{folder} is no model: it has neither {SINGLE_FILE} nor {INDEX_FILE}",
            "give the folder that from_pretrained loads",
        )

    def _check_index(self) -> None:
        if self.files == [SINGLE_FILE]:
            return
        weight_map = read_json(self.folder / INDEX_FILE)["weight_map"]
        wrong = [
            f"{name}: the index says {weight_map.get(name)}, the shards say {place.file if place else None}"
            for name in sorted(weight_map.keys() | self._places.keys())
            for place in [self._places.get(name)]
            if place is None or weight_map.get(name) != place.file
        ]
        if wrong:
            raise PessaError(
                f"the index of {self.folder} disagrees with its shards\n{listed(wrong)}", "download the folder again"
            )

    def file_of(self, name: str) -> str:
        return self._places[name].file

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytes]:
        """The tensor's raw little-endian bytes, at most `size` at a time."""
        place = self._places[name]
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.offset)
            left = place.nbytes
            while left:
                chunk = file.read(min(size, left))
                if not chunk:
                    raise PessaError(f"{self.folder / place.file} became shorter while it was read", "run again")
                left -= len(chunk)
                yield chunk

    def get(self, name: str) -> torch.Tensor:
        """The tensor in the file's dtype and shape."""
        import torch

        info = self.header[name]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        data = bytearray(b"".join(self.chunks(name)))
        if not data:
            return torch.empty(info.shape, dtype=dtype)
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


class CheckpointWriter:
    """Safetensors files whose headers are written first and whose tensors then arrive in any order.

    `plan` maps each file name to the tensors it will hold, in order; more than one file gets an index. `close`
    raises PessaError when a planned tensor never came. Used as a context manager it closes the files in any
    case, and checks completeness only when no exception is on its way.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, _Place] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._written: set[str] = set()
        for file, tensors in plan.items():
            header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
            end = 0
            for name, info in tensors.items():
                header[name] = {
                    "dtype": info.dtype,
                    "shape": list(info.shape),
                    "data_offsets": [end, end := end + info.nbytes],
                }
            encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
            encoded += b" " * (-len(encoded) % 8)  # the format asks for data that starts 8-aligned
            start = 8 + len(encoded)
            for name, info in tensors.items():
                self._places[name] = _Place(file, start + header[name]["data_offsets"][0], info.nbytes)
                self._infos[name] = info
            handle = (folder / file).open("wb")
            self._files[file] = handle
            handle.write(len(encoded).to_bytes(8, "little") + encoded)
            handle.truncate(start + end)
        if len(plan) > 1:
            weight_map = {name: place.file for name, place in sorted(self._places.items())}
            total = sum(info.nbytes for info in self._infos.values())
            write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def put(self, name: str, tensor: torch.Tensor) -> None:
        """Write one planned tensor; its dtype and shape must be the planned ones."""
        import torch

        info = self._infos[name]
        if tuple(tensor.shape) != info.shape or tensor.dtype != getattr(torch, TORCH_DTYPES[info.dtype]):
            raise PessaError(f"{name} came as {tensor.dtype} {tuple(tensor.shape)}, planned was {info}")
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._write(name, iter([flat.view(torch.uint8).numpy().data] if flat.numel() else []))

    def copy(self, name: str, reader: CheckpointReader) -> None:
        """Copy one planned tensor byte for byte, in chunks."""
        self._write(name, reader.chunks(name))

    def _write(self, name: str, chunks: Iterator[bytes | memoryview]) -> None:
        place = self._places[name]
        file = self._files[place.file]
        file.seek(place.offset)
        for chunk in chunks:
            file.write(chunk)
        self._written.add(name)

    def close(self) -> None:
        missing = sorted(self._places.keys() - self._written)
        if missing:
            raise PessaError(f"{len(missing)} planned tensors were never written\n{listed(missing)}")
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.close()
        finally:
            for file in self._files.values():
                file.close()


@contextmanager
def new_folder(out: Path, source: Path, force: bool = False) -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` at the end, or vanishes when anything is raised.

    `force` lets another model give way, at the last moment, but never `source`, which is still being read, nor a
    folder that is no model. Raises PessaError in these cases and where nothing can be written.
    """
    try:
        _check_free(out, source, force)
        made = _make_parents(out)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise PessaError(f"cannot write {out}: {error}", "give an -o in a folder you may write to") from None
    try:
        staging.chmod(0o777 & ~_umask())
        yield staging
        _put_in_place(staging, out)
    except OSError as error:
        raise PessaError(f"could not write {out}: {error}", "free some space and run again") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: it now holds the output
                folder.rmdir()


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
    model = (out / CONFIG_FILE).exists() and ((out / SINGLE_FILE).exists() or (out / INDEX_FILE).exists())
    if not model and not (out.is_dir() and not any(out.iterdir())):
        raise PessaError(f"{out} is not a model, so --force does not replace it", "give another -o")


def _make_parents(out: Path) -> list[Path]:
    """Make the folders above `out`; returns those that are new, the deepest first."""
    missing = [folder for folder in out.parents if not folder.exists()]
    out.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _put_in_place(staging: Path, out: Path) -> None:
    if not out.exists():
        staging.rename(out)
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.replaced-", dir=out.parent) as place:
        old = Path(place) / out.name
        out.rename(old)
        try:
            staging.rename(out)
        except BaseException:  # Ctrl-C, too
            old.rename(out)
            raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
