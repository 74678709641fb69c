"""Packages that not every user has."""

from __future__ import annotations

from importlib.util import find_spec

from pessa_cli.common.errors import PessaError


def need(*packages: str, extra: str = "tune") -> None:
    """Raise PessaError for the first that is not installed, with the extra of pessa that brings it."""
    for package in packages:
        if find_spec(package) is None:
            raise PessaError(f"this needs {package}", f"pip install 'pessa[{extra}]'")
