"""The rule that determines how many directions and channels are kept: the one definition of its options."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from pessa_cli.common.errors import UsageError
from pessa_cli.common.options import Range, Setting, at_least, check_options, option, settings_of
from pessa_cli.common.values import size_of

THRESHOLD = Range(
    lambda value: 0 <= value < math.inf, "is not a threshold", "give a number of at least 0, such as 5e-3"
)
SHARE_TO_DROP = Range(
    lambda value: 0 <= value < 1, "is not a share to drop", "give a number from 0 to below 1, such as 0.3"
)
SHARE_TO_KEEP = Range(
    lambda value: 0 < value <= 1, "is not a share to keep", "give a number above 0 and at most 1, such as 0.99"
)
LENGTH = Range(
    lambda value: 0 < value <= 10**6, "is not a length", "give a number above 0 and at most 1,000,000, such as 30"
)
ERROR = Range(lambda value: 0 <= value < 1, "is not a relative error", "give a number from 0 to below 1, such as 0.01")


def _criterion(help: str, group: str = "criterion", **more: Any) -> Any:
    """An option that chooses the ranks; only those of the group "thresholds" may be combined."""
    return option(None, help, group=group, **more)


def _mlp(help: str, allowed: Range) -> Any:
    """An option that chooses the widths of MLPs; it can be combined with one that chooses the ranks of attention."""
    return option(None, help, group="MLPs", allowed=allowed)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """The rule that determines how many directions of each head, and how many channels of each MLP, are kept.

    At most one criterion may be given, and one option for MLPs beside a criterion that is not a budget.

    `qk_thr` and `vo_thr` count as one criterion; with only one of them the other side is not pruned. `ratio` applies to
    Q-K and V-O separately. The budgets `target_params`, `target_attention`, `target_layers`, `target_flops`,
    `target_size` (bytes) and `max_error` are shared by all blocks and seams: what has the lowest predicted harm per
    parameter, operation or byte is dropped first. `seconds` and `tokens` state the inputs that `target_flops` is about,
    see `ranks.work`.
    Without a criterion the rule is lossless: of each head it drops the tail whose norm is at most the rounding error of
    storing the head in its dtype, and likewise of each MLP the channels with the smallest products of weights.

    `rope_ratio` can be combined with a criterion that is not a budget. Ranks above zero are then rounded up to a
    multiple of `round_to`, and every rank is at least `min_rank`. Raises UsageError if a value is out of range or the
    options contradict each other.
    """

    qk_thr: float | None = _criterion(
        "Keep the singular values of Q-K that are above this threshold.", "thresholds", allowed=THRESHOLD
    )
    vo_thr: float | None = _criterion(
        "Keep the singular values of V-O that are above this threshold.", "thresholds", allowed=THRESHOLD
    )
    ratio: float | None = _criterion(
        "Drop this share of all directions, those with the smallest singular values.", allowed=SHARE_TO_DROP
    )
    rank: int | None = _criterion("Keep this many directions in every head.", allowed=at_least(1))
    energy: float | None = _criterion(
        "Keep this share of the sum of squared singular values of each head.", allowed=SHARE_TO_KEEP
    )
    target_params: float | None = _criterion(
        "Keep this share of the model's parameters; ranks and widths are chosen for the smallest error.",
        "budget",
        allowed=SHARE_TO_KEEP,
    )
    target_attention: float | None = _criterion(
        "Keep this share of the parameters in the chosen attention blocks; ranks are chosen for the smallest error.",
        "budget",
        allowed=SHARE_TO_KEEP,
    )
    target_layers: float | None = _criterion(
        "Keep this share of the parameters in the chosen attention blocks and MLPs; widths are chosen for the smallest "
        "error.",
        "budget",
        allowed=SHARE_TO_KEEP,
    )
    target_flops: float | None = _criterion(
        "Keep this share of the floating-point operations of the chosen blocks, for inputs of --seconds and --tokens; "
        "widths are chosen for the smallest error.",
        "budget",
        allowed=SHARE_TO_KEEP,
    )
    target_size: int | None = _criterion(
        "Prune the weights to this size, e.g. 120MB; ranks and widths are chosen for the smallest error.",
        "budget",
        metavar="SIZE",
        parse=size_of,
        allowed=at_least(1),
    )
    max_error: float | None = _criterion(
        "Largest allowed harm on held-out calibration inputs: the KL divergence of the output in nats per token, or "
        "the relative error of the hidden states of a model without a head.",
        "budget",
        allowed=ERROR,
    )
    mlp_ratio: float | None = _mlp("Drop this share of the channels of every MLP.", SHARE_TO_DROP)
    mlp_thr: float | None = _mlp(
        "Keep the channels of MLPs that are above this threshold, by the product of their weights' norms.", THRESHOLD
    )
    mlp_rank: int | None = _mlp("Keep this many channels in every MLP.", at_least(1))
    lossless: bool = option(
        False,
        "Drop only directions and channels below the rounding error of the dtype (the default).",
        group="criterion",
    )
    round_to: int = option(1, "Round ranks up to a multiple of this number.", allowed=at_least(1))
    min_rank: int = option(0, "Keep at least this many directions in every head.", allowed=at_least(0))
    uniform: bool = option(
        False, "With a budget, give all layers of a kind the same width, and all heads the same rank."
    )
    seconds: float | None = option(
        None,
        "With --target-flops, the seconds of audio that a speech model reads; by default 30.",
        allowed=LENGTH,
    )
    tokens: int | None = option(
        None,
        "With --target-flops, the tokens that a decoder writes, by default 100 in 30 seconds of audio, or that a text "
        "model reads, by default 512.",
        allowed=LENGTH,
    )
    rope_ratio: float | None = option(
        None,
        "With RoPE, also drop this share of the frequency pairs of Q-K, those with the smallest share of their head.",
        allowed=SHARE_TO_DROP,
    )

    def __post_init__(self) -> None:
        rules = list(dict.fromkeys(_title(setting) for setting in CRITERIA if self._has(setting)))
        for own in (rules, [setting.flag for setting in self.of_mlp]):
            if len(own) > 1:
                raise UsageError(f"{' and '.join(own)} cannot be combined", "give one of them")
        check_options(self)
        if self.budgeted and self.of_mlp:
            raise UsageError(
                f"{rules[0]} also chooses the widths of MLPs, so it excludes {self.of_mlp[0].flag}",
                "leave one of them out",
            )
        if self.uniform and not self.budgeted:
            raise UsageError(
                "--uniform is for a budget; --rank and --mlp-ratio give the same width to all layers anyway",
                "give a budget such as --target-params, or leave it out",
            )
        for flag, length in (("--seconds", self.seconds), ("--tokens", self.tokens)):
            if length is not None and self.target_flops is None:
                raise UsageError(
                    f"{flag} {length:g} is the length of an input for --target-flops, which is not given",
                    "give --target-flops SHARE, or leave it out",
                )
        if self.budgeted and self.rope_ratio is not None:
            raise UsageError(
                f"{self}: a budget also chooses the frequency pairs, so it excludes --rope-ratio",
                "leave out --rope-ratio",
            )

    def __str__(self) -> str:
        given = [*self.given, *(setting.name for setting in self.of_mlp)]
        criteria = [f"{name} {getattr(self, name):.12g}" for name in given if name != "lossless"]
        text = "lossless" if self.lossless or not criteria else ", ".join(criteria)
        return (
            text
            + (f", rope_ratio {self.rope_ratio:g}" if self.rope_ratio is not None else "")
            + (f", seconds {self.seconds:.12g}" if self.seconds is not None else "")
            + (f", tokens {self.tokens}" if self.tokens is not None else "")
            + (", uniform" if self.uniform else "")
            + (f", round_to {self.round_to}" if self.round_to > 1 else "")
            + (f", min_rank {self.min_rank}" if self.min_rank else "")
        )

    def _has(self, setting: Setting) -> bool:
        value = getattr(self, setting.name)
        return value is not None and value is not False  # 0 is a value like any other

    @property
    def given(self) -> list[str]:
        """The names of the criteria that are given."""
        return [setting.name for setting in CRITERIA if self._has(setting)]

    @property
    def of_mlp(self) -> list[Setting]:
        """The options for the widths of MLPs that are given; at most one."""
        return [setting for setting in OF_MLPS if self._has(setting)]

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of blocks that the rule is about if none are chosen, as `blocks.site.select` takes them.

        A budget is shared by all blocks, the options for MLPs take the MLPs, and all other rules take the attention
        blocks, as in the paper.
        """
        if self.target_attention is not None:
            return ("attention",)
        if self.budgeted:
            return ()
        kinds = ("mlp",) if self.of_mlp else ()
        return kinds + (("attention",) if self.given or not kinds else ())

    @property
    def of_attention(self) -> list[Setting]:
        """The given criteria that choose the ranks of attention alone."""
        others = ("lossless", *(budget.name for budget in BUDGETS if budget.name != "target_attention"))
        return [setting for setting in CRITERIA if self._has(setting) and setting.name not in others]

    @property
    def by_rounding(self) -> bool:
        """Whether the rounding error of the dtype is the criterion, which it also is if there is no other."""
        return self.lossless or not (self.given or self.of_mlp)

    @property
    def budgeted(self) -> bool:
        """Whether the criterion is a budget over all heads and blocks at once."""
        return any(self._has(setting) for setting in BUDGETS)

    def with_share(self, share: float) -> Rule:
        """Return the rule with this share of the chosen blocks in place of its own budget.

        It is a share of their work for `target_flops`, and of their parameters for any other budget.
        """
        name = "target_layers" if self.target_flops is None else "target_flops"
        budgets: dict[str, Any] = {budget.name: None for budget in BUDGETS}
        return replace(self, **(budgets | {name: share}))


def _title(setting: Setting) -> str:
    """The options of one rule as messages name them: "--ratio", "--qk-thr/--vo-thr"."""
    if setting.option.group != "thresholds":
        return setting.flag
    return "/".join(each.flag for each in CRITERIA if each.option.group == "thresholds")


CRITERIA = tuple(s for s in settings_of(Rule) if s.option.group in ("criterion", "thresholds", "budget"))
BUDGETS = tuple(setting for setting in CRITERIA if setting.option.group == "budget")
OF_MLPS = tuple(setting for setting in settings_of(Rule) if setting.option.group == "MLPs")
