"""Where the program raises its errors, from its source, and which of these places an example has come by."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from packages import SOURCE

from pessa_cli.common import errors

ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.PessaError)}
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}
SCRIPTS = {
    f"scripts.{path.stem}": ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted((SOURCE.parent / "scripts").glob("*.py"))
}


@dataclass(frozen=True)
class Place:
    """A call that makes an error: where it is, and whether it is given a hint."""

    module: str
    function: str
    line: int
    error: str
    hinted: bool

    def __str__(self) -> str:
        return f"{self.module}.{self.function}, line {self.line}"


def functions(tree: ast.AST, name: str = "") -> Iterator[tuple[str, ast.AST]]:
    """Every node with the name of the function that it stands in, methods as Class.method."""
    for node in ast.iter_child_nodes(tree):
        inner = name
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            inner = f"{name}.{node.name}".lstrip(".")
        yield inner, node
        yield from functions(node, inner)


def places() -> list[Place]:
    """Every call of one of the program's error classes but their own constructors, in the order of the source."""
    found = []
    for module, tree in MODULES.items():
        for function, node in functions(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ERRORS:
                hinted = len(node.args) > 1 or any(keyword.arg == "hint" for keyword in node.keywords)
                found.append(Place(module, function, node.lineno, node.func.id, hinted))
    return found


def hiding(modules: Mapping[str, ast.Module]) -> list[str]:
    """The module and function of every `raise ... from None`."""
    return [
        f"{module}.{function}"
        for module, tree in modules.items()
        for function, node in functions(tree)
        if isinstance(node, ast.Raise) and isinstance(node.cause, ast.Constant)
    ]


@contextmanager
def noting() -> Iterator[set[tuple[str, int]]]:
    """The modules and lines in which errors are made while inside; those that hand another's error on count, too."""
    seen: set[tuple[str, int]] = set()
    make = errors.PessaError.__init__

    def noted(self: errors.PessaError, message: str, hint: str | None = None) -> None:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_code.co_name == "__init__" and "self" in frame.f_locals:
            if not isinstance(frame.f_locals["self"], errors.PessaError):
                break  # a class of the program that refuses to be made, not a class of errors
            frame = frame.f_back
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(SOURCE):
            seen.add((".".join(path.relative_to(SOURCE).with_suffix("").parts), frame.f_lineno))
        make(self, message, hint)

    errors.PessaError.__init__ = noted  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        errors.PessaError.__init__ = make  # type: ignore[method-assign]
