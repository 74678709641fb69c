"""Text for messages, such as lists and shortened values, and reading of text files."""

from __future__ import annotations

from pathlib import Path
from reprlib import Repr

from pessa_cli.common.errors import PessaError


def listed(items: list[str], most: int = 8) -> str:
    """Format items as indented lines; after the first `most` items, a last line gives the number of the others."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {item}" for item in items[:most]] + rest)


def badness(error: float) -> float:
    """Return a sort key for an error measure, in which NaN counts as infinitely large."""
    return float("inf") if error != error else error


def shortened(value: object) -> str:
    """Format a value from a file for a message, in at most 80 characters and without terminal control characters.

    The time does not grow with the value: a nested value of a few bytes can be exponentially long when it is printed.
    """
    text = _BRIEF.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


class _Brief(Repr):
    """reprlib for values from files, which may be integers with more digits than Python prints."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 200

    def repr_int(self, x: int, level: int) -> str:
        return super().repr_int(x, level) if abs(x) < 10**80 else f"an integer of {x.bit_length():,} bits"


_BRIEF = _Brief()


def read_text(path: Path, hint: str = "give a UTF-8 text file") -> str:
    """Return the content of a UTF-8 text file.

    Raises PessaError, with `hint`, if the file cannot be read, and PessaError if it is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PessaError(f"cannot read {path}: {error}", hint) from None
    if not content.strip():
        raise PessaError(f"{path} is empty", "give a file that contains text")
    return content
