"""Checkpoints on disk: safetensors files read and written tensor by tensor, never whole.

The reader knows every tensor's dtype, shape and place from the headers alone; the writer is told all of that
before the first byte, so that tensors can be put in any order. torch is imported only where a tensor is made.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING

from pessa_cli.checkpoint.dtypes import ITEM_BYTES, TORCH_DTYPES
from pessa_cli.checkpoint.files import (
    CONFIG_FILE,
    INDEX_FILE,
    MOST_JSON,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    read_json,
    unique_keys,
)
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size
from pessa_cli.common.text import listed

if TYPE_CHECKING:
    import torch


CHUNK = 2**20  # bytes copied at a time: what stays in the processor's cache
MOST_NAME = 512  # characters of a tensor's name


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


def _read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """The tensors of one file with their absolute offsets, and its metadata."""
    from safetensors import SafetensorError, safe_open

    size = 0
    try:
        size = file_size(path)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if length > MOST_JSON:
                raise ValueError(f"its header would have {length:,} bytes")
            encoded = raw.read(length)
        # The format's own library is the judge of validity: lengths, offsets, overlaps.
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        header = json.loads(encoded, object_pairs_hook=unique_keys)  # of duplicate names the library takes the last
    except FileNotFoundError:
        raise PessaError(f"{path} does not exist", "download the missing shard") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise PessaError(
            f"{path} ({size:,} bytes) is not a complete safetensors file: {error}", "download the file again"
        ) from None
    header.pop("__metadata__", None)
    if not all(isinstance(entry, dict) for entry in header.values()):  # which the library takes for one, too
        raise PessaError(f"{path} has a header of lists", "do not use this checkpoint")
    # No model has such names; in a terminal they could pass for something else.
    odd = [f"{name[:MOST_NAME]!r}" for name in header if len(name) > MOST_NAME or not name.isprintable()]
    if odd:
        raise PessaError(f"{path} holds tensors of impossible names\n{listed(odd)}", "do not use this checkpoint")
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
        self.files, weight_map = self._weight_files(folder)
        self.config = read_json(folder / CONFIG_FILE)
        self._opened = self.stats()
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
        if weight_map is not None:
            self._check_index(weight_map)

    @staticmethod
    def _weight_files(folder: Path) -> tuple[list[str], dict[str, str] | None]:
        """The weight files' names, and the map of an index if there is one."""
        if (folder / SINGLE_FILE).exists():
            return [SINGLE_FILE], None
        if (folder / INDEX_FILE).exists():
            weight_map = read_json(folder / INDEX_FILE).get("weight_map")
            if not isinstance(weight_map, dict) or not {type(file) for file in weight_map.values()} == {str}:
                raise PessaError(f"{folder / INDEX_FILE} has no weight_map", "download the file again")
            files = sorted(set(weight_map.values()))
            # A shard may be a link, as all are in the hub's cache: whoever made the folder made that, not the index.
            outside = [file for file in files if Path(file).name != file or "\\" in file or file in ("", "..")]
            if outside:
                raise PessaError(
                    f"{folder / INDEX_FILE} points outside its folder: {_shown(outside[0])}",
                    "do not use this checkpoint; its index was tampered with",
                )
            others = [
                _shown(file)
                for file in files
                if not file.endswith(".safetensors") or not file.isprintable() or len(file.encode()) > 255
            ]
            if others:
                raise PessaError(
                    f"{folder / INDEX_FILE} names weight files that are no .safetensors files\n{listed(others)}",
                    "do not use this checkpoint; its index was tampered with",
                )
            missing = [file for file in files if not (folder / file).exists()]
            if missing:
                raise PessaError(
                    f"{len(missing)} of {len(files)} shards of {folder} are missing\n{listed(missing)}",
                    "download the missing shards",
                )
            return files, weight_map
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if pickles:
            raise PessaError(
                f"{folder} holds pickled weights only ({pickles[0]}), which can run code when they are loaded",
                "if you trust whoever made them, give --allow-pickle: pessa then converts the tensors of a "
                "pytorch_model.bin and refuses code",
            )
        raise PessaError(
            f"{folder} is no model: it has neither {SINGLE_FILE} nor {INDEX_FILE}",
            "give the folder that from_pretrained loads",
        )

    def _check_index(self, weight_map: Mapping[str, str]) -> None:
        wrong = [
            f"{_shown(name)}: the index says {weight_map.get(name)}, the shards say {place.file if place else None}"
            for name in sorted(weight_map.keys() | self._places.keys())
            for place in [self._places.get(name)]
            if place is None or weight_map.get(name) != place.file
        ]
        if wrong:
            raise PessaError(
                f"the index of {self.folder} disagrees with its shards\n{listed(wrong)}", "download the folder again"
            )

    def stats(self) -> dict[str, os.stat_result]:
        """Size and time of every weight file as they are now."""
        try:
            return {file: (self.folder / file).stat() for file in self.files}
        except OSError as error:
            raise PessaError(f"{self.folder} changed while it was read: {error}", "run again") from None

    def check_unchanged(self) -> None:
        """Raise PessaError when a weight file is not what it was when it was opened."""
        for file, now in self.stats().items():
            then = self._opened[file]
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (then.st_size, then.st_mtime_ns, then.st_ino):
                raise PessaError(
                    f"{self.folder / file} changed while it was read", "leave it alone for the time, and run again"
                )

    def file_of(self, name: str) -> str:
        return self._places[name].file

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytearray]:
        """The tensor's raw little-endian bytes, at most `size` at a time."""
        with self._at(name) as (file, left):
            while left:
                chunk = bytearray(min(size, left))
                if file.readinto(chunk) != len(chunk):
                    raise self._shorter(name)
                left -= len(chunk)
                yield chunk

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[BufferedReader, int]]:
        """The file open at the tensor's first byte, and its number of bytes."""
        place = self._places[name]
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.offset)
            yield file, place.nbytes

    def _shorter(self, name: str) -> PessaError:
        return PessaError(f"{self.folder / self.file_of(name)} became shorter while it was read", "run again")

    def checked_chunks(self, name: str) -> Iterator[bytearray]:
        """As `chunks`. Raises PessaError at a NaN, which no good checkpoint holds; infinities may be masks."""
        import torch

        info = self.header[name]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        for chunk in self.chunks(name):
            # amin is NaN when any entry is, and makes no copy.
            if dtype.is_floating_point and torch.frombuffer(chunk, dtype=dtype).amin().isnan():
                raise PessaError(f"{name} of {self.folder} holds NaN", "the checkpoint is damaged; download it again")
            yield chunk

    def get(self, name: str) -> torch.Tensor:
        """The tensor in the file's dtype and shape."""
        import torch

        info = self.header[name]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        with self._at(name) as (file, nbytes):
            if not nbytes:
                return torch.empty(info.shape, dtype=dtype)
            data = bytearray(nbytes)  # the header was checked against the file's size
            if file.readinto(data) != nbytes:
                raise self._shorter(name)
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def _shown(name: str) -> str:
    """A name from a file for a message: never long, and without anything that a terminal would obey."""
    short = name if len(name) <= MOST_NAME else name[:MOST_NAME] + "..."
    return short if short.isprintable() else repr(short)
