"""The `pessa` command: its subcommands, their options, and the only module that prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.cli.main import app as app
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "main": ["app"],
        },
    )
