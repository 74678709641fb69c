"""What the documentation is built from: the pages of the commands, the packages, and the pages' own claims."""

from __future__ import annotations

import re
from pathlib import Path

import docs_hooks
import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").rglob("*.md")
)
TYPER = """# `pessa`

What it is.

**Usage**:

```console
$ pessa [OPTIONS] COMMAND [ARGS]...
```

**Options**:

* `--help`: Show this message and exit.

**Commands**:

* `cut`: Cut directions...

## `pessa cut`

Cut directions out of every head.

Example: `pessa cut model`

**Arguments**:

* `MODEL <str>`: A folder.  [required]

**Options**:

* `--rank <int>`: Keep so many.  [default: 8]
* `--kind <a|b>`: Which kind.
* `--help`: Show this message and exit.
"""


def test_what_typer_says_becomes_tables() -> None:
    pages = docs_hooks.command_pages(TYPER)
    assert set(pages) == {"", "cut"}
    assert "| [`pessa cut`](cut.md) | Cut directions out of every head. |" in pages[""]
    assert "| `--help` | Show this message and exit. |  |" in pages[""]
    assert "| `MODEL <str>` | A folder. | required |" in pages["cut"]
    assert "| `--rank <int>` | Keep so many. | `8` |" in pages["cut"]
    assert "| `--kind <a|b>` | Which kind. |  |" in pages["cut"]
    assert "$ pessa cut model\n" in pages["cut"]


def test_every_command_has_a_page_with_every_option() -> None:
    """Against the help that a user sees, which typer makes in another way."""
    module = docs_hooks.entry_point()[0]
    pages = docs_hooks.command_pages(docs_hooks.run_python("-m", "typer", module, "utils", "docs", "--name", "pessa"))
    helped = docs_hooks.pessa("--help")
    commands = [name for name in pages if name]
    assert len(commands) > 8
    assert all(re.search(rf"\b{name}\b", helped) for name in commands)
    flags = set(re.findall(r"--[a-z][a-z-]+", docs_hooks.pessa("prune", "--help")))
    assert len(flags) > 20
    assert {flag for flag in flags if flag not in pages["prune"]} == set()


def test_the_picture_has_every_package() -> None:
    rows = docs_hooks.packages()
    picture = docs_hooks.packages_picture(rows)
    places = [picture.index(f">{name}</text>") for name, _ in rows]
    assert places == sorted(places, reverse=True)  # the lowest package is drawn last
    assert all(text.endswith(".") for _, text in rows)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_options_that_pages_name_exist() -> None:
    """In examples of `pessa`, those that are not run among them, against the pages of the commands."""
    module = docs_hooks.entry_point()[0]
    pages = docs_hooks.command_pages(docs_hooks.run_python("-m", "typer", module, "utils", "docs", "--name", "pessa"))
    wrong = []
    for page in SOURCES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, options in re.findall(r"\bpessa\W+(\w+)\b([^`\n]*)", text):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", options.partition("#")[0]):
                if command in pages and not re.search(rf"{flag}\b(?!-)", pages[command]):
                    wrong.append(f"{page.name}: pessa {command} {flag}")
    assert not wrong


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_to_files(page: Path) -> None:
    """mkdocs checks those of the site; these are for people who read the files."""
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" in target or "reference/commands/" in target or target.startswith("commands/"):
            continue
        assert (page.parent / target).exists(), f"{page}: {target}"
