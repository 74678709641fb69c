"""Checks for optional packages."""

from __future__ import annotations

from importlib.util import find_spec

from pessa_cli.common.errors import PessaError


def need(*packages: str, extra: str = "tune") -> None:
    """Raise PessaError if one of these packages is not installed; the hint names the pessa extra that installs it."""
    for package in packages:
        if find_spec(package) is None:
            raise PessaError(f"this needs {package}", f"pip install 'pessa[{extra}]'")
