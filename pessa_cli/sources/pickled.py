"""Conversion of pickled weights to safetensors, reading tensors only.

They are read by torch.load with `weights_only=True`, which refuses a pickle that refers to anything but tensors and
plain containers, before any of its code is run.
"""

from __future__ import annotations

import re
import shutil
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.checkpoint.contents import contents_of, left_out_text
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import CONFIG_FILE, INDEX_FILE, SINGLE_FILE, read_json
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError, PessaWarning
from pessa_cli.common.text import listed

if TYPE_CHECKING:
    import torch


PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DAMAGED = "the file is damaged or incomplete: copy or download it again"


def is_pickled(folder: Path) -> bool:
    """Return whether a folder holds a model's weights as pickles and not as safetensors."""
    found = any((folder / name).is_file() for name in (PICKLE, PICKLE_INDEX))
    return found and not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def load_pickle(path: Path) -> dict[Any, Any]:
    """Return the dictionary in a file of torch.save, with its tensors memory-mapped where the file allows it.

    Raises PessaError if the file would run code, is missing or damaged, or does not hold a dictionary.
    """
    import torch

    try:
        value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise PessaError(f"{path} does not exist", "give the folder of a complete checkpoint") from None
    except Exception as error:  # a hostile or damaged pickle can end in any of Python's errors
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named:
            raise PessaError(
                f"{path} wants to run code when it is loaded ({named[1]}); none of it was run",
                "do not use this file; ask its author for safetensors",
            ) from None
        # The first line of torch's message advises to run the file's code, so it must not be shown.
        told = re.search(r"(?:WeightsUnpickler error: |\A(?!Weights only))(.+)", str(error))
        reason = told[1] if told else type(error).__name__
        raise PessaError(f"{path} is not a readable file of torch.save: {reason}", DAMAGED) from None
    if not isinstance(value, dict):
        raise PessaError(
            f"{path} holds a {type(value).__name__}, not a dictionary of tensors", "give the weights of a model"
        )
    return value


def header_of(path: Path, tensors: Mapping[Any, Any]) -> dict[str, TensorInfo]:
    """Return the dtypes and shapes of a dictionary of tensors.

    Raises PessaError, which lists all faults, if a value is not a plain dense tensor or if there are none.
    """
    import torch

    dtypes = {getattr(torch, name): dtype for dtype, name in TORCH_DTYPES.items()}
    header: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{name}: a {type(value).__name__}")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta or value.dtype not in dtypes:
            problems.append(f"{name}: {value.dtype}, {value.layout}")
        elif value.untyped_storage().nbytes() < value.nbytes:  # strides of zero let a small file claim a large tensor
            problems.append(f"{name}: shape {tuple(value.shape)} but only {value.untyped_storage().nbytes():,} bytes")
        else:
            header[name] = TensorInfo(dtypes[value.dtype], tuple(value.shape))
    if problems or not header:
        raise PessaError(
            f"{path} holds no tensors" if not problems else f"{path} holds more than plain tensors\n{listed(problems)}",
            "give a file of weights only, as save_pretrained writes it",
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
    outside = [file for file in files if Path(file).name != file or file in ("", "..")]
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
        header = header_of(folder / file, load_pickle(folder / file))
        twice = sorted(header.keys() & seen.keys())
        if twice:
            raise PessaError(f"{folder}: {twice[0]} is in two shards, {seen[twice[0]]} and {file}", DAMAGED)
        seen |= dict.fromkeys(header, file)
        plan[SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"] = header
    into.mkdir(parents=True, exist_ok=True)
    with CheckpointWriter(into, plan, {"format": "pt"}) as writer:
        for file, header in zip(files, plan.values(), strict=True):
            tensors: dict[str, torch.Tensor] = load_pickle(folder / file)
            for name in header:
                writer.put(name, tensors[name])
    present = visible_files(folder)
    contents = contents_of(present, {CONFIG_FILE, PICKLE_INDEX, *files})
    for name in (CONFIG_FILE, *contents.copied, *contents.unknown):
        (into / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(present[name], into / name)
    if contents.left_out:
        warnings.warn(f"{folder}: not converted\n{left_out_text(contents.left_out)}", PessaWarning, stacklevel=2)
