"""What can go wrong for a user: every error names the culprit and, where there is one, the next step."""

from __future__ import annotations


class PessaError(Exception):
    """A failure the user can act on: what happened and where, and a hint that says what to do next."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PessaError):
    """Options that make no sense, alone or together; the command line exits with 2."""
