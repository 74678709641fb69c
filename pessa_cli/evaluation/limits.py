"""What `pessa verify` compares, and within which limits: the one definition of its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pessa_cli.common.options import Range, check_options, option

Level = Literal["weights", "blocks", "outputs"]
ERROR = Range(
    lambda value: 0 <= value < math.inf, "is not a relative error", "give a number of at least 0, such as 1e-3"
)
SHARE = Range(lambda value: 0 <= value <= 1, "is not a share", "give a number from 0 to 1, such as 0.99")


@dataclass(frozen=True)
class VerifyOptions:
    """How deep two models are compared, and how far apart they may be. Raises UsageError for values out of range."""

    level: Level = option("outputs", "What is compared; each level includes the ones before it.")
    tolerance: float | None = option(
        None, "Largest allowed relative error; the default depends on the dtype.", allowed=ERROR
    )
    min_agreement: float | None = option(
        None, "Smallest allowed share of equal top-1 predictions; the default depends on the dtype.", allowed=SHARE
    )
    device: str = option("cpu", "Device to run both models on, e.g. cuda; the weights are compared on the CPU.")

    def __post_init__(self) -> None:
        check_options(self)
