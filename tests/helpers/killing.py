"""Commands that are killed, or disturbed, at the n-th operation on a file; for tests and scripts/kill_sweep.py.

A command runs in a copy of this process, which has everything imported. There, each operation that changes a file or a
folder below a given place is counted: creating, writing, flushing, renaming, linking and deleting. When the n-th one is
about to happen, `disturb` is called. By default it kills the process, and of a write the first half has then been done.
"""

from __future__ import annotations

import builtins
import io
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pessa_cli.cli.main import main

CHANGES = ("os.rename", "os.link", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod")
Disturb = Callable[[], object]


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Operations:
    """The count of operations below a place. At number `at` it calls `disturb`, once."""

    def __init__(self, place: Path, at: int | None, disturb: Disturb) -> None:
        self._place, self._at, self._disturb = str(place), at, disturb
        self.count = 0
        self._active = True

    def below(self, path: object) -> bool:
        if isinstance(path, int):
            return False
        name = os.fsdecode(os.fspath(path))  # type: ignore[call-overload]
        absolute = os.path.abspath(name)  # noqa: PTH100
        return absolute.startswith(f"{self._place}{os.sep}") and not absolute.startswith(f"{self._place}/tmp")

    def happens(self, halfway: Disturb = lambda: None) -> None:
        if not self._active:
            return
        if self.count == self._at:
            self._active = False
            if self._disturb is kill:
                halfway()
            self._disturb()
        self.count += 1

    def install(self) -> None:
        """Count from here on; this cannot be undone, so it is for a process of its own."""
        shutil._USE_CP_SENDFILE = False  # type: ignore[attr-defined]  # copies are written, as other files are
        really, fsync = io.open, os.fsync

        def audit(event: str, given: tuple[Any, ...]) -> None:
            in_folder = event in ("os.remove", "os.rmdir") and given[-1] not in (None, -1)  # as rmtree does it
            if event in CHANGES and (in_folder or self.below(given[0])):
                self.happens()

        def opened(file: Any, mode: str = "r", buffering: int = -1, *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wxa") or "+" in mode or isinstance(file, int) or not self.below(file):
                return really(file, mode, buffering, *rest, **more)
            self.happens()
            raw = CountedFile(file, mode.replace("t", "").replace("b", ""))
            raw.operations = self
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, *rest, **more)

        def flushed(descriptor: Any) -> None:
            self.happens()
            fsync(descriptor)

        sys.addaudithook(audit)
        io.open = builtins.open = opened
        os.fsync = flushed  # type: ignore[assignment]


class CountedFile(io.FileIO):
    """A file whose writes are counted; a process that is killed at one has written the first half."""

    operations: Operations

    def write(self, data: Any) -> int:
        content = bytes(data)
        self.operations.happens(lambda: io.FileIO.write(self, content[: len(content) // 2]))
        return io.FileIO.write(self, content)


def started(arguments: tuple[object, ...], prepare: Disturb, told: Path | None = None) -> int:
    """Start the command line in a copy of this process, and return its process id.

    prepare: is called there first. told: the file for what it prints on stderr.
    """
    if process := os.fork():
        return process
    code = 99
    try:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1)
        os.dup2(null if told is None else os.open(told, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), write_through=True)
        prepare()
        sys.argv = ["pessa", *map(str, arguments)]
        main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process: its exit code, or less than 0 the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def run(place: Path, *arguments: object, at: int | None = None, disturb: Disturb = kill) -> tuple[int, str]:
    """Run a command in the folder `place`, and disturb it at an operation; returns its exit code and stderr."""

    def prepare() -> None:
        os.chdir(place)
        Operations(place, at, disturb).install()

    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "stderr")
        code = ended(started(arguments, prepare, told))
        return code, told.read_text()


def operations(place: Path, *arguments: object) -> int:
    """Return the number of operations of a command, which must succeed."""
    with tempfile.TemporaryDirectory() as folder:
        told, number = Path(folder, "stderr"), Path(folder, "number")

        def prepare() -> None:
            os.chdir(place)
            counted = Operations(place, None, kill)
            counted.install()
            leave = os._exit

            def exiting(code: int) -> None:
                number.write_text(str(counted.count))
                leave(code)

            os._exit = exiting  # type: ignore[assignment]

        code = ended(started(arguments, prepare, told))
        assert code == 0, told.read_text()
        return int(number.read_text())


def spread(count: int, points: int) -> list[int]:
    """Return at most this many numbers from 0 to count - 1, evenly spread, with the first and the last."""
    if count <= points:
        return list(range(count))
    return sorted({round(i * (count - 1) / (points - 1)) for i in range(points)})
