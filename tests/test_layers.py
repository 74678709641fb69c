"""The structure of the packages: the order of imports, the exported names, and which modules print or load torch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest
from packages import PACKAGES, SOURCE, purpose

MOST_LINES = 400
# At the top: the package itself, `python -m pessa_cli`, and the public API.
TOP = {"__init__", "__main__", "api"}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}
# Modules that `pessa --help`, `import pessa_cli` or the first lines of a command import; they must be fast to import.
NO_TORCH = (
    *("__init__", "api", "cli.main", "cli.options", "cli.console", "cli.expand", "cli.junit", "cli.plot"),
    *("workflow.recipe", "workflow.architectures", "evaluation.limits"),
    *(
        "common.errors",
        "common.lazy",
        "common.text",
        "common.packages",
        "common.options",
        "common.values",
        "common.toml",
    ),
    *("checkpoint.reader", "checkpoint.shards", "checkpoint.staging"),
    *("blocks.table", "blocks.discover", "blocks.compact_format", "ranks.rule", "ranks.plan", "ranks.budget"),
    *("sources.open", "sources.ctranslate2", "sources.hub", "sources.pickled", "sources.openai", "sources.gguf"),
    *("models.audio", "tuning.options", "tuning.peft_plugin", "runtime.buckets"),
)
HEAVY = {
    "torch",
    "peft",
    "transformers",
    "safetensors",
    "matplotlib",
    "soundfile",
    "soxr",
    "huggingface_hub",
    "whisper",
    "gguf",
}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules and names that a file imports, including those inside functions and for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module: str) -> str:
    """Return the package of a module, such as "surgery" for surgery.model; "" for a module at the top."""
    return module.partition(".")[0] if module not in TOP else ""


def used_packages(module: str) -> set[str]:
    """Return the packages that a module imports from; "" for the top."""
    names = [name.split(".") for name in imports(MODULES[module]) if name.split(".")[0] == "pessa_cli"]
    return {name[1] if len(name) > 1 and name[1] in PACKAGES else "" for name in names}


def test_every_package_is_in_the_order_and_says_what_belongs_there() -> None:
    found = {module.partition(".")[0] for module in MODULES if "." in module}
    assert found == set(PACKAGES)
    assert {path.stem for path in SOURCE.glob("*.py")} == TOP
    for package in PACKAGES:
        assert purpose(package).endswith("."), package


def modules_of(package: str) -> set[str]:
    return {module.partition(".")[2] for module in MODULES if module.startswith(f"{package}.")}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_exported_name_exists(package: str) -> None:
    """Type checkers must see the same names. A name must not be that of a module, which would replace it."""
    found = import_module(f"pessa_cli.{package}")
    assert found.__all__
    assert [name for name in found.__all__ if not hasattr(found, name)] == []
    assert modules_of(package) & set(found.__all__) == set()
    seen = {name.rpartition(".")[2] for name in imports(MODULES[f"{package}.__init__"]) if f".{package}." in name}
    assert seen == set(found.__all__)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_export_what_others_import(package: str) -> None:
    """Except functions with the name of their module, such as `workflow.prune.prune`."""
    others = (imports(tree) for module, tree in MODULES.items() if package_of(module) != package)
    used = {name.split(".")[-1] for names in others for name in names if name.startswith(f"pessa_cli.{package}.")}
    assert used - set(import_module(f"pessa_cli.{package}").__all__) <= modules_of(package)


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module)])
def test_imports_point_downwards(module: str) -> None:
    """This includes imports inside functions, and imports for types only."""
    own = package_of(module)
    allowed = set(PACKAGES[: PACKAGES.index(own) + 1])
    assert used_packages(module) <= allowed, f"{module} imports from above {own}"


def test_no_import_cycle_within_a_package() -> None:
    graph: dict[str, set[str]] = {}
    for module, tree in MODULES.items():
        names = [name.removeprefix("pessa_cli.") for name in imports(tree) if name.startswith("pessa_cli.")]
        found = {next((n for n in (name, name.rpartition(".")[0]) if n in MODULES), "") for name in names}
        graph[module] = {name for name in found if name and package_of(name) == package_of(module)}
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_no_file_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    assert {path.name: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_no_two_classes_have_the_same_name() -> None:
    """The name of a class must mean one thing in the whole package."""
    places: dict[str, list[str]] = {}
    for module, tree in MODULES.items():
        for node in ast.iter_child_nodes(tree):
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in places.items() if len(modules) > 1} == {}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "cli.console"])
def test_only_the_console_prints(module: str) -> None:
    """A warning is a PessaWarning, so that the command line can show it and programs can filter it.

    The import hooks warn otherwise: they run in programs that may make no use of pessa.
    """
    printing = {"print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write"}
    calls = [node for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)]
    assert not {ast.unparse(node.func) for node in calls} & printing
    warned = [ast.unparse(node.args[1]) for node in calls if ast.unparse(node.func) == "warnings.warn"]
    assert set(warned) <= {"RuntimeWarning" if module == "compat.hooks" else "PessaWarning"}
    known = ("logging",) if module == "cli.plain_console" else ("rich", "logging")  # the console that it prints on
    tables = "rich.table" if package_of(module) == "cli" else None  # a table is a value, which the console prints
    others = [name for name in imports(MODULES[module]) if name.rpartition(".")[0] != tables]
    assert not [name for name in others if name.split(".")[0] in known]


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) in ("algebra", "ranks")])
def test_numerics_never_open_files(module: str) -> None:
    used = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not used & {"pathlib", "os", "io", "json", "shutil", "tempfile", "safetensors"}
    assert not [n for n in ast.walk(MODULES[module]) if isinstance(n, ast.Call) and ast.unparse(n.func) == "open"]


@pytest.mark.parametrize("module", [module for module in MODULES if package_of(module) in ("checkpoint", "sources")])
def test_input_and_output_never_do_algebra(module: str) -> None:
    tree = MODULES[module]
    assert "torch.linalg" not in ast.unparse(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)]


def test_no_module_imports_click() -> None:
    """Only typer's public API is used, because typer contains its own copy of Click."""
    names = [name for tree in MODULES.values() for name in imports(tree)]
    assert not [name for name in names if name.split(".")[0] == "click" or name.startswith("typer._")]


IMPORTING = """
import importlib, json, sys
names, heavy = json.loads(sys.argv[1])
there = set()
for name in names:
    importlib.import_module(name)
    new = sys.modules.keys() & set(heavy) - there
    there |= new
    print(json.dumps([name, sorted(new)]))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, list[str]]:
    """The heavy packages that each module is the first to import, one after the other in a fresh Python.

    Where the first brings none, and no other adds any, none of them imports any.
    """
    names = ["pessa_cli" if module == "__init__" else f"pessa_cli.{module}" for module in NO_TORCH]
    line = [sys.executable, "-c", IMPORTING, json.dumps([names, sorted(HEAVY)])]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return dict(json.loads(row) for row in done.stdout.splitlines())


@pytest.mark.parametrize("module", NO_TORCH)
def test_nothing_heavy_at_import(module: str, loaded: dict[str, list[str]]) -> None:
    """Tested by importing, because a light module may import a heavy one."""
    assert loaded["pessa_cli" if module == "__init__" else f"pessa_cli.{module}"] == []


def test_no_test_fetches_models_but_by_the_fixture() -> None:
    """What takes the fixture is marked `real`, and left out of `make check`."""
    files = [path for path in Path(__file__).parent.rglob("*.py") if path != Path(__file__)]
    assert [path.name for path in files if "fetch_models import" in path.read_text()] == ["conftest.py"]


def test_the_folders_of_the_tests_are_those_of_the_packages() -> None:
    tests = Path(__file__).parent
    folders = {path.name for path in tests.iterdir() if path.is_dir() and any(path.glob("test_*.py"))}
    assert folders <= {*PACKAGES, "docs", "scripts"}
    assert {path.name for path in tests.glob("test_*.py")} == {Path(__file__).name}
