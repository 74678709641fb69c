"""What the documentation is built from: commands, keys of recipes, packages, and the pages' own claims."""

from __future__ import annotations

import ast
import json
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import docs_hooks
import griffe
import pytest

from pessa_cli import api
from pessa_cli.common.errors import UsageError
from pessa_cli.tuning.options import load_tuning
from pessa_cli.workflow.recipe import load_recipe

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


@cache
def command_pages() -> dict[str, str]:
    module = docs_hooks.entry_point()[0]
    return docs_hooks.command_pages(docs_hooks.run_python("-m", "typer", module, "utils", "docs", "--name", "pessa"))


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
    pages = command_pages()
    helped = docs_hooks.pessa("--help")
    commands = [name for name in pages if name]
    assert len(commands) > 8
    assert all(re.search(rf"\b{name}\b", helped) for name in commands)
    flags = set(re.findall(r"--[a-z][a-z-]+", docs_hooks.pessa("prune", "--help")))
    assert len(flags) > 20
    assert {flag for flag in flags if flag not in pages["prune"]} == set()


@pytest.mark.parametrize("table", docs_hooks.recipe_tables())
def test_the_keys_of_recipes_are_those_that_are_read(table: str, tmp_path: Path) -> None:
    """The error for an unknown key lists the keys; the page asks for each table."""
    rows = docs_hooks.recipe_tables()[table].splitlines()[2:]
    assert f"<!-- generated: keys of {table} -->" in (ROOT / "docs/reference/recipes.md").read_text(encoding="utf-8")
    assert all(row.count(" | ") == 3 for row in rows)
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[{table}]\nnonsense = 1\n", encoding="utf-8")
    with pytest.raises(UsageError) as refused:
        (load_recipe if table in ("prune", "verify") else load_tuning)(recipe)
    assert refused.value.hint == "it has " + ", ".join(re.findall(r"^\| `(\w+)`", row)[0] for row in rows)


def test_types_and_defaults_of_keys() -> None:
    tables = docs_hooks.recipe_tables()
    assert "| `target_size` | integer or string |" in tables["prune"]
    assert re.search(r"\| `layout` \| `\"compact\"` or `\"dense\"` \| .+ \| `\"compact\"` \|", tables["prune"])
    assert re.search(r"\| `calibrate` \| list of strings \| .+ \|  \|", tables["prune"])
    assert re.search(r"\| `mask_prompt` \| `true` or `false` \| .+ \| `true` \|", tables["data"])
    assert re.search(r"\| `options` \| table \| .+ \|  \|", tables["adapter"])
    assert json.loads(docs_hooks.run_python("-m", "scripts.docs_hooks")) == tables


def test_signatures_show_defaults_and_not_how_options_are_made() -> None:
    extensions = griffe.load_extensions(docs_hooks.OptionDefaults)
    package = griffe.load("pessa_cli", search_paths=[ROOT], extensions=extensions)
    rule, recipe, svft = (
        package[name] for name in ("ranks.rule.Rule", "workflow.recipe.Recipe", "tuning.tuner_svft.SvftConfig")
    )
    assert (str(rule["ratio"].value), str(rule["round_to"].value)) == ("None", "1")
    assert (str(recipe["layout"].value), str(recipe["sites"].value)) == ("'compact'", "()")
    assert svft["band"].docstring.value.startswith("Diagonals on each side")
    assert package["tuning.tuner_pessa.PessaTunerConfig.form"].docstring.value.endswith("full, diagonal, banded.")


def test_what_docstrings_say_about_parameters_becomes_a_list() -> None:
    text = "Do it.\n\nBy rule.\nmodel: a folder, or\na name. out, run: the others. Raises it. Always.\n\nThe model: no."
    listed = (
        "Do it.\n\nBy rule.\n\n- **model**: a folder, or a name.\n- **out, run**: the others.\n\nRaises it. Always."
    )
    assert docs_hooks.listed_names(text, ["model", "out", "run"]) == f"{listed}\n\nThe model: no."


def test_every_public_name_is_documented() -> None:
    page = (ROOT / "docs/reference/python.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^::: pessa_cli\.api\.(\w+)$", page, flags=re.MULTILINE)) == sorted(api.__all__)


def exists(name: str) -> bool:
    """Whether pessa_cli has this module, or a module this constant, function, class or method."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath("pessa_cli", *parts[:length])
        if path.with_suffix(".py").exists() or path.is_dir():
            found = import_module(f"pessa_cli.{'.'.join(parts[:length])}")
            for part in parts[length:]:
                if not hasattr(found, part):
                    return False
                found = getattr(found, part)
            return True
    return False


def test_what_where_is_names_exists() -> None:
    page = (ROOT / "docs/where-is.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!you want|---)(.+?) \| (.+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert len(rows) > 20
    for what, where, tests in rows:
        places, files = re.findall(r"`([^`]+)`", where), re.findall(r"`([^`]+)`", tests)
        assert places, what
        assert files, what
        if "/" not in where:
            assert [name for name in places if not exists(name)] == [], what
        defined: set[str] = set()
        for name in files:
            if name.endswith(".py"):
                tree = ast.parse((ROOT / name).read_text(encoding="utf-8"))
                defined |= {name, *(n.name for n in tree.body if isinstance(n, ast.FunctionDef))}
            assert name in defined, f"{what}: {name}"


def test_what_the_design_names_exists() -> None:
    """Names with a dot that begin with a package."""
    page = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    packages = "|".join(name for name, _ in docs_hooks.packages())
    names = set(re.findall(rf"`((?:{packages})\.[\w.]+)`", page))
    assert len(names) > 20
    assert [name for name in sorted(names) if not exists(name)] == []


def test_new_names_in_the_changelog_exist() -> None:
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").partition("## 0.1.0\n")[0]
    names = re.findall(r"\| `pessa_cli\.([\w.]+)` \|$", page, flags=re.MULTILINE)
    assert len(names) > 5
    assert [name for name in names if name not in api.__all__ and not exists(name)] == []


def test_a_name_that_does_not_exist_is_found() -> None:
    assert exists("ranks.budget.ranks_for")
    assert exists("surgery.run.Run.jobs_for")
    assert not exists("ranks.budget.nonsense")
    assert not exists("nonsense.ranks_for")


@pytest.mark.parametrize("page", SOURCES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_pages_name_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for file in re.findall(r"(?<![\w/.$-])((?:tests|scripts|configs|docs|pessa_cli)/[\w/.-]*\w)", text):
        assert (ROOT / file).exists() or f"{file}*" in text or f"{file}-*" in text, f"{page}: {file}"


def test_the_picture_has_every_package() -> None:
    rows = docs_hooks.packages()
    picture = docs_hooks.packages_picture(rows)
    places = [picture.index(f'font-weight="bold">{name}</text>') for name, _ in rows]
    assert places == sorted(places, reverse=True)  # the lowest package is drawn last
    assert "`" not in picture  # Markdown would make an end of it
    assert all(text.endswith(".") for _, text in rows)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_figures_of_the_readme_are_those_of_the_results() -> None:
    """A row of the README has the model, the share, and the first three figures; results.md has more columns."""

    def rows(page: str) -> list[list[str]]:
        lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]

    names = {"Whisper tiny.en, encoder": "tiny.en encoder", "Whisper tiny.en": "tiny.en"}
    names |= {"all-MiniLM-L6-v2": "MiniLM", "SmolLM2-135M": "SmolLM2"}
    known = {(row[0], row[1]): [cell.partition(" (")[0] for cell in row[4:7]] for row in rows("docs/results.md")}
    found = [row for row in rows("README.md") if row[0] in names and len(row) == 5]
    assert len(found) > 8
    assert [row for row in found if row[2:] != known[names[row[0]], row[1]]] == []
    # Of the table for attention and MLPs together, each figure is a rounded one of that section of results.md.
    both = [row for row in rows("README.md") if len(row) == 4 and row[0].startswith(("Whisper", "SmolLM2"))]
    section = (ROOT / "docs/results.md").read_text(encoding="utf-8").partition("## Attention and MLPs together")[2]
    figures = [float(number) for number in re.findall(r"\d+\.\d+", section.partition("\n## ")[0])]
    assert len(both) > 6
    for row in both:
        for number in re.findall(r"\d+\.\d+", " ".join(row[2:])):
            places = len(number.partition(".")[2])
            assert any(f"{figure:.{places}f}" == number for figure in figures), (row, number)


def test_options_that_pages_name_exist() -> None:
    """In examples of `pessa`, those that are not run among them, against the pages of the commands."""
    pages = command_pages()
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


def test_the_tests_that_the_page_of_checkpoints_names_exist() -> None:
    page = (ROOT / "docs" / "reference" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|") and not line.startswith(("|---", "| what"))]
    named = [re.findall(r"`([\w/]+\.py)` \|$", row) for row in rows]
    assert all(len(files) == 1 for files in named)
    assert {file for files in named for file in files if not (ROOT / "tests" / file).is_file()} == set()


def test_the_page_of_environment_variables_is_complete() -> None:
    """All that the source names; scripts/peft_tests.py sets PESSA_PEFT_MODELS itself, for the tests that it starts."""
    page = (ROOT / "docs/reference/environment.md").read_text(encoding="utf-8")
    files = [path for folder in ("pessa_cli", "scripts") for path in (ROOT / folder).rglob("*.py")]
    source = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = set(re.findall(r"\b(?:PESSA|HF)_[A-Z_]+\b", source)) - {"PESSA_PEFT_MODELS"}
    assert len(named) > 5
    assert {name for name in named if f"`{name}" not in page} == set()
