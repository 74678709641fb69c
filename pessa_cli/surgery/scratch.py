"""A temporary file for the transforms of all blocks between the two passes, so that they need not fit into memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class _Place(NamedTuple):
    """The place of a tensor in the file: the offset of its first byte, and its shape."""

    offset: int
    shape: tuple[int, ...]


class Scratch:
    """Float64 tensors by block and name, in an unnamed temporary file, which disappears even if the process is killed.

    `put` may be called from one thread at a time, `take` from several threads.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed by __exit__
        self._end = 0
        self._places: dict[str, dict[str, _Place]] = {}

    def put(self, block: str, tensors: Mapping[str, Tensor]) -> None:
        """Store the tensors of a block; each block may be stored once."""
        places = self._places[block] = {}
        for name, tensor in tensors.items():
            array = np.ascontiguousarray(tensor.cpu().numpy())
            places[name] = _Place(self._end, tuple(tensor.shape))  # `array` of a number has the shape (1,)
            self._end += self._file.write(array.data)
        self._file.flush()

    def take(self, block: str) -> dict[str, Tensor]:
        """Return the tensors of a block. Raises OSError if they cannot be read completely."""
        found = {}
        for name, place in self._places[block].items():
            array = np.empty(place.shape)
            count = os.preadv(self._file.fileno(), [array.data], place.offset) if array.size else 0
            if count != array.nbytes:
                raise OSError(f"read {count:,} of {array.nbytes:,} bytes of {name} of {block} from a temporary file")
            found[name] = torch.from_numpy(array)
        return found

    def __enter__(self) -> Scratch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
