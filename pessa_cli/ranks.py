"""From spectra and a rule to ranks. Pure numbers: no files, no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pessa_cli.errors import PessaError, UsageError
from pessa_cli.ragged import Pairs, Ranks, pair_ranks
from pessa_cli.sites import Site, with_ranks

Spectrum = NDArray[np.float64]

# Half the distance from 1 to the next number: the relative error of storing one weight.
UNIT_ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}

# Half the distance between a dtype's smallest numbers: the error of storing one weight, however small it is.
UNDERFLOW = {"F64": 0.0, "F32": 2.0**-150, "F16": 2.0**-25, "BF16": 2.0**-134}

LEVELS = (0.125, 0.25, 0.5, 0.75)  # shares of a block's directions that trials cut


@dataclass(frozen=True)
class Trials:
    """What cutting a block does on real inputs, measured.

    qk, vo: the relative squared errors of its output with LEVELS of the directions of one side cut, the smallest first.
    harm: what a relative squared error of 1 would do to the output of the whole model, small errors extrapolated.
    """

    qk: tuple[float, ...]
    vo: tuple[float, ...]
    harm: float


class Size(NamedTuple):
    """Of a whole model."""

    parameters: int
    nbytes: int


@dataclass(frozen=True)
class Spectra:
    """The spectra of one block, (G, d) each and descending; of Q-K what merges, and none where nothing does.

    Singular values of the products, or where `calibrated` what real inputs make of them: in units of the attention
    scores for Q-K, and of what is added to the residual stream for V-O. `pairs`, (G, d/2), only where a rotation keeps
    Q-K from being merged: what each frequency pair adds to the output, squared, in the order of the file; see `rope`.
    """

    qk: Spectrum | None
    vo: Spectrum
    calibrated: bool = False
    trials: Trials | None = None
    pairs: Spectrum | None = None


@dataclass(frozen=True)
class Rule:
    """How many directions of each head to keep. At most one way may be given; none means lossless.

    qk_thr, vo_thr: keep singular values above (Q-K and V-O apart; one alone leaves the other side whole).
    ratio: drop that share of all directions, the smallest first, Q-K and V-O apart.
    rank: keep so many in every head. energy: keep that share of each head's squared spectrum.
    target_params, target_attention: keep that share of all parameters, and of those of the chosen blocks' attention;
    target_size: keep the weights' bytes at that; max_error: keep the relative error of every block's output on the
    calibration data at that. What goes is what costs least for each parameter, over all blocks and both sides.
    lossless: drop the tail whose norm is no more than what storing the head in its dtype rounds off anyway.
    rope_ratio, beside any of these: under RoPE, drop that share of all frequency pairs of Q-K, the smallest first, each
    taken as a share of its head.
    Then ranks above zero are rounded up to a multiple of `round_to`, and none is under `min_rank`.
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
            raise UsageError(f"{' and '.join(given)} are different rules", "give one of them")
        for flag, value in (("--qk-thr", self.qk_thr), ("--vo-thr", self.vo_thr)):
            if value is not None and not (0 <= value < math.inf):
                raise UsageError(f"{flag} {value} is no threshold", "give a number from 0 up, as 5e-3")
        for flag, share in (("--ratio", self.ratio), ("--rope-ratio", self.rope_ratio)):
            if share is not None and not 0 <= share < 1:
                raise UsageError(f"{flag} {share} would not leave a model", "give the share to drop, from 0 to below 1")
        for name in ("energy", "target_params", "target_attention"):
            share = getattr(self, name)
            if share is not None and not 0 < share <= 1:
                raise UsageError(f"{_flag(name)} {share} is no share", "give the share to keep, above 0 to 1, as 0.99")
        if self.max_error is not None and not 0 <= self.max_error < math.inf:
            raise UsageError(f"--max-error {self.max_error} is no error to allow", "give a number from 0 up, as 0.01")
        if self.budgeted and self.rope_ratio is not None:
            raise UsageError(f"{self}: a budget shares out the frequency pairs, too", "leave out --rope-ratio")
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
        """The ways that it names."""
        return [name for name in WAYS if getattr(self, name) is not None]

    @property
    def budgeted(self) -> bool:
        """Whether ranks are shared out over all heads and blocks at once."""
        budgets = (self.target_params, self.target_attention, self.target_size, self.max_error)
        return any(budget is not None for budget in budgets)


WAYS = (
    *("qk_thr", "vo_thr", "ratio", "rank", "energy"),
    *("target_params", "target_attention", "target_size", "max_error"),
)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class RankPlan:
    """The ranks to keep, by site name: one a key/value head, for Q-K and for V-O.

    pairs: under RoPE which frequency pairs those of Q-K are, for blocks that keep less than all.
    """

    qk: Mapping[str, Ranks]
    vo: Mapping[str, Ranks]
    pairs: Mapping[str, tuple[Pairs, ...]] = field(default_factory=dict)

    @staticmethod
    def stored(sites: Iterable[Site]) -> RankPlan:
        """What the file stores of these sites."""
        sites = list(sites)
        pairs = {site.name: site.pairs for site in sites if site.pairs is not None}
        return RankPlan(
            {site.name: site.qk_ranks for site in sites}, {site.name: site.vo_ranks for site in sites}, pairs
        )

    def kept(self, site: Site) -> Site:
        """The site as a compact file stores what is kept of it."""
        return with_ranks(site, self.qk[site.name], self.vo[site.name], self.pairs.get(site.name))


def plan_ranks(sites: list[Site], spectra: Mapping[str, Spectra], rule: Rule) -> RankPlan:
    """A rule without a budget applied to every site. Raises PessaError when it would prune all of Q-K or of V-O."""
    qk = {site.name: spectra[site.name].qk for site in sites}
    vo = {site.name: spectra[site.name].vo for site in sites}
    dtypes = {site.name: site.dtype for site in sites}
    before = {site.name: site.before for site in sites}
    rotated = [site for site in sites if qk[site.name] is None]
    pairs = _pairs(rotated, spectra, rule)
    return RankPlan(
        qk={
            name: tuple(before[name] + rank for rank in ranks)
            for name, ranks in _side(
                {name: spectrum for name, spectrum in qk.items() if spectrum is not None}, dtypes, rule, "Q-K"
            ).items()
        }
        | {site.name: pair_ranks(pairs[site.name]) if site.name in pairs else site.full for site in rotated},
        vo=_side(vo, dtypes, rule, "V-O"),
        pairs=pairs,
    )


def largest_pairs(contributions: Spectrum, counts: NDArray[np.int64]) -> tuple[Pairs, ...]:
    """The `counts`, (G,), pairs of each head that contribute most; contributions: (G, d/2). Of equal ones the first."""
    order = np.argsort(-contributions, axis=-1, kind="stable")
    return tuple(_runs(np.sort(row[:count])) for row, count in zip(order, counts, strict=True))


def pair_shares(contributions: Spectrum) -> Spectrum:
    """What pairs are worth as shares of their heads, (G, d/2).

    They measured better than the contributions: later blocks add more to a larger residual stream.
    """
    whole = contributions.sum(-1, keepdims=True)
    return contributions / np.where(whole > 0, whole, 1.0)


def _runs(places: NDArray[np.int64]) -> Pairs:
    """Ascending numbers as runs."""
    parts = np.split(places, np.flatnonzero(np.diff(places) > 1) + 1)
    return tuple(range(int(part[0]), int(part[-1]) + 1) for part in parts if len(part))


def _pairs(sites: list[Site], spectra: Mapping[str, Spectra], rule: Rule) -> dict[str, tuple[Pairs, ...]]:
    """The frequency pairs that the rule keeps, of blocks that keep less than all; what the file lacks stays away."""
    if rule.rope_ratio is None:
        return {site.name: site.pairs for site in sites if site.pairs is not None}
    worth = {site.name: found for site in sites if (found := spectra[site.name].pairs) is not None}
    if not worth:
        raise UsageError("--rope-ratio: none of these blocks rotates its queries and keys", "leave it out")
    shares = {name: pair_shares(found) for name, found in worth.items()}
    plan: dict[str, tuple[Pairs, ...]] = {}
    for name, counts in smallest_dropped(shares, rule.rope_ratio).items():
        width = 2 * worth[name].shape[1]
        kept = -(-_rounded(2 * counts, rule, width) // 2)
        there = (worth[name] > 0).sum(-1)  # the others are nothing already
        pairs = largest_pairs(worth[name], np.minimum(kept, there))
        if sum(pair_ranks(pairs)) < width * len(pairs):
            plan[name] = pairs
    return plan


def _rounded(kept: NDArray[np.int64], rule: Rule, width: int) -> NDArray[np.int64]:
    """Ranks of heads of that width as `round_to` and `min_rank` want them."""
    step, least = min(rule.round_to, width), min(rule.min_rank, width)  # numpy refuses numbers beyond 64 bits
    return (-(-kept // step) * step).clip(least, width)


def _side(spectra: Mapping[str, Spectrum], dtypes: Mapping[str, str], rule: Rule, what: str) -> dict[str, Ranks]:
    if not spectra:
        return {}
    if rule.ratio is not None:
        counts = smallest_dropped(spectra, rule.ratio)
    else:
        counts = {name: _keep(spectrum, rule, what, dtypes[name]) for name, spectrum in spectra.items()}
    plan: dict[str, Ranks] = {}
    for name, kept in counts.items():
        plan[name] = tuple(int(r) for r in _rounded(kept, rule, spectra[name].shape[1]))
    if not any(any(ranks) for ranks in plan.values()):
        largest = max(float(spectrum.max()) for spectrum in spectra.values())
        raise PessaError(
            f"the rule ({rule}) prunes all of {what}: the largest singular value is {largest:.3g}",
            "lower the threshold; `pessa inspect` shows the spectra",
        )
    return plan


def _keep(spectrum: Spectrum, rule: Rule, what: str, dtype: str) -> NDArray[np.int64]:
    """How many leading directions each head keeps, (G,), under a rule that looks at one head at a time."""
    heads, width = spectrum.shape
    if rule.rank is not None:
        return np.full(heads, min(rule.rank, width))
    if rule.qk_thr is not None or rule.vo_thr is not None:
        threshold = rule.qk_thr if what == "Q-K" else rule.vo_thr
        return np.full(heads, width) if threshold is None else (spectrum > threshold).sum(-1)
    loss = UNIT_ROUNDOFF[dtype] if rule.energy is None else math.sqrt(1 - rule.energy)
    largest = spectrum[:, :1]
    relative = np.divide(spectrum, largest, out=np.zeros_like(spectrum), where=largest > 0)  # its squares are numbers
    tails = np.sqrt(np.cumsum(relative[:, ::-1] ** 2, axis=-1))[:, ::-1]  # norm from each direction to the last
    kept: NDArray[np.int64] = (tails > loss * tails[:, :1]).sum(-1)
    return kept


def smallest_dropped(spectra: Mapping[str, Spectrum], ratio: float) -> dict[str, NDArray[np.int64]]:
    """The smallest `ratio` of all directions dropped wherever they are; of equal ones the later in a head."""
    values = np.concatenate([spectrum.ravel() for spectrum in spectra.values()])
    places = np.concatenate([np.tile(np.arange(s.shape[1]), s.shape[0]) for s in spectra.values()])
    kept = np.ones(values.size, dtype=bool)
    kept[np.lexsort((-places, values))[: int(ratio * values.size)]] = False
    ends = np.cumsum([spectrum.size for spectrum in spectra.values()])[:-1]
    return {
        name: part.reshape(spectrum.shape).sum(-1)
        for (name, spectrum), part in zip(spectra.items(), np.split(kept, ends), strict=True)
    }
