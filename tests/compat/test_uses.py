"""The names of other libraries that pessa relies on: each is in the installed version, and only `compat` uses them."""

from __future__ import annotations

import ast
from importlib import import_module
from typing import Any

import pytest
from packages import SOURCE

from pessa_cli.compat.uses import BERT_ATTENTION, USES, WHISPER_ATTENTION, Use, change_of, changes

LIBRARIES = (
    "accelerate",
    "gguf",
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
)
ALL = (*LIBRARIES, "transformers", "typer", "whisper", "wrapt")
# Modules that are not documented, but of which `compat` alone imports what is used.
ONLY_IN_COMPAT = (
    *("transformers.quantizers", "transformers.pytorch_utils", "transformers.conversion_mapping"),
    *("transformers.core_model_loading", "transformers.modeling_utils", "transformers.utils.quantization_config"),
    *("transformers.models.bert", "transformers.models.whisper.modeling_whisper", "transformers.trainer_callback"),
    *("peft.utils", "peft.mapping", "peft.tuners.lora", "peft.tuners._buffer_dict", "whisper.model"),
)
# torch's own trees of tensors, which have no public name; a test of trial cuts runs them. A type of the public API.
EXCEPTIONS = {("calibration/trial_cuts.py", "torch.utils._pytree"), ("api.py", "whisper.model")}
FILES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}


@pytest.mark.parametrize("library", USES)
def test_the_installed_version_has_all_that_is_used(library: str) -> None:
    assert changes(library) == []


def test_negative_control_changes_are_named() -> None:
    missing = Use("transformers.pytorch_utils", "Conv2D")
    assert "transformers.pytorch_utils.Conv2D" in str(change_of(missing))
    assert "no_such_module" in str(change_of(Use("no_such_module", "name")))
    swapped = Use(WHISPER_ATTENTION.module, WHISPER_ATTENTION.name, ("self", "key_value_states", "hidden_states"))
    assert "key_value_states" in str(change_of(swapped))
    assert "no parameter renamed" in str(
        change_of(Use("peft.tuners.tuners_utils", "check_adapters_to_merge", (), ("renamed",)))
    )


def imported(tree: ast.AST) -> list[tuple[str, str]]:
    """Return the modules that a file imports from, with the names."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    found = [(str(node.module), alias.name) for node in nodes for alias in node.names]
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    return found + [(alias.name, "") for node in plain for alias in node.names]


def by_name(call: ast.Call) -> list[str]:
    """Return the private names of attributes that a call reads as `getattr` does, and of its keywords."""
    found = [keyword.arg or "" for keyword in call.keywords]
    if isinstance(call.func, ast.Name) and call.func.id in ("getattr", "hasattr", "setattr"):
        found += [str(node.value) for node in call.args[1:2] if isinstance(node, ast.Constant)]
    return [name for name in found if name.startswith("_") and not name.startswith("__")]


@pytest.mark.parametrize("file", [file for file in FILES if not file.startswith("compat/")])
def test_only_compat_uses_private_names(file: str) -> None:
    """A private name begins with an underscore and is not one that the file itself defines."""
    tree = FILES[file]
    ours = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    # An attribute of `self` or of an object of the same file's class is assigned or declared there.
    ours |= {node.attr for node in attributes if isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"}
    foreign = {node.attr for node in attributes if node.attr.startswith("_") and not node.attr.startswith("__")} - ours
    foreign |= {name for node in ast.walk(tree) if isinstance(node, ast.Call) for name in by_name(node)}
    assert foreign - {"_apply"} == set(), "move it into pessa_cli/compat"
    for module, name in imported(tree):
        if module.split(".")[0] in ALL and (file, module) not in EXCEPTIONS:
            assert not any(part.startswith("_") for part in (*module.split("."), name)), f"{module}.{name}"
            assert not module.startswith(ONLY_IN_COMPAT), f"{module}.{name}"


def test_the_list_has_what_compat_imports() -> None:
    """Everything that compat imports from modules that are not documented, and the private names that it reads."""
    listed = {(use.module, use.name.split(".")[0]) for uses in USES.values() for use in uses}
    private = {part for uses in USES.values() for use in uses for part in use.name.split(".") if part.startswith("_")}
    for file in (file for file in FILES if file.startswith("compat/for_")):
        for module, name in imported(FILES[file]):
            if module.startswith((*ONLY_IN_COMPAT, "peft.tuners", "whisper")):
                assert (module, name) in listed, f"{module}.{name} is missing in compat/uses.py"
        for node in ast.walk(FILES[file]):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_"):
                assert node.name in private, f"{node.name} is missing in compat/uses.py"


def test_attention_with_another_signature_keeps_its_stock_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module that bucketed attention would replace is left alone, and computes with slots of head_dim."""
    import sys

    for use in (WHISPER_ATTENTION, BERT_ATTENTION):
        stock: Any = getattr(import_module(use.module), use.name.split(".")[0])

        def forward(self: Any, key_value_states: Any, hidden_states: Any) -> None: ...

        original = import_module("pessa_cli.runtime.patched_attention")
        with monkeypatch.context() as patched:
            patched.setattr(stock, "forward", forward)
            patched.delitem(sys.modules, "pessa_cli.runtime.patched_attention")
            assert stock not in import_module("pessa_cli.runtime.patched_attention").PATCHED
        assert stock in original.PATCHED
