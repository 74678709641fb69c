"""Checks of the limits that `pessa verify` takes."""

from __future__ import annotations

import math

from pessa_cli.common.errors import UsageError


def check_limits(tolerance: float | None, min_agreement: float | None) -> None:
    """Raise UsageError for a limit that every model or no model could meet."""
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(
            f"--tolerance {tolerance:g} is not a relative error", "give a finite number of 0 or more, for example 1e-3"
        )
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement:g} is not a share", "give a number from 0 to 1, as 0.99")
