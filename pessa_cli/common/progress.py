"""Progress reports: the caller passes a `Progress` function, and the long-running work calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Tick = Callable[[int, int], None]  # called with the bytes and the blocks finished since the last call
Progress = Callable[[str, int, int], AbstractContextManager[Tick]]  # a description, total bytes and total blocks


@contextmanager
def quietly(_what: str, _nbytes: int, _blocks: int) -> Iterator[Tick]:
    """Report nothing: the default `Progress` of library calls."""
    yield lambda _bytes, _blocks: None
