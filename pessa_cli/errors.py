"""What can go wrong for a user: every error names the culprit and, where there is one, the next step."""


class PessaError(Exception):
    """A failure the user can act on: what happened and where, and a hint that says what to do next."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(PessaError):
    """Options that make no sense, alone or together; the command line exits with 2."""


def listed(items: list[str], most: int = 8) -> str:
    """The items one a line and indented, cut after `most` with a count of the rest."""
    rest = [f"  ... and {len(items) - most} more"] if len(items) > most else []
    return "\n".join([f"  {item}" for item in items[:most]] + rest)


def badness(error: float) -> float:
    """An error as a measure to order by: NaN is the worst of all."""
    return float("inf") if error != error else error
