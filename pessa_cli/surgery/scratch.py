"""Arrays put aside on disk between two passes, so that memory need not hold what a whole model adds up to."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray


class Spool:
    """Float64 arrays by name, in a file that has no name itself and is gone with the process, however that ends.

    `put` from one thread at a time; `take` from any number.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed by __exit__
        self._end = 0
        self._places: dict[str, list[tuple[int, tuple[int, ...]]]] = {}

    def put(self, name: str, arrays: Sequence[NDArray[np.float64]]) -> None:
        """Keep the arrays under a name that has none yet."""
        places = self._places[name] = []
        for array in arrays:
            places.append((self._end, array.shape))
            self._end += self._file.write(np.ascontiguousarray(array).data)
        self._file.flush()

    def take(self, name: str) -> list[NDArray[np.float64]]:
        """The arrays that were kept under the name."""
        found = []
        for offset, shape in self._places[name]:
            array = np.empty(shape)
            count = os.preadv(self._file.fileno(), [array.data], offset)
            if count != array.nbytes:
                raise OSError(f"read {count:,} of {array.nbytes:,} bytes that were put aside")
            found.append(array)
        return found

    def __enter__(self) -> Spool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
