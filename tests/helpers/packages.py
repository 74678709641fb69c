"""The order of pessa's packages, lowest first: each may import only from itself and the packages before it.

The import test and the documentation both read it from here. The purpose of a package is the first sentence of its
`__init__.py`.
"""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "pessa_cli"
PACKAGES = (
    "common",
    "compat",
    "checkpoint",
    "blocks",
    "sources",
    "algebra",
    "ranks",
    "statistics",
    "surgery",
    "runtime",
    "models",
    "calibration",
    "evaluation",
    "tuning",
    "exports",
    "workflow",
    "cli",
)


def purpose(package: str) -> str:
    """Return the purpose of a package in one sentence."""
    docstring = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())
