"""Helpers to run the command line in tests, to damage checkpoints, and to compare the files on disk."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pessa_cli.ranks.rule import Rule

Tensors = dict[str, torch.Tensor]
Pessa = Callable[..., "Result"]
TinyFolder = Callable[..., Path]
Real = Callable[[str], Path]
RealPruned = Callable[..., Path]
Once = Callable[[str, Callable[[Path], object]], Path]

NEARLY_ALL = Rule(energy=0.98, rope_ratio=0.05)  # the rule of the tests of a pruned SmolLM2, which share its output
PESSA = Path(sys.executable).with_name("pessa")  # as pip installed it, for tests that need a process
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Result:
    """The result of one command: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str


def snapshot(folder: Path) -> dict[str, str]:
    """Return every path under a folder, including hidden ones, with a digest of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def copy_of(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def is_refusal(result: Result, *culprits: str, code: int = 1) -> None:
    """Assert that stderr is one `error:` that names each culprit, indented details and one `hint:`, nothing else."""
    assert result.code == code, result
    lines = result.err.strip().splitlines()
    assert lines[0].startswith("error: "), result.err
    assert lines[-1].startswith("hint: "), result.err
    assert all(line.startswith("  ") for line in lines[1:-1]), result.err
    missing = [culprit for culprit in culprits if culprit not in result.err]
    assert not missing, f"{missing} not in:\n{result.err}"


def edit_weights(change: Callable[[Tensors], object], file: str = WEIGHTS) -> Callable[[Path], None]:
    """Return a function that applies `change` to the tensors of one file of a folder."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / file, {"format": "pt"})

    return damage


def edit_json(change: Callable[[dict[str, Any]], object], file: str = "config.json") -> Callable[[Path], None]:
    """Return a function that applies `change` to a JSON file of a folder."""

    def damage(folder: Path) -> None:
        value = json.loads((folder / file).read_text())
        change(value)
        (folder / file).write_text(json.dumps(value))

    return damage


def edit_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Return a function that applies `change` to the header of the weights and keeps the data."""

    def damage(folder: Path) -> None:
        header, data = header_and_data(folder / WEIGHTS)
        change(header)
        encoded = json.dumps(header).encode()
        (folder / WEIGHTS).write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)

    return damage


def header_and_data(file: Path) -> tuple[dict[str, Any], bytes]:
    """Split a safetensors file into its header and data, without pessa's reader."""
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:start]), content[start:]


def raw_tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return the dtype, shape and bytes of each tensor in a single-file model."""
    header, data = header_and_data(folder / WEIGHTS)
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
