"""Every shell and Python example of the documentation runs, page by page and in order, as a reader would run it.

A page's examples share a folder with links to models/, configs/ and scripts/, and its Python examples a namespace.
Installed commands such as `pessa` run in this process, since starting Python anew for each example would cost minutes.
A command of `pessa` that another page has already run on the same inputs is not run again; see `Shared`. A `text` block
right below a shell example is its output: each line must be among those printed, `...` stands for any number of lines.
What cannot run has a comment above it, `<!-- not run: reason -->`; NOT_RUN says how many there may be on each page.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import entry_points
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from harness import Real

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MODELS = ("whisper-tiny.en", "minilm", "speech")
LINKS = ("models", "configs", "scripts", "LICENSE")  # in the folder of each page
RUNNABLE = {"sh", "python"}
OTHERS = {"text", "json", "toml"}
# Of each page, how many examples may not be run. Each of them says why; read them before you add to these.
NOT_RUN = {
    "README.md": 1,
    "CONTRIBUTING.md": 5,
    "docs/getting-started.md": 2,
    "docs/how-to/architecture.md": 1,
    "docs/how-to/evaluate.md": 3,
    "docs/how-to/serving.md": 1,
    "docs/how-to/speech.md": 2,
    "docs/how-to/text.md": 3,
    "docs/how-to/tuning.md": 4,
}
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


def installed(name: str) -> Any:
    """The function behind a command that a package has installed; None for other commands."""
    if name == "pessa":  # of this checkout
        project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        module, _, function = project["scripts"]["pessa"].partition(":")
        return getattr(importlib.import_module(module), function)
    found = entry_points(group="console_scripts", name=name)
    return next(iter(found)).load() if found else None


# What these commands do is seen in the folder that they write, or by a failure, unless they have one of the options.
SHARED_COMMANDS = ("prune", "run", "export", "verify")
NOT_SHARED = {">", "--calibrate", "--card", "--dry-run", "--json", "--junit", "--statistics", "--to"}


class Shared:
    """The folders that commands of `pessa` have written, so that no page does again what another has done.

    A command is the same if its words are, apart from where it writes, and if the models that it reads are: those of
    the repository, and folders with the same pessa.json, which has the hashes of their files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: dict[str, Path | None] = {}

    def key(self, words: list[str]) -> str | None:
        """What a command does, in words; None if it is not shared."""
        if words[1] not in SHARED_COMMANDS or NOT_SHARED & set(words):
            return None
        out = words.index("-o") + 1 if "-o" in words else None
        parts = []
        for place, word in enumerate(words):
            if place == out:
                parts.append("OUT")
            elif not Path(word).exists() or word.partition("/")[0] in LINKS:
                parts.append(word)
            elif (manifest := Path(word) / "pessa.json").exists():
                parts.append(sha256(manifest.read_bytes()).hexdigest())
            else:
                return None
        return " ".join(parts)

    def keep(self, key: str, out: Path | None) -> None:
        """Keep what a command has written, apart from the page that may change it."""
        kept = None if out is None else self.folder / str(len(self.done))
        if out is not None and kept is not None:
            shutil.copytree(out, kept, copy_function=_copied)
        self.done[key] = kept

    def repeat(self, key: str, out: Path | None) -> None:
        """Do what the command did."""
        kept = self.done[key]
        if out is not None and kept is not None:
            shutil.copytree(kept, out, copy_function=_copied)


def _copied(source: str, target: str) -> None:
    """Weights are linked: no command changes them in place."""
    (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    return Shared(tmp_path_factory.mktemp("shared"))


@pytest.fixture
def reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shared: Shared
) -> Callable[..., str]:
    """`reader(command)`: what a shell command prints, in a folder of the reader's own; a failure fails the test.

    With `silent` nobody looks at what it prints, so that what another page has done may stand for it.
    """
    for name in LINKS:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def run(command: str, silent: bool = False) -> str:
        words = shlex.split(command, comments=True)
        if not words:
            return ""
        if words[0] != "pessa":
            return run_installed(words) if "<<" not in words and installed(words[0]) else run_shell(command)
        key = shared.key(words)
        out = Path(words[words.index("-o") + 1]) if "-o" in words else None
        if silent and key in shared.done:
            shared.repeat(key, out)
            return ""
        printed = run_installed(words)
        if key is not None and key not in shared.done:
            shared.keep(key, out)
        return printed

    def run_shell(command: str) -> str:
        done = subprocess.run(["bash", "-ec", command], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def run_installed(words: list[str]) -> str:
        target = Path(words[words.index(">") + 1]) if ">" in words else None
        monkeypatch.setattr(sys, "argv", words if target is None else words[: words.index(">")])
        capsys.readouterr()
        code: object = 0
        try:
            installed(words[0])()
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        assert code == 0, f"{shlex.join(words)}\n{printed.out}{printed.err}"
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


@pytest.fixture(scope="module")
def _real_models(real: Real) -> None:
    for name in MODELS:
        real(name)


@pytest.mark.usefixtures("_real_models")
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(e.language in RUNNABLE and not e.reason for e in examples(page))],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_examples(page: Path, reader: Callable[..., str]) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    printed = ""
    found = examples(page)
    for example, after in zip_longest(found, found[1:]):
        if example.language == "text" and example.follows and printed:
            check_output(example.text, printed, example.where)
        printed = ""
        if example.reason is not None or example.language not in RUNNABLE:
            continue
        if example.language == "sh":
            silent = after is None or after.language != "text" or not after.follows
            printed = "\n".join(reader(command, silent) for command in commands(example.text))
        else:
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


def test_only_the_same_commands_on_the_same_inputs_are_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shared = Shared(tmp_path / "shared")
    for folder, manifest in (("out", "1"), ("same", "1"), ("other", "2"), ("own", None)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "model.safetensors").write_text(folder)
        if manifest is not None:
            (tmp_path / folder / "pessa.json").write_text(manifest)

    def key(command: str) -> str | None:
        return shared.key(["pessa", *command.split()])

    assert key("prune models/a -o one/") == key("prune models/a -o two/") != key("prune models/b -o one/")
    assert key("prune models/a -o one/ --rank 3") != key("prune models/a -o one/")
    assert key("verify models/a out/") == key("verify models/a same/") != key("verify models/a other/")
    for not_shared in ("verify models/a own/", "verify models/a out/ --json", "inspect models/a", "prune own -o one/"):
        assert key(not_shared) is None
    shared.keep("key", tmp_path / "out")
    shared.repeat("key", tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").read_text() == "out"


def test_output_is_really_compared() -> None:
    check_output("a 1.5e-08\n...\nc", "a   2e-07\nb\nc\n", "here")
    for wrong in ("a 1\n", "b\nc\n", "c\n...\na 1e-3\n"):
        with pytest.raises(AssertionError):
            check_output(wrong, "a 2e-07\nx\nc\n", "here")
