"""Collecting calibration statistics by running calibration data through a model, and trial cuts of its blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.calibration.collect import FOLDS as FOLDS
    from pessa_cli.calibration.collect import calibration_for as calibration_for
    from pessa_cli.calibration.trial_cuts import set_block as set_block
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "collect": ["FOLDS", "calibration_for"],
            "trial_cuts": ["set_block"],
        },
    )
