"""Re-exports of a package that are imported on first use, so that importing the package stays fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazy_exports(package: str, modules: Mapping[str, Sequence[str]]) -> tuple[Callable[[str], Any], list[str]]:
    """Return `__getattr__` and `__all__` of a package that re-exports names of its modules (PEP 562).

    package: the `__name__` of the package. modules: the names by the module that defines them. A name must not be that
    of a module of the package, because importing the module would replace it. For type checkers, the package imports
    the same names under TYPE_CHECKING.
    """
    places = {name: module for module, names in modules.items() for name in names}

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{places[name]}"), name)

    return get, sorted(places)
