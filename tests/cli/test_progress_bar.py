"""What the progress bar shows on a terminal, and what a pipe sees of it."""

from __future__ import annotations

import re
import time
from io import StringIO
from pathlib import Path

import pytest
import tiny
from calibrating import data  # noqa: F401  # a fixture
from harness import TinyFolder
from rich.console import Console

from pessa_cli.calibration.collect import collect
from pessa_cli.cli import console
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.run import Run


def shown(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> StringIO:
    text = StringIO()
    stderr = Console(file=text, force_terminal=terminal, width=120)
    monkeypatch.setattr(console, "ERR", stderr)
    return text


@pytest.mark.parametrize(
    ("nbytes", "steps", "ticks", "expected"),
    [
        (2000, 0, [(2000, 0)], "2.0/2.0 kB"),
        (2000, 2, [(1000, 1), (1000, 1)], "2.0/2.0 kB 2/2 blocks"),
        (0, 9, [(0, 4), (0, 5)], "9/9"),
    ],
)
def test_what_is_counted_is_shown(
    nbytes: int, steps: int, ticks: list[tuple[int, int]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(monkeypatch, True)
    with console.progress("working", nbytes, steps) as tick:
        for bytes_done, steps_done in ticks:
            tick(bytes_done, steps_done)
    last = re.sub(r"\x1b\[[\d;]*m", "", text.getvalue())  # without colours
    assert expected in last
    assert ("kB" in last, "blocks" in last) == (nbytes > 0, bool(nbytes and steps))


def test_a_long_stage_is_named_once_in_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    text = shown(monkeypatch, False)
    with console.progress("short", 10, 1) as tick:
        tick(10, 1)
    monkeypatch.setattr(console, "PATIENCE", 0.01)
    with console.progress("long", 10, 1) as tick:
        while not text.getvalue():
            time.sleep(0.01)
        tick(10, 1)
    assert text.getvalue() == "long ...\n"


def test_calibration_counts_all_of_its_bytes(
    tiny_folder: TinyFolder,
    data: list[Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    """Each stage ends with what it said at its beginning."""
    from contextlib import contextmanager

    stages: list[list[object]] = []

    @contextmanager
    def progress(what: str, nbytes: int, steps: int):  # type: ignore[no-untyped-def]
        done = [0, 0]

        def tick(more: int, steps_more: int) -> None:
            done[0] += more
            done[1] += steps_more

        yield tick
        stages.append([what, (nbytes, steps), tuple(done)])

    model = open_model(tiny_folder(tiny.NAMES[1]))
    collect(model, model.attention, data, tmp_path / "s", run=Run(progress=progress))
    assert [stage[0] for stage in stages] == ["calibrating", "measuring", "trying out cuts"]
    assert all(total == done for _, total, done in stages)
