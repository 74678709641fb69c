"""The order of the package, from its source: who imports whom, who prints, who needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pessa_cli

SOURCE = Path(pessa_cli.__file__).parent
MODULES = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(SOURCE.glob("*.py"))}

# From the bottom up, as in the design, section 3: a module imports only from lines under its own.
LAYERS = (
    {"errors", "jobs", "spool"},
    {"extras", "architectures", "audio", "checkpoint"},
    {"ragged", "whisper_files", "writer"},
    {"buckets", "naming", "sites", "gguf_source", "openai_tokenizer", "pickled"},
    {"heads", "ranks", "ctranslate2", "hub", "openai_whisper"},
    {"budget"},
    {"factors", "recipe", "report", "plot", "runtime", "sources", "card", "onnx_attention"},
    {"rope"},
    {"attention", "methods", "statistics", "tuning"},
    {"narrow"},
    {"peft_plugin", "singular"},
    {"tuner_base"},
    {"tuner_pessa", "tuner_sorsa", "tuner_pica", "tuner_svft", "tuner_lora_xs"},
    {"model", "loading"},
    {"output"},
    {"pipeline"},
    {"openai_export"},
    {"whisper_model"},
    {"__init__"},
    {"sidebyside"},
    {"trials"},
    {"calibrate", "measures"},
    {"tuning_data", "merge", "speech", "perplexity", "pairs"},
    {"tune", "questions"},
    {"evaluate"},
    {"search"},
    {"verify", "bench", "onnx_export"},
    {"junit", "console"},
    {"options"},
    {"app_tune"},
    {"app"},
)
# What `pessa --help` and the first lines of every command load; the rest waits until there is work to do.
NO_TORCH = ("__init__", "app", "architectures", "checkpoint", "console", "errors", "junit", "plot", "ranks", "recipe")
NO_TORCH_EITHER = ("ragged", "writer", "report", "sites", "sources", "ctranslate2", "whisper_files", "audio", "writer")
SOURCES = ("hub", "pickled", "openai_whisper", "openai_tokenizer", "gguf_source")
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


def imports(tree: ast.AST, everywhere: bool = True) -> Iterator[str]:
    """The modules a file imports; unless `everywhere`, only those that importing the file itself loads."""
    for node in ast.iter_child_nodes(tree):
        if not everywhere:
            typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            if typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        else:
            yield from imports(node, everywhere)


def inside(name: str) -> str | None:
    """The pessa module behind an imported name: "heads" for pessa_cli.heads.Layout; None for other packages."""
    package, _, rest = name.partition(".")
    if package != "pessa_cli":
        return None
    module = rest.partition(".")[0]
    return module if module in MODULES else "__init__"


def test_every_module_has_its_layer() -> None:
    assert sorted(MODULES) == sorted(name for layer in LAYERS for name in layer)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_downwards(module: str) -> None:
    """Those inside functions and for types only too; a version number may be asked of the package from anywhere."""
    below: set[str] = set()
    for layer in LAYERS:
        if module in layer:
            break
        below |= layer
    names = [name for name in imports(MODULES[module]) if name != "pessa_cli.__version__"]
    if module == "__init__":
        below |= {"loading"}
    used = {found for name in names if (found := inside(name)) is not None}
    assert used <= below, f"{module} imports {sorted(used - below)} from its own layer or above"


def test_nobody_imports_the_command_line() -> None:
    commands = {"app", "app_tune", "options"}  # of which app is imported by none, and the others by commands only
    users = {user for user, tree in MODULES.items() for name in imports(tree) if inside(name) in {*commands, "console"}}
    assert users == commands
    assert "app" not in {inside(name) for tree in MODULES.values() for name in imports(tree)}


@pytest.mark.parametrize("module", [module for module in MODULES if module != "console"])
def test_only_the_console_prints(module: str) -> None:
    printing = {"print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write", "warnings.warn"}
    calls = {ast.unparse(node.func) for node in ast.walk(MODULES[module]) if isinstance(node, ast.Call)}
    assert not calls & printing
    assert not [name for name in imports(MODULES[module]) if name.split(".")[0] in ("rich", "logging")]


@pytest.mark.parametrize("module", ["factors", "ranks", "rope", "runtime"])
def test_numerics_never_open_files(module: str) -> None:
    used = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not used & {"pathlib", "os", "io", "json", "shutil", "tempfile", "safetensors"}
    assert "checkpoint" not in {inside(name) for name in imports(MODULES[module])}
    assert not [n for n in ast.walk(MODULES[module]) if isinstance(n, ast.Call) and ast.unparse(n.func) == "open"]


@pytest.mark.parametrize("module", ["checkpoint", "writer", "sources", "whisper_files", *SOURCES])
def test_input_and_output_never_do_algebra(module: str) -> None:
    tree = MODULES[module]
    assert "torch.linalg" not in ast.unparse(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult)]


def test_nobody_imports_click() -> None:
    """typer's public API only: it carries its own copy of Click, which is not the one that a user may have."""
    names = [name for tree in MODULES.values() for name in imports(tree)]
    assert not [name for name in names if name.split(".")[0] == "click" or name.startswith("typer._")]


@pytest.mark.parametrize("module", [*NO_TORCH, *NO_TORCH_EITHER, *SOURCES])
def test_nothing_heavy_at_import(module: str) -> None:
    assert not {name.split(".")[0] for name in imports(MODULES[module], everywhere=False)} & HEAVY


def test_nothing_heavy_at_import_by_way_of_others() -> None:
    """The same, asked of Python: a module may be light itself and import a heavy one."""
    names = [
        "pessa_cli" if name == "__init__" else f"pessa_cli.{name}" for name in (*NO_TORCH, *NO_TORCH_EITHER, *SOURCES)
    ]
    code = f"import sys, {', '.join(names)}; print(sorted(sys.modules.keys() & {HEAVY!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
