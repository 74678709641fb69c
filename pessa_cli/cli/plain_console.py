"""A console of rich on which names and values from files are shown as they are."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pessa_cli.common.text import visible

WIDEST = 10_000  # characters of a row


class PlainConsole(Console):
    """A console on which every text, in a table or not, is shown as it is: without markup, and with `visible` escapes.

    Names and values from files can so neither steer a terminal nor be taken for what they are not. What is styled is a
    `Text`, made by `styled`.
    """

    def __init__(self, stderr: bool = False) -> None:
        # Lines are wrapped by the terminal and not by rich, so that long lines stay whole in pipes and files.
        super().__init__(stderr=stderr, highlight=False, soft_wrap=True, markup=False, emoji=False)

    def print_whole(self, table: Table) -> None:
        """Print a table as wide as its contents, so that no name or number in it is cut or wrapped."""
        table.width = self.measure(table, options=self.options.update(max_width=WIDEST)).maximum
        self.print(table)

    def render_str(self, text: str, **options: Any) -> Text:
        """Turn a string that is printed into a `Text`: rich's place for that."""
        return super().render_str(visible(text), **options)


def styled(*parts: str | tuple[str, str]) -> Text:
    """Return a `Text` of texts, and of pairs of a text and its style."""
    return Text.assemble(*(visible(part) if isinstance(part, str) else (visible(part[0]), part[1]) for part in parts))
