"""The rule that says how many directions of each head to keep: the one definition of its options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pessa_cli.common.errors import UsageError
from pessa_cli.common.options import Range, Setting, at_least, check_options, option, settings_of
from pessa_cli.common.values import size_of

THRESHOLD = Range(lambda value: 0 <= value < math.inf, "is not a threshold", "give a number from 0 up, e.g. 5e-3")
SHARE_TO_DROP = Range(
    lambda value: 0 <= value < 1, "would leave nothing", "give the share to drop, from 0 to below 1, e.g. 0.1"
)
SHARE_TO_KEEP = Range(
    lambda value: 0 < value <= 1, "is not a share", "give the share to keep, above 0 and at most 1, e.g. 0.99"
)
ERROR = Range(lambda value: 0 <= value < math.inf, "is not an error limit", "give a number from 0 up, e.g. 0.01")


def _way(help: str, group: str = "way", **more: Any) -> Any:
    """An option that chooses the ranks, alone or with those of a group; budgets are ways as well."""
    return option(None, help, group=group, **more)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How many directions of each head to keep.

    At most one way of choosing them may be given; `qk_thr` and `vo_thr` count as one, and one of them alone leaves the
    other product at full rank. None of them means lossless: drop the tail of each spectrum whose norm is no larger
    than the rounding error of storing the head in its dtype. The fields say what each of them does.

    `rope_ratio` goes with any way but a budget. Ranks above zero are then rounded up to a multiple of `round_to`, and
    are at least `min_rank`. Raises UsageError for values out of range and for more than one way.
    """

    qk_thr: float | None = _way(
        "Keep the singular values of Q-K that are above this threshold.", "thresholds", allowed=THRESHOLD
    )
    vo_thr: float | None = _way(
        "Keep the singular values of V-O that are above this threshold.", "thresholds", allowed=THRESHOLD
    )
    ratio: float | None = _way(
        "Drop this share of all directions, those with the smallest singular values.", allowed=SHARE_TO_DROP
    )
    rank: int | None = _way("Keep this many directions in every head.", allowed=at_least(1))
    energy: float | None = _way(
        "Keep this share of the sum of squared singular values of each head.", allowed=SHARE_TO_KEEP
    )
    target_params: float | None = _way(
        "Keep this share of the model's parameters; ranks are chosen for the smallest error.",
        "budget",
        allowed=SHARE_TO_KEEP,
    )
    target_attention: float | None = _way(
        "Keep this share of the parameters in the chosen attention blocks; ranks are chosen for the smallest error.",
        "budget",
        allowed=SHARE_TO_KEEP,
    )
    target_size: int | None = _way(
        "Prune the weights to this size, e.g. 120MB; ranks are chosen for the smallest error.",
        "budget",
        metavar="SIZE",
        parse=size_of,
        allowed=at_least(1),
    )
    max_error: float | None = _way(
        "Largest allowed relative error of any block's output on the calibration data.", "budget", allowed=ERROR
    )
    lossless: bool = option(
        False, "Drop only directions below the rounding error of the dtype (the default).", group="way"
    )
    round_to: int = option(1, "Round ranks up to a multiple of this number.", allowed=at_least(1))
    min_rank: int = option(0, "Keep at least this many directions in every head.", allowed=at_least(0))
    rope_ratio: float | None = option(
        None,
        "With RoPE, also drop this share of the frequency pairs of Q-K, those with the smallest share of their head.",
        allowed=SHARE_TO_DROP,
    )

    def __post_init__(self) -> None:
        rules = list(dict.fromkeys(_title(setting) for setting in WAYS if self._has(setting)))
        if len(rules) > 1:
            raise UsageError(f"{' and '.join(rules)} are different rules", "give one of them")
        check_options(self)
        if self.budgeted and self.rope_ratio is not None:
            raise UsageError(f"{self}: a budget chooses the frequency pairs as well", "leave out --rope-ratio")

    def __str__(self) -> str:
        ways = [f"{setting.name} {getattr(self, setting.name):.12g}" for setting in WAYS if self._has(setting)]
        text = "lossless" if self.lossless or not ways else ", ".join(ways)
        return (
            text
            + (f", rope_ratio {self.rope_ratio:g}" if self.rope_ratio is not None else "")
            + (f", round_to {self.round_to}" if self.round_to > 1 else "")
            + (f", min_rank {self.min_rank}" if self.min_rank else "")
        )

    def _has(self, setting: Setting) -> bool:
        return getattr(self, setting.name) not in (None, False)

    @property
    def given(self) -> list[str]:
        """The names of the fields that choose the ranks, as far as they are set."""
        return [setting.name for setting in WAYS if self._has(setting)]

    @property
    def budgeted(self) -> bool:
        """Whether ranks are chosen for all heads and blocks together."""
        return any(setting.option.group == "budget" and self._has(setting) for setting in WAYS)


def _title(setting: Setting) -> str:
    """The options of one rule as messages name them: "--ratio", "--qk-thr/--vo-thr"."""
    if setting.option.group != "thresholds":
        return setting.flag
    return "/".join(way.flag for way in WAYS if way.option.group == "thresholds")


WAYS = tuple(setting for setting in settings_of(Rule) if setting.option.group is not None)
