"""Conversion of pickled weights to safetensors, reading tensors only: nothing in a pickle is run."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.contents import contents_of, left_out_text
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError, PessaWarning
from pessa_cli.common.files import file_size
from pessa_cli.common.text import listed, shortened
from pessa_cli.sources.pickle_machine import Other, StoredTensor
from pessa_cli.sources.torch_file import DAMAGED, TorchFile, read_torch_file

PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
MOST_NAME = 512  # characters of a tensor's name
MOST_SHARED = 4  # how many times the size of a file its tensors may have together


def is_pickled(folder: Path) -> bool:
    """Return whether a folder holds a model's weights as pickles and not as safetensors."""
    found = any((folder / name).is_file() for name in (PICKLE, PICKLE_INDEX))
    return found and not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def load_pickle(path: Path) -> TorchFile:
    """Return what a file of torch.save holds, which is a dictionary, without the data of its tensors.

    Raises PessaError in the same cases as `read_torch_file`, and if the file does not hold a dictionary.
    """
    file = read_torch_file(path)
    if not isinstance(file.value, dict):
        raise PessaError(
            f"{path} holds a {type(file.value).__name__}, not a dictionary of tensors", "give the weights of a model"
        )
    return file


def header_of(path: Path, tensors: Mapping[Any, Any]) -> dict[str, TensorInfo]:
    """Return the dtypes and shapes of a dictionary of tensors.

    Raises PessaError, which lists all faults, if a value is not a plain dense tensor, if there are none, or if together
    they would be far larger than the file.
    """
    dtypes = {name: dtype for dtype, name in TORCH_DTYPES.items()}
    header: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name, value in tensors.items():
        shown = name[:MOST_NAME] if isinstance(name, str) else shortened(name)
        if isinstance(value, Other):
            problems.append(f"{shown}: {value.words}")
        elif not isinstance(name, str) or not isinstance(value, StoredTensor):
            problems.append(f"{shown}: a {type(value).__name__}")
        elif not name.isprintable() or len(name) > MOST_NAME:
            problems.append(f"{shown!r}: not printable, or longer than {MOST_NAME} characters")
        elif value.dtype not in dtypes:
            problems.append(f"{name}: torch.{value.dtype}")
        elif max(value.count, value.end) > value.storage.count:  # strides of zero let a small file claim a large tensor
            nbytes = value.storage.count * value.storage.item
            problems.append(f"{name}: shape {shortened(value.shape)} but only {nbytes:,} bytes")
        else:
            header[name] = TensorInfo(dtypes[value.dtype], value.shape)
    if problems or not header:
        raise PessaError(
            f"{path} holds no tensors" if not problems else f"{path} holds more than plain tensors\n{listed(problems)}",
            "give a file of weights only, as save_pretrained writes it",
        )
    total, size = sum(info.nbytes for info in header.values()), file_size(path)
    if total > MOST_SHARED * size:  # tied tensors share data, and are written once under each name
        raise PessaError(
            f"{path} has {size:,} bytes, but its tensors would have {total:,}",
            "do not use this file",
        )
    return header


def _files(folder: Path) -> list[str]:
    """Return the names of the folder's pickle files. Raises PessaError if the index is invalid."""
    if (folder / PICKLE).is_file():
        return [PICKLE]
    weight_map = read_json(folder / PICKLE_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or {type(file) for file in weight_map.values()} != {str}:
        raise PessaError(f"{folder / PICKLE_INDEX} has no weight_map", "download the file again")
    files = sorted(set(weight_map.values()))
    outside = [file for file in files if Path(file).name != file or file.startswith(".") or not file]
    if outside:
        raise PessaError(
            f"{folder / PICKLE_INDEX} points outside its folder: {outside[0]}",
            "do not use this checkpoint; its index was tampered with",
        )
    return files


def convert(folder: Path, into: Path) -> None:
    """Write the pickled weights in `folder` as safetensors, shard by shard, and copy the other files.

    Tied tensors are written once under each of their names. Raises PessaError in the same cases as `load_pickle` and
    `header_of`, and if a tensor is in two shards.
    """
    read_json(folder / CONFIG_FILE)  # checked first, because reading the weights takes longer
    files = _files(folder)
    plan: dict[str, dict[str, TensorInfo]] = {}
    seen: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        header = header_of(folder / file, load_pickle(folder / file).value)
        twice = sorted(header.keys() & seen.keys())
        if twice:
            raise PessaError(f"{folder}: {twice[0]} is in two shards, {seen[twice[0]]} and {file}", DAMAGED)
        seen |= dict.fromkeys(header, file)
        plan[SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"] = header
    into.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(into, plan, {"format": "pt"}) as writer:
        for file, header in zip(files, plan.values(), strict=True):
            found = load_pickle(folder / file)
            for name in header:
                writer.put(name, found.read(found.value[name]))
    present = visible_files(folder)
    contents = contents_of(present, {CONFIG_FILE, PICKLE_INDEX, *files})
    for name in (CONFIG_FILE, *contents.copied, *contents.unknown):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(present[name], into / name)
    if contents.left_out:
        warnings.warn(f"{folder}: not converted\n{left_out_text(contents.left_out)}", PessaWarning, stacklevel=2)
