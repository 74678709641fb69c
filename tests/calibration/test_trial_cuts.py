"""What trial cuts keep of a block, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from attention import GROUPED
from sites import spectra_by

from pessa_cli.calibration.trial_cuts import kept_at

QK, VO = np.array([[6.0, 5.0], [4.0, 0.5]]), np.array([[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]])


@pytest.mark.parametrize(
    ("share", "only", "qk", "vo"),
    [
        (0.0, None, (3, 3), (3, 3)),
        (0.25, "qk", (3, 2), (3, 3)),  # the smallest of the four directions that can be cut
        (0.5, "qk", (3, 1), (3, 3)),
        (0.75, "qk", (2, 1), (3, 3)),
        (0.5, "vo", (3, 3), (3, 0)),
        (0.5, None, (3, 1), (3, 0)),
    ],
)
def test_trial_cuts_keep_the_directions_that_are_always_kept(
    share: float, only: str | None, qk: tuple[int, ...], vo: tuple[int, ...]
) -> None:
    """One of three directions of each head is rotated; the spectrum of Q-K and the shares are of the two others."""
    partial = replace(GROUPED, unmerged=1, between="RoPE")
    kept = kept_at(partial, spectra_by(QK, VO), share, only)
    assert kept.ranks == {"qk": qk, "vo": vo}
