"""The exceptions and warnings for users: each names the culprit and, where there is one, the next step."""

from __future__ import annotations


class PessaError(Exception):
    """A failure that the user can act on.

    `message` says what happened and where; `hint` says what to do next.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PessaError):
    """An option with an invalid value, or options that contradict each other; the command line exits with status 2."""


class PessaWarning(UserWarning):
    """Something in a model is wrong or was ignored, and the model can be used nevertheless."""
