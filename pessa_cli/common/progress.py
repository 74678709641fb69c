"""Progress reports: the caller passes a `Progress` function, and the long-running work calls it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

Tick = Callable[[int, int], None]  # called with the bytes and the steps finished since the last call
# A description, the total bytes, and the total steps: blocks, clips, windows or passes. A total is 0 if work is not
# counted in this way.
Progress = Callable[[str, int, int], AbstractContextManager[Tick]]


@contextmanager
def quietly(_what: str, _nbytes: int, _steps: int) -> Iterator[Tick]:
    """Report nothing: the default `Progress` of library calls."""
    yield lambda _bytes, _steps: None
