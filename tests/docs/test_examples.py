"""Every shell and Python example of the documentation runs, page by page and in order, as a reader would run it.

A page's examples share a folder with links to models/, configs/ and scripts/, and its Python examples a namespace.
`pessa` runs in this process, since starting it anew for each example would cost minutes. A `text` block right below a
shell example is its output: each line must be among those printed, `...` stands for any number of lines. What cannot
run has a comment above it, `<!-- not run: reason -->`; NOT_RUN says how many there may be on each page.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import pessa_cli

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = ("whisper-tiny.en", "minilm", "speech")
RUNNABLE = {"sh", "python"}
OTHERS = {"text", "json", "toml"}
# Of each page, how many examples may not be run. Each of them says why; read them before you add to these.
NOT_RUN = {
    "README.md": 1,
    "CONTRIBUTING.md": 4,
    "docs/getting-started.md": 2,
    "docs/how-to/architecture.md": 2,
    "docs/how-to/evaluate.md": 2,
    "docs/how-to/serving.md": 1,
    "docs/how-to/speech.md": 1,
    "docs/how-to/text.md": 3,
    "docs/how-to/tuning.md": 4,
}
API_IS_THERE = True  # whether pessa_cli has prune, Rule and the others; a test below says when to change this
SCIENTIFIC = re.compile(r"[\d.]+e[-+]\d+")


@dataclass(frozen=True)
class Example:
    """A fenced block: its language, its text, the line it starts in, and why it is not run, if it is not."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    follows: bool  # nothing stands between it and the block before it

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def examples(page: Path) -> list[Example]:
    """The fenced blocks of a page, in order."""
    found: list[Example] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    start, last = None, -1
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            assert not line.lstrip().startswith("```"), f"{page}:{number + 1}: an indented example is not run"
            continue
        if start is None:
            start = number
            continue
        mark = re.fullmatch(r"<!-- not run: (.+) -->", lines[start - 1])
        follows = last >= 0 and not any(lines[last + 1 : start])
        text = "\n".join(lines[start + 1 : number]) + "\n"
        found.append(Example(page, start + 1, lines[start][3:], text, mark and mark[1], follows))
        start, last = None, number
    assert start is None, f"{page}: a block does not end"
    return found


def commands(text: str) -> Iterator[str]:
    """The commands of a shell example: lines, with those that continue them and the text of here-documents."""
    lines = iter(text.splitlines())
    for line in lines:
        command = line
        while command.endswith("\\"):
            command = command[:-1] + next(lines)
        if until := re.search(r"<<'?(\w+)'?$", command):
            for more in lines:
                command += "\n" + more
                if more == until[1]:
                    break
        if command.strip():
            yield command


def missing_names(code: str) -> set[str]:
    """What an example takes from `pessa_cli` that is not there."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "pessa_cli":
            names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and node.module == "pessa_cli":
            names |= {alias.name for alias in node.names}
    return {name for name in names if not in_the_api(name)}


def in_the_api(name: str) -> bool:
    """Whether `pessa_cli` has it, and not just a module of that name."""
    return not isinstance(getattr(pessa_cli, name, pessa_cli), ModuleType)


def main() -> Any:
    """The function behind the `pessa` command."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["pessa"].partition(":")
    return getattr(importlib.import_module(module), function)


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`reader(command)`: what a shell command prints, in a folder of the reader's own; a failure fails the test."""
    for name in ("models", "configs", "scripts", "LICENSE"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: str) -> str:
        words = shlex.split(command, comments=True)
        if not words:
            return ""
        if words[0] != "pessa":
            done = subprocess.run(
                ["bash", "-ec", command], env=environment, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
            return done.stdout
        target = Path(words[words.index(">") + 1]) if ">" in words else None
        monkeypatch.setattr(sys, "argv", words if target is None else words[: words.index(">")])
        capsys.readouterr()
        code: object = 0
        try:
            main()()
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        assert code == 0, f"{command}\n{printed.out}{printed.err}"
        if target is not None:
            target.write_text(printed.out, encoding="utf-8")
        return printed.out + printed.err

    return run


def same_line(expected: str, printed: str) -> bool:
    """Whether two lines say the same, spaces and the digits of very small numbers aside."""
    ours, theirs = expected.split(), printed.split()
    return len(ours) == len(theirs) and all(
        a == b or (SCIENTIFIC.fullmatch(a) and SCIENTIFIC.fullmatch(b)) for a, b in zip(ours, theirs, strict=True)
    )


def check_output(expected: str, printed: str, where: str) -> None:
    """Each expected line is printed, in this order; without `...` between them they follow each other."""
    lines, place, anywhere = printed.splitlines(), 0, True
    for line in expected.splitlines():
        if line == "...":
            anywhere = True
            continue
        ends = len(lines) if anywhere else min(place + 1, len(lines))
        found = next((i for i in range(place, ends) if same_line(line, lines[i])), None)
        assert found is not None, f"{where}: this is not printed\n{line}\nbut\n{printed}"
        place, anywhere = found + 1, False


@pytest.fixture(scope="module", autouse=True)
def _real_models() -> None:
    from fetch_models import fetch

    for name in MODELS:
        fetch(name)


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(e.language in RUNNABLE and not e.reason for e in examples(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples(page: Path, reader: Any) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    for example in examples(page):
        if example.language == "text" and example.follows and printed:
            check_output(example.text, printed, example.where)
        printed = ""
        if example.reason is not None or example.language not in RUNNABLE:
            continue
        if example.language == "sh":
            printed = "\n".join(reader(command) for command in commands(example.text))
        elif API_IS_THERE or not missing_names(example.text):
            code = "\n" * example.line + example.text  # so that a traceback has the line of the page
            exec(compile(code, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_has_a_language_that_says_whether_it_runs(page: Path) -> None:
    for example in examples(page):
        assert example.language in RUNNABLE | OTHERS, example.where
        if example.reason is not None:
            assert example.language in RUNNABLE, example.where
            assert len(example.reason.split()) > 2, f"{example.where}: say why it is not run"
        if example.language == "python" and example.reason is None:
            ast.parse(example.text)


def test_only_so_many_examples_are_not_run() -> None:
    found = Counter(str(e.page.relative_to(ROOT)) for page in PAGES for e in examples(page) if e.reason is not None)
    assert dict(found) == NOT_RUN


def test_the_examples_of_the_python_api_run_as_soon_as_it_is_there() -> None:
    assert in_the_api("prune") == API_IS_THERE, "set API_IS_THERE to what pessa_cli now has"


def test_output_is_really_compared() -> None:
    check_output("a 1.5e-08\n...\nc", "a   2e-07\nb\nc\n", "here")
    for wrong in ("a 1\n", "b\nc\n", "c\n...\na 1e-3\n"):
        with pytest.raises(AssertionError):
            check_output(wrong, "a 2e-07\nx\nc\n", "here")
