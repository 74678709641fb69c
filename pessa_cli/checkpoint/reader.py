"""Reading of safetensors checkpoints, one tensor at a time.

Opening a checkpoint reads only the headers, which give the dtype, shape and offset of every tensor. torch is imported
only in the functions that create a tensor, because importing it takes seconds.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from pessa_cli.checkpoint.contents import is_training_state
from pessa_cli.checkpoint.dtypes import ITEM_BYTES, TORCH_DTYPES
from pessa_cli.checkpoint.files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MOST_JSON,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    read_json,
    unique_keys,
)
from pessa_cli.checkpoint.quantized import ORIGINAL, method_of, refuse, refuse_quantised
from pessa_cli.common.errors import PessaError, PessaWarning
from pessa_cli.common.files import file_size
from pessa_cli.common.text import listed, shortened

if TYPE_CHECKING:
    import torch


CHUNK = 2**20  # bytes copied at a time: few enough to stay in the processor's cache
IN_LAYER = re.compile(r"\.\d+\.")  # in the name of a tensor of a numbered layer
MOST_NAME = 512  # the most characters that a tensor's name may have


@dataclass(frozen=True)
class TensorInfo:
    """The dtype and shape of a tensor from a safetensors header; `dtype` is the format's name, such as "F16"."""

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
    """The location of a tensor's data: the file name, the offset from the start of the file, and the size in bytes."""

    file: str
    offset: int
    nbytes: int


def _read_header(path: Path) -> tuple[dict[str, tuple[TensorInfo, int]], dict[str, str]]:
    """Read the header of one file: each tensor with its absolute offset in bytes, and the file's metadata.

    Raises PessaError if the file is missing or is not a complete safetensors file, and if a tensor has an impossible
    name or a dtype that pessa cannot copy.
    """
    from safetensors import SafetensorError, safe_open

    size = 0
    try:
        size = file_size(path)
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            if length > MOST_JSON:
                raise ValueError(f"its header would have {length:,} bytes, more than {MOST_JSON:,}")
            encoded = raw.read(min(length, size))  # Python makes room for all that is asked for
        # The safetensors library checks the file: lengths, offsets and overlaps.
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        # The library accepts duplicate names and takes the last of them, so they are checked here.
        header = json.loads(encoded, object_pairs_hook=unique_keys)
    except FileNotFoundError as error:
        raise PessaError(f"{path} does not exist", "download the missing shard") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise PessaError(
            f"{path} ({size:,} bytes) is not a complete safetensors file: {error}", "download the file again"
        ) from error
    header.pop("__metadata__", None)
    if not all(isinstance(entry, dict) for entry in header.values()):  # the library accepts lists as well
        raise PessaError(f"{path}: its header has lists in place of objects", "do not use this checkpoint")
    # No real model has such names, and unprintable characters could falsify what a terminal shows.
    odd = [f"{name[:MOST_NAME]!r}" for name in header if len(name) > MOST_NAME or not name.isprintable()]
    if odd:
        raise PessaError(
            f"{path}: these tensor names are not printable, or longer than {MOST_NAME} characters\n{listed(odd)}",
            "do not use this checkpoint",
        )
    refuse_quantised(path, {name: str(entry["dtype"]) for name, entry in header.items()})
    unknown = [f"{name}: {entry['dtype']}" for name, entry in header.items() if entry["dtype"] not in ITEM_BYTES]
    if unknown:
        raise PessaError(
            f"{path} holds tensors of a dtype that pessa cannot copy\n{listed(unknown)}",
            ORIGINAL,
        )
    return {
        name: (TensorInfo(entry["dtype"], tuple(entry["shape"])), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }, metadata


class CheckpointReader:
    """A model folder with `config.json` and safetensors weights, either one file or shards with an index.

    `header` maps each tensor's name to its dtype and shape; `config` is the parsed config.json. Tensor data is read
    only by `get`, `chunks` and `checked_chunks`. Raises PessaError if the folder does not hold a model, a shard is
    missing or truncated, the index disagrees with the shards, or the weights exist only as pickles.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise PessaError(f"{folder} is not a folder", "give the folder of a Hugging Face checkpoint")
        self.folder = folder
        self.files, index = self._weight_files(folder)
        self.config = read_json(folder / CONFIG_FILE)
        if (method := method_of(self.config)) is not None:
            refuse(folder, method)
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
        if index is not None:
            self._check_index(index)

    @staticmethod
    def _weight_files(folder: Path) -> tuple[list[str], dict[str, Any] | None]:
        """Return the names of the weight files, and the content of the index, or None without an index."""
        if (folder / SINGLE_FILE).exists():
            return [SINGLE_FILE], None
        if (folder / INDEX_FILE).exists():
            index = read_json(folder / INDEX_FILE)
            weight_map = index.get("weight_map")
            if not isinstance(weight_map, dict) or not {type(file) for file in weight_map.values()} == {str}:
                raise PessaError(f"{folder / INDEX_FILE} has no weight_map", "download the file again")
            files = sorted(set(weight_map.values()))
            # A shard may be a symbolic link, as in the hub's cache: the index cannot create links, so they are safe.
            # But hidden files are not among those whose links are checked.
            outside = [f for f in files if Path(f).name != f or "\\" in f or f.startswith(".") or not f]
            if outside:
                raise PessaError(
                    f"{folder / INDEX_FILE} points outside its folder: {_printable(outside[0])}",
                    "do not use this checkpoint; its index was tampered with",
                )
            others = [
                _printable(file)
                for file in files
                if not file.endswith(".safetensors") or not file.isprintable() or len(file.encode()) > 255
            ]
            if others:
                raise PessaError(
                    f"{folder / INDEX_FILE} names weight files that are not .safetensors files\n{listed(others)}",
                    "do not use this checkpoint; its index was tampered with",
                )
            missing = [file for file in files if not (folder / file).exists()]
            if missing:
                raise PessaError(
                    f"{len(missing)} of {len(files)} shards of {folder} are missing\n{listed(missing)}",
                    "download the missing shards",
                )
            return files, index
        found = sorted(file.name for file in folder.iterdir())
        if ADAPTER_FILE in found:
            base = str(read_json(folder / ADAPTER_FILE).get("base_model_name_or_path") or "BASE")
            command = f"pessa merge {quote(_printable(base))} {quote(str(folder))} -o merged"
            raise PessaError(
                f"{folder} is an adapter of {shortened(base)}, not a model",
                f"merge it first: {command}, and give that folder",
            )
        pickles = [file for file in found if file.endswith(PICKLE_SUFFIXES) and not is_training_state(file)]
        if pickles:
            raise PessaError(
                f"{folder} holds pickled weights only ({pickles[0]}), which can run code when they are loaded",
                "if you trust their author, give --allow-pickle: pessa then converts the tensors of a "
                "pytorch_model.bin and refuses code",
            )
        inner = [file for file in found if any((folder / file / name).exists() for name in (SINGLE_FILE, INDEX_FILE))]
        if inner:
            raise PessaError(
                f"{folder} is not a model, but holds models\n{listed(inner)}", f"give one of them: {folder / inner[-1]}"
            )
        parts = [file for file in found if is_training_state(file) or is_training_state(f"{file}/")]
        if parts:
            raise PessaError(
                f"{folder} is the state of a training run, without the weights of a model ({parts[0]})",
                "write them first: `accelerate merge-weights` joins the parts of FSDP, zero_to_fp32.py those of "
                "DeepSpeed",
            )
        raise PessaError(
            f"{folder} is not a model: it has neither {SINGLE_FILE} nor {INDEX_FILE}",
            "give the folder that from_pretrained loads",
        )

    def _check_index(self, index: Mapping[str, Any]) -> None:
        """Warn where the index disagrees with the shards: like transformers, pessa reads all tensors of all shards.

        Raises PessaError for a tensor of a layer that is in no shard. Others may be names of a tied tensor.
        """
        weight_map, path = index["weight_map"], self.folder / INDEX_FILE
        nowhere = sorted(weight_map.keys() - self._places.keys())
        lost = [f"{_printable(name)}: in the index {weight_map[name]}" for name in nowhere if IN_LAYER.search(name)]
        if lost:
            raise PessaError(
                f"the shards of {self.folder} lack tensors that {INDEX_FILE} lists\n{listed(lost)}",
                "download the folder again",
            )
        elsewhere = [name for name, place in self._places.items() if weight_map.get(name) != place.file]
        faults = {
            "lists tensors that are in no shard; if a tensor is stored under another name, nothing is missing": nowhere,
            "does not list these tensors, or under another shard; they are read from where they are": elsewhere,
        }
        for fault, names in faults.items():
            if names:
                shown = listed([_printable(name) for name in names])
                warnings.warn(f"{path} {fault}\n{shown}", PessaWarning, stacklevel=2)
        if not isinstance(index.get("metadata"), dict):
            without = "has no `metadata`, without which transformers does not load the folder; outputs of pessa have it"
            warnings.warn(f"{path} {without}", PessaWarning, stacklevel=2)

    def stats(self) -> dict[str, os.stat_result]:
        """Return the current `os.stat` result of every weight file. Raises PessaError if one cannot be accessed."""
        try:
            return {file: (self.folder / file).stat() for file in self.files}
        except OSError as error:
            raise PessaError(f"{self.folder} changed while it was read: {error}", "run the command again") from error

    def check_unchanged(self) -> None:
        """Raise PessaError if the size, time or inode of a weight file has changed since the folder was opened."""
        for file, now in self.stats().items():
            then = self._opened[file]
            if (now.st_size, now.st_mtime_ns, now.st_ino) != (then.st_size, then.st_mtime_ns, then.st_ino):
                raise PessaError(
                    f"{self.folder / file} changed while it was read", "run again, and do not change it meanwhile"
                )

    def file_of(self, name: str) -> str:
        """Return the name of the file that holds a tensor."""
        return self._places[name].file

    def chunks(self, name: str, size: int = CHUNK) -> Iterator[bytearray]:
        """Yield the tensor's raw little-endian bytes, at most `size` at a time.

        Raises PessaError if the file has become shorter.
        """
        with self._at(name) as (file, left):
            while left:
                chunk = bytearray(min(size, left))
                if file.readinto(chunk) != len(chunk):
                    raise self._truncated(name)
                left -= len(chunk)
                yield chunk

    @contextmanager
    def _at(self, name: str) -> Iterator[tuple[BufferedReader, int]]:
        """Open the tensor's file at the tensor's first byte; yields the file and the tensor's size in bytes."""
        place = self._places[name]
        with (self.folder / place.file).open("rb") as file:
            file.seek(place.offset)
            yield file, place.nbytes

    def _truncated(self, name: str) -> PessaError:
        return PessaError(
            f"{self.folder / self.file_of(name)} became shorter while it was read", "run the command again"
        )

    def checked_chunks(self, name: str) -> Iterator[bytearray]:
        """Yield the same bytes as `chunks`. Raises PessaError if a chunk holds NaN.

        A valid checkpoint has no NaN; infinities are allowed, since mask buffers hold them.
        """
        import torch

        info = self.header[name]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        for chunk in self.chunks(name):
            # amin returns NaN if any entry is NaN, and needs no copy of the chunk.
            if dtype.is_floating_point and torch.frombuffer(chunk, dtype=dtype).amin().isnan():
                raise PessaError(f"{name} of {self.folder} holds NaN", "the checkpoint is damaged; download it again")
            yield chunk

    def get(self, name: str) -> torch.Tensor:
        """Read a tensor in the file's dtype and shape. Raises PessaError if the file has become shorter."""
        import torch

        info = self.header[name]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        with self._at(name) as (file, nbytes):
            if not nbytes:
                return torch.empty(info.shape, dtype=dtype)
            data = bytearray(nbytes)  # safe to allocate: the header was checked against the file's size
            if file.readinto(data) != nbytes:
                raise self._truncated(name)
        return torch.frombuffer(data, dtype=dtype).reshape(info.shape)


def _printable(name: str) -> str:
    """Format a name from a file for a message: shortened, and without terminal control characters."""
    short = name if len(name) <= MOST_NAME else name[:MOST_NAME] + "..."
    return short if short.isprintable() else repr(short)
