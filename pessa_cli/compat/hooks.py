"""Import hooks that cannot break the import of the library that they wait for."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import metadata

from pessa_cli.common.version import VERSION


def guarded(library: str, purpose: str, register: Callable[[], None]) -> Callable[[object], None]:
    """Return a hook for `wrapt` that calls `register`, and warns if that fails.

    An exception in such a hook would make the import of the library fail for the whole program, also where the program
    makes no use of pessa. purpose: what does not work without the registration.
    """

    def hook(_module: object) -> None:
        try:
            register()
        except Exception as error:  # whatever another release of the library has changed
            warnings.warn(
                f"pessa {VERSION} does not work with {library} {metadata.version(library)}, so {purpose}: "
                f"{type(error).__name__}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )

    return hook
