"""The limits that verify takes."""

from __future__ import annotations

import math

from pessa_cli.common.errors import UsageError


def check_limits(tolerance: float | None, min_agreement: float | None) -> None:
    """Raise UsageError for limits that nothing or everything would meet."""
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"--tolerance {tolerance:g} is no error to allow", "give a number from 0 up, as 1e-3")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement:g} is no share", "give a number from 0 to 1, as 0.99")
