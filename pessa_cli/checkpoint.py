"""Checkpoints on disk: safetensors files read and written tensor by tensor, never whole.

The reader knows every tensor's dtype, shape and place from the headers alone; the writer is told all of that
before the first byte, so that tensors can be put in any order. torch is imported only where a tensor is made.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
class Place:
    """Where a tensor's bytes are."""

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
        self._places: dict[str, Place] = {}
        infos: dict[str, TensorInfo] = {}
        for file in self.files:
            tensors, metadata = _read_header(folder / file)
            self.metadata.update(metadata)
            for name, (info, offset) in tensors.items():
                if name in infos:
                    twice = f"{self._places[name].file} and {file}"
                    raise PessaError(f"{folder}: {name} is in two shards, {twice}", "download the folder again")
                infos[name] = info
                self._places[name] = Place(file, offset, info.nbytes)
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
