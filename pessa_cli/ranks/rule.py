"""The rule that determines how many directions of each head are kept, and parsers for sizes and layers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from pessa_cli.common.errors import UsageError
from pessa_cli.common.text import shortened


@dataclass(frozen=True)
class Rule:
    """The rule that determines how many directions of each head are kept. At most one criterion may be given.

    qk_thr, vo_thr: keep the singular values of Q-K and V-O above these thresholds; with only one of them the other side
    is not pruned. These two count as one criterion.
    ratio: drop this share of all directions, the smallest first, separately for Q-K and V-O.
    rank: keep this many directions of every head.
    energy: keep this share of each head's squared spectrum.
    target_params, target_attention: keep this share of all parameters, or of the parameters of the chosen attention
    blocks. target_size: reduce the weights to this many bytes. max_error: keep the relative error of every block's
    output on the calibration data at or below this. These four are budgets over all blocks and both sides: the
    directions with the lowest predicted cost per parameter are dropped first.
    Without a criterion the rule is lossless: it drops the tail whose norm is at most the rounding error of storing the
    head in its dtype.
    rope_ratio: for Q-K under RoPE, drop this share of all frequency pairs, the smallest first, each measured as a share
    of its head. It can be combined with a criterion that is not a budget.
    Ranks above zero are then rounded up to a multiple of `round_to`, and every rank is at least `min_rank`.
    Raises UsageError if a value is out of range or the options contradict each other.
    """

    qk_thr: float | None = None
    vo_thr: float | None = None
    ratio: float | None = None
    rank: int | None = None
    energy: float | None = None
    target_params: float | None = None
    target_attention: float | None = None
    target_size: int | None = None
    max_error: float | None = None
    round_to: int = 1
    min_rank: int = 0
    rope_ratio: float | None = None

    def __post_init__(self) -> None:
        ways = {"--qk-thr/--vo-thr": self.qk_thr is not None or self.vo_thr is not None}
        ways |= {_flag(name): getattr(self, name) is not None for name in WAYS if not name.endswith("_thr")}
        given = [way for way, on in ways.items() if on]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} cannot be combined", "give one of them")
        for flag, value in (("--qk-thr", self.qk_thr), ("--vo-thr", self.vo_thr)):
            if value is not None and not (0 <= value < math.inf):
                raise UsageError(f"{flag} {value} is not a threshold", "give a number of at least 0, such as 5e-3")
        for flag, share in (("--ratio", self.ratio), ("--rope-ratio", self.rope_ratio)):
            if share is not None and not 0 <= share < 1:
                raise UsageError(
                    f"{flag} {share} is not a share to drop", "give a number from 0 to below 1, such as 0.3"
                )
        for name in ("energy", "target_params", "target_attention"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UsageError(
                    f"{_flag(name)} {share} is not a share to keep", "give a number above 0 and at most 1, such as 0.99"
                )
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise UsageError(
                f"--max-error {self.max_error} is not a relative error", "give a number of at least 0, such as 0.01"
            )
        if self.budgeted and self.rope_ratio is not None:
            raise UsageError(
                f"{self}: a budget also chooses the frequency pairs, so it excludes --rope-ratio",
                "leave out --rope-ratio",
            )
        for flag, count, least in (
            ("--target-size", self.target_size, 1),
            ("--rank", self.rank, 1),
            ("--round-to", self.round_to, 1),
            ("--min-rank", self.min_rank, 0),
        ):
            if count is not None and count < least:
                raise UsageError(f"{flag} {count} is too small", f"give {least} or more")

    def __str__(self) -> str:
        ways = {name: getattr(self, name) for name in WAYS}
        text = ", ".join(f"{name} {value:.12g}" for name, value in ways.items() if value is not None) or "lossless"
        return (
            text
            + (f", rope_ratio {self.rope_ratio:g}" if self.rope_ratio is not None else "")
            + (f", round_to {self.round_to}" if self.round_to > 1 else "")
            + (f", min_rank {self.min_rank}" if self.min_rank else "")
        )

    @property
    def given(self) -> list[str]:
        """The names of the criteria that are given."""
        return [name for name in WAYS if getattr(self, name) is not None]

    @property
    def budgeted(self) -> bool:
        """Whether the criterion is a budget over all heads and blocks at once."""
        budgets = (self.target_params, self.target_attention, self.target_size, self.max_error)
        return any(budget is not None for budget in budgets)


WAYS = (
    *("qk_thr", "vo_thr", "ratio", "rank", "energy"),
    *("target_params", "target_attention", "target_size", "max_error"),
)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


MOST_PARTS = 200  # the most commas in a list of layers


def size_of(text: str, flag: str) -> int:
    """Parse a size such as 5GB or "1.5 MB" into bytes, with decimal units. Raises UsageError for any other text."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(kB|KB|MB|GB|TB)", text)
    if match is None:
        raise UsageError(f"{flag} {shortened(text)} is not a size", "write it as 5GB or 500MB")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2][0].upper()])


def parse_layers(text: str) -> frozenset[int]:
    """Parse a list of layers such as "3", "0-15" or "0-3,12,20-23". Raises UsageError for any other text."""
    layers: set[int] = set()
    wrong = UsageError(f"--layers {shortened(text)} is not a list of layers", "write it as 0-15 or 0-3,12")
    if text.count(",") > MOST_PARTS:
        raise wrong
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise wrong
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)
