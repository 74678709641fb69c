"""Writing a checkpoint: safetensors files in any order of their tensors, and a folder that is whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO

from pessa_cli.checkpoint import (
    CONFIG_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    TORCH_DTYPES,
    CheckpointReader,
    Header,
    Place,
    TensorInfo,
    write_json,
)
from pessa_cli.errors import PessaError, listed

if TYPE_CHECKING:
    import torch


class CheckpointWriter:
    """Safetensors files whose headers are written first and whose tensors then arrive in any order.

    `plan` maps each file name to the tensors it will hold, in order; more than one file gets an index. `close`
    raises PessaError when a planned tensor never came. Used as a context manager it closes the files in any
    case, and checks completeness only when no exception is on its way.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._places: dict[str, Place] = {}
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
                self._places[name] = Place(file, start + header[name]["data_offsets"][0], info.nbytes)
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
