"""Text in messages: lists, short forms of what a file says, and text files."""

from __future__ import annotations

from pathlib import Path

from pessa_cli.common.errors import PessaError


def listed(items: list[str], most: int = 8) -> str:
    """The items one a line and indented, cut after `most` with a count of the rest."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {item}" for item in items[:most]] + rest)


def badness(error: float) -> float:
    """An error as a measure to order by: NaN is the worst of all."""
    return float("inf") if error != error else error


def shortened(value: object) -> str:
    """A value from a file for a message: never long, and without anything that a terminal would obey."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_text(path: Path, hint: str = "give a UTF-8 text file") -> str:
    """What is in a text file. Raises PessaError, with the hint, for one that cannot be read, and for an empty one."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PessaError(f"cannot read {path}: {error}", hint) from None
    if not content.strip():
        raise PessaError(f"{path} is empty", "give a file with some text")
    return content
