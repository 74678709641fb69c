"""Text for messages, such as lists and shortened values, and reading of text files."""

from __future__ import annotations

from pathlib import Path

from pessa_cli.common.errors import PessaError


def listed(items: list[str], most: int = 8) -> str:
    """Format items as indented lines; after the first `most` items, a last line gives the number of the others."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {item}" for item in items[:most]] + rest)


def badness(error: float) -> float:
    """Return a sort key for an error measure, in which NaN counts as infinitely large."""
    return float("inf") if error != error else error


def shortened(value: object) -> str:
    """Format a value from a file for a message, in at most 80 characters and without terminal control characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def read_text(path: Path, hint: str = "give a UTF-8 text file") -> str:
    """Return the content of a UTF-8 text file.

    Raises PessaError, with `hint`, if the file cannot be read, and PessaError if it is empty.
    """
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PessaError(f"{path} does not exist", hint) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PessaError(f"cannot read {path}: {error}", hint) from error
    if not content.strip():
        raise PessaError(f"{path} is empty", "give a file that contains text")
    return content
