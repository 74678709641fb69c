"""Text for messages, such as lists and shortened values, and reading of text files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from reprlib import Repr

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size


def listed(items: list[str], most: int = 8) -> str:
    """Format items as indented lines; after the first `most` items, a last line gives the number of the others."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {item}" for item in items[:most]] + rest)


def badness(error: float) -> float:
    """Return a sort key for an error measure, in which NaN counts as infinitely large."""
    return float("inf") if error != error else error


def visible(text: str) -> str:
    r"""Replace what a terminal, a report or XML does not show as itself by its escape, such as \x1b, \u202e or \ud800.

    These are control characters, marks of the direction of writing, lone surrogates, and line breaks but those before
    the indented lines that `listed` makes: a name cannot add a line that looks like one of ours.
    """
    return _UNSEEN.sub(lambda found: _escaped(found[0]), text)


def json_text(value: object, indent: int | None = 2) -> str:
    """Return JSON in which the characters that `visible` replaces are escaped, so that it holds the same value."""
    return _UNSEEN.sub(
        lambda found: found[0] if found[0] == "\n" else json.dumps(found[0])[1:-1],
        json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=True),
    )


def _escaped(character: str) -> str:
    return character if character.isprintable() else repr(character)[1:-1]


# Printable characters and indented lines stay; \w and space are the printable ones that are found fastest.
_UNSEEN = re.compile(r"[^\w !-~\n]|\n(?!  )")


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
        file_size(path)  # a pipe or a device may never end
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PessaError(f"{path} does not exist", hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PessaError(f"cannot read {path}: {error}", hint) from error
    if not content.strip():
        raise PessaError(f"{path} is empty", "give a file that contains text")
    return content
