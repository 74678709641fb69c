"""Pickled weights: read as tensors and nothing else, and rewritten as safetensors.

`weights_only=True` is torch's own reader of such files: a pickle that names anything beyond tensors is refused
before it is acted upon.
"""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import CONFIG_FILE, INDEX_FILE, PICKLE_SUFFIXES, SINGLE_FILE, read_json
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed

if TYPE_CHECKING:
    import torch


PICKLE, PICKLE_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DAMAGED = "the file is damaged or incomplete: copy or download it again"


def is_pickled(folder: Path) -> bool:
    """Whether a folder holds a model's weights as pickles and not as safetensors."""
    found = any((folder / name).is_file() for name in (PICKLE, PICKLE_INDEX))
    return found and not any((folder / name).exists() for name in (SINGLE_FILE, INDEX_FILE))


def load_pickle(path: Path) -> dict[Any, Any]:
    """The dictionary in a file that torch.save wrote, its tensors mapped from the file rather than read.

    Raises PessaError for a file that wants to run code, that is damaged, or that holds something else.
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
                f"{path} wants to run code when it is loaded ({named[1]}); nothing of it was run",
                "do not use this file; ask its author for safetensors",
            ) from None
        # torch's first line advises to load the file with its code, which nobody should read here.
        told = re.search(r"(?:WeightsUnpickler error: |\A(?!Weights only))(.+)", str(error))
        reason = told[1] if told else type(error).__name__
        raise PessaError(f"{path} is no readable file of torch.save: {reason}", DAMAGED) from None
    if not isinstance(value, dict):
        raise PessaError(f"{path} holds a {type(value).__name__}, not tensors by name", "give a model's weights")
    return value


def header_of(path: Path, tensors: Mapping[Any, Any]) -> dict[str, TensorInfo]:
    """Names, dtypes and shapes of what must be plain tensors by name. Raises PessaError with all that are not."""
    import torch

    dtypes = {getattr(torch, name): dtype for dtype, name in TORCH_DTYPES.items()}
    header: dict[str, TensorInfo] = {}
    problems: list[str] = []
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            problems.append(f"{name}: a {type(value).__name__}")
        elif value.layout != torch.strided or value.is_quantized or value.is_meta or value.dtype not in dtypes:
            problems.append(f"{name}: {value.dtype}, {value.layout}")
        elif value.untyped_storage().nbytes() < value.nbytes:  # strides of zero: a few bytes that claim to be many
            problems.append(f"{name}: {tuple(value.shape)} out of {value.untyped_storage().nbytes():,} bytes")
        else:
            header[name] = TensorInfo(dtypes[value.dtype], tuple(value.shape))
    if problems or not header:
        raise PessaError(
            f"{path} holds no tensors" if not problems else f"{path} holds more than plain tensors\n{listed(problems)}",
            "give the weights alone, as save_pretrained writes them",
        )
    return header


def _files(folder: Path) -> list[str]:
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
    """Write the model in `folder` with its pickled weights as safetensors, shard by shard, and its side files.

    Tied tensors are written once under each of their names. Raises PessaError as `load_pickle` and `header_of` do,
    and for a name in two shards.
    """
    read_json(folder / CONFIG_FILE)  # the cheaper of the two to be wrong
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
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix not in PICKLE_SUFFIXES and ".index." not in path.name:
            (into / path.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, into / path.relative_to(folder))
