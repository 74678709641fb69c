"""The order of the packages of pessa, lowest first: each imports only from those before it, and from itself.

The test of the imports and the documentation both read it here. What belongs into a package its own `__init__.py` says
in its first sentence.
"""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2] / "pessa_cli"
PACKAGES = (
    "common",
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
    """What belongs into a package, in a sentence."""
    docstring = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.partition("\n\n")[0].split())
