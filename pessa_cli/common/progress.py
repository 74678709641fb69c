"""The progress of long work, as a function that the caller gives and the work calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Tick = Callable[[int, int], None]  # bytes and blocks done since the last call
Progress = Callable[[str, int, int], AbstractContextManager[Tick]]  # what is done, bytes and blocks in all


@contextmanager
def quietly(_what: str, _nbytes: int, _blocks: int) -> Iterator[Tick]:
    """The progress of a library call: none."""
    yield lambda _bytes, _blocks: None
