"""What mkdocs builds from the program itself: pages of commands, keys of recipes, architectures, and the packages.

mkdocs calls the `on_...` functions. The commands come from `python -m typer MODULE utils docs`, the documented way to
get the help of a typer app as Markdown; MODULE is that of the entry point in pyproject.toml. The keys of recipes come
from the dataclasses that define the options; `python -m scripts.docs_hooks` prints their tables as JSON. Formulas
become MathML while building, so the site needs no script from elsewhere to show them.
"""

from __future__ import annotations

import ast
import json
import re
import runpy
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Mapping
from html import escape, unescape
from pathlib import Path
from textwrap import wrap
from typing import TYPE_CHECKING, Any, get_origin, get_type_hints

import griffe
import latex2mathml.converter
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

    from pessa_cli.common.options import Setting

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "reference/commands"
OVERVIEW = f"{COMMANDS}/index.md"


def entry_point() -> tuple[str, str]:
    """The module and function of the `pessa` command, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["pessa"].partition(":")
    return module, function


def run_python(*arguments: str) -> str:
    """What a Python of this environment prints, started in the root so that it imports this checkout."""
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", check=False
    )
    if done.returncode:
        raise RuntimeError(f"python {' '.join(arguments)} failed:\n{done.stderr}")
    return done.stdout


def pessa(*arguments: str) -> str:
    """What a command of pessa prints."""
    module, function = entry_point()
    return run_python("-c", f"import sys; from {module} import {function}; {function}()", *arguments)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Ask the program for its commands, and put their pages into the navigation."""
    pages = command_pages(run_python("-m", "typer", entry_point()[0], "utils", "docs", "--name", "pessa"))
    config["extra"]["pessa_commands"] = pages
    names = [{name: f"{COMMANDS}/{name}.md"} for name in pages if name]
    _replace(config["nav"], OVERVIEW, [OVERVIEW, *names])
    return config


def _replace(nav: Any, page: str, by: Any) -> None:
    for entry in nav:
        for title, content in entry.items() if isinstance(entry, dict) else ():
            if content == page:
                entry[title] = by
            elif isinstance(content, list):
                _replace(content, page, by)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the page of each command."""
    for name, text in config["extra"]["pessa_commands"].items():
        files.append(File.generated(config, f"{COMMANDS}/{name or 'index'}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what a page asks for by a comment: `<!-- generated: NAME -->`, `<!-- included: FILE -->`."""
    del page, config, files
    markdown = re.sub(r"<!-- included: (\S+) -->", lambda found: _included(found[1]), markdown)
    if "<!-- generated: architectures -->" in markdown:
        markdown = markdown.replace("<!-- generated: architectures -->", _literal(pessa("architectures", "--markdown")))
    if "<!-- generated: packages -->" in markdown:
        markdown = markdown.replace("<!-- generated: packages -->", packages_picture(packages()))
    if "<!-- generated: keys of " in markdown:
        tables = json.loads(run_python("-m", "scripts.docs_hooks"))
        markdown = re.sub(r"<!-- generated: keys of (\w+) -->", lambda found: tables[found[1]], markdown)
    return markdown


def _included(file: str) -> str:
    """A file of the root in a page of docs/project/: its links to pages are relative to the root."""
    return (ROOT / file).read_text(encoding="utf-8").replace("](docs/", "](../")


def _literal(table: str) -> str:
    """A table in which the asterisk of a kind of blocks, as in `text.*`, is no mark of emphasis."""
    return re.sub(r"\.\*", r".\\*", table)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas as MathML."""
    del page, config, files
    return re.sub(
        r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', _mathml, html, flags=re.DOTALL
    )  # arithmatex has escaped what is between them


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found[2] == "[" else "inline"
    return str(latex2mathml.converter.convert(unescape(found[3]), display=display))


# Commands


def command_pages(document: str) -> dict[str, str]:
    """The pages of the commands by name, and under "" the overview, from what typer says about an app."""
    overview, *parts = re.split(r"^## `pessa ([\w-]+)`\n", document, flags=re.MULTILINE)
    texts = dict(zip(parts[::2], parts[1::2], strict=True))
    return {"": _overview(overview, texts)} | {name: f"# pessa {name}\n" + _as_tables(t) for name, t in texts.items()}


def _overview(text: str, commands: Mapping[str, str]) -> str:
    """The commands, each with the first sentence of its help, and the options of `pessa` itself."""
    about, _, options = text.partition("**Options**:")
    options = "**Options**:" + options.partition("**Commands**:")[0]
    first = {name: text.strip().partition("\n")[0] for name, text in commands.items()}
    rows = [f"| [`pessa {name}`]({name}.md) | {sentence} |" for name, sentence in first.items()]
    parts = [
        about.replace("# `pessa`", "# Commands").replace("**Usage**:", "## Usage"),
        "\n".join(["| command | what it does |", "|---|---|", *rows]),
        "Results go to stdout (`--json` prints them for programs), progress and messages to stderr. The exit code is 0 "
        "when a command is done, 1 when it failed or when `verify` finds that the models differ, 2 for wrong usage. "
        "These pages are generated from the program; `pessa COMMAND --help` shows the same.",
        _as_tables(options),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _as_tables(text: str) -> str:
    """Typer's lists of arguments and options as tables: what it is called, what it does, and its default."""

    def table(found: re.Match[str]) -> str:
        rows = [_row(item) for item in found[2].strip().split("\n* ")]
        lines = [f"| {found[1].removesuffix('s').lower()} | meaning | default |", "|---|---|---|", *rows]
        return f"## {found[1]}\n\n" + "\n".join(lines) + "\n"

    text = re.sub(r"^\*\*(\w+)\*\*:\n\n((?:\* .*\n(?:  .*\n|\n(?=  ))*)+)", table, text + "\n", flags=re.MULTILINE)
    text = re.sub(r"^Example: `(.*)`$", r"For example:\n\n```console\n$ \1\n```", text, flags=re.MULTILINE)
    return text.replace("**Usage**:", "## Usage")


def _row(item: str) -> str:
    """`--ratio <float>`: Drop this share.  [default: 1] -> a row of the table."""
    found = re.fullmatch(r"(?:\* )?`([^`]+)`(?:: )?(.*)", item.strip(), flags=re.DOTALL)
    if found is None:
        raise RuntimeError(f"typer describes an option in a new way: {item}")
    name, text = found[1], " ".join(found[2].split())
    default = ""
    if given := re.search(r"\s*\[default: (.*?)\]", text):
        default, text = f"`{given[1]}`", text.replace(given[0], "")
    if "[required]" in text:
        default, text = "required", re.sub(r"\s*\[required\]", "", text)
    return f"| `{name}` | {text} | {default} |"


# Recipes


def recipe_tables() -> dict[str, str]:
    """For each table of a recipe, such as `prune`, its keys in Markdown: type, meaning and default."""
    from pessa_cli.common.options import settings_of
    from pessa_cli.evaluation.limits import VerifyOptions
    from pessa_cli.tuning.options import Tuning
    from pessa_cli.workflow.recipe import Recipe

    tables = {"prune": Recipe, "verify": VerifyOptions, **get_type_hints(Tuning)}
    return {name: _keys(settings_of(kind)) for name, kind in tables.items()}


def _keys(settings: Iterable[Setting]) -> str:
    rows = [f"| `{s.name}` | {_toml_type(s)} | {s.option.help} | {_toml_default(s)} |" for s in settings]
    return "\n".join(["| key | type | meaning | default |", "|---|---|---|---|", *rows])


def _toml_type(setting: Setting) -> str:
    """What is written in the file, in words."""
    from pessa_cli.common.toml import toml_types

    if setting.choices:
        *others, last = (f'`"{choice}"`' for choice in setting.choices)
        return f"{', '.join(others)} or {last}"
    types = toml_types(setting)
    if list in types:
        return "list of strings"
    if dict in types:
        return "table"
    if float in types:
        return "number"
    names = {bool: "`true` or `false`", int: "integer", str: "string"}
    return " or ".join(names[kind] for kind in types)


def _toml_default(setting: Setting) -> str:
    """The default as it would be written in the file; nothing where leaving the key out is the only way to say it."""
    if setting.default is None:
        return ""
    if setting.items is not None or get_origin(setting.kind) is Mapping:
        assert not setting.default, f"{setting.name} has a default that this table does not show"
        return ""
    return f"`{json.dumps(setting.default)}`"


# Packages


def packages() -> tuple[tuple[str, str], ...]:
    """The order in tests/helpers/packages.py, lowest first, each with the first sentence of its `__init__.py`."""
    order = runpy.run_path(str(ROOT / "tests" / "helpers" / "packages.py"))
    found: tuple[tuple[str, str], ...] = tuple((name, order["purpose"](name)) for name in order["PACKAGES"])
    return found


def packages_picture(rows: tuple[tuple[str, str], ...]) -> str:
    """An SVG of the packages, one upon the other, in the colours of the page."""
    height, gap, left, width = 44, 8, 24, 660
    boxes = []
    for place, (name, text) in enumerate(reversed(rows)):
        top = place * (height + gap)
        lines = wrap(text.removesuffix(".").replace("`", ""), 74)
        first = top + height / 2 + 5 - 8 * (len(lines) - 1)
        words = "".join(
            f'<text x="{left + 122}" y="{first + 16 * i:g}" font-size="13">{escape(line)}</text>'
            for i, line in enumerate(lines)
        )
        boxes.append(
            f'<rect x="{left}" y="{top + 1}" width="{width - left - 1}" height="{height}" rx="6" fill="none" '
            f'stroke="currentColor" stroke-opacity="0.45"/>'
            f'<text x="{left + 12}" y="{top + height / 2 + 6:g}" font-size="14" '
            f'font-weight="bold">{escape(name)}</text>{words}'
        )
    total = len(rows) * (height + gap)
    arrow = (
        f'<path d="M9 4 V{total - gap - 6}" stroke="currentColor" stroke-width="1.5"/>'
        f'<path d="M4 {total - gap - 14} L9 {total - gap - 3} L14 {total - gap - 14} Z" fill="currentColor"/>'
    )
    return (
        f'<div><svg class="pessa-packages" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" role="img" '
        f'aria-label="The packages of pessa; imports point downwards" fill="currentColor" '
        f'font-family="sans-serif">{arrow}{"".join(boxes)}</svg></div>'
    )


# Options of dataclasses, which mkdocstrings reads from the source


class OptionDefaults(griffe.Extension):
    """Shows a field as what it means: `ratio: float | None = None`, and not `= option(None, "Drop this ...")`.

    The fields of fine-tuning methods, whose `option` begins with the help text, get that text as their docstring. What
    docstrings say about parameters and fields becomes a list.
    """

    def on_function_instance(self, *, func: griffe.Function, **_: Any) -> None:
        """A list of the parameters."""
        _list_names(func, [parameter.name for parameter in func.parameters])

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """A list of the fields."""
        _list_names(cls, [name for name, member in cls.members.items() if member.is_attribute])

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Put the default in the place of the call that makes the field."""
        call = attr.value
        if not isinstance(call, griffe.ExprCall):
            return
        positional = [value for value in call.arguments if not isinstance(value, griffe.ExprKeyword)]
        match call.canonical_path.rpartition(".pessa_cli.")[2].removeprefix("pessa_cli."):
            case "common.options.option":
                attr.value = positional[0]
            case "ranks.rule._criterion":
                attr.value = "None"
            case "tuning.tuner_base.option":
                attr.docstring = griffe.Docstring(_text(positional[0], attr.module), parent=attr)
                attr.value = positional[1] if len(positional) > 1 else "None"


def _list_names(found: griffe.Function | griffe.Class, names: list[str]) -> None:
    if found.docstring is not None and names:
        found.docstring.value = listed_names(found.docstring.value, names)


def listed_names(text: str, names: Iterable[str]) -> str:
    """A docstring in Markdown: "model: a folder. out: the output. Returns nothing." as a list and a paragraph."""
    name = "|".join(map(re.escape, names))
    label = rf"(?:{name})(?:(?:, | and )(?:{name}))*"
    paragraphs = []
    for paragraph in text.split("\n\n"):
        flat = " ".join(paragraph.split())
        intro, *items = re.split(rf"(?:^|(?<=[.)] ))(?={label}: )", flat)
        rest = ""
        if items:
            items[-1], _, rest = re.sub(r"(?<=\.) (?=Raises |Returns )", "\0", items[-1]).partition("\0")
        bullets = [re.sub(rf"^({label}): ", r"- **\1**: ", item.strip()) for item in items]
        paragraphs += [part for part in (intro.strip(), "\n".join(bullets), rest) if part]
    return "\n\n".join(paragraphs)


def _text(literal: str | griffe.Expr, module: griffe.Module) -> str:
    """The text of a literal; an f-string may name constants of its module."""
    source = str(literal)
    named = set(re.findall(r"\b[A-Z_]{2,}\b", source)) & set(module.attributes)
    constants = {name: ast.literal_eval(str(module.attributes[name].value)) for name in named}
    return str(eval(source, {"__builtins__": {}}, constants))


if __name__ == "__main__":
    print(json.dumps(recipe_tables()))
