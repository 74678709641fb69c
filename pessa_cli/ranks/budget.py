"""Ranks within a budget, shared out over all heads and blocks by what each direction costs in quality. Pure numbers.

A direction is priced by the error that its loss adds for each parameter that it frees. Within one side of one block
(Q-K or V-O) the spectrum says which direction is worth less; what so much of it costs the block's output has been
tried (`Trials`), and what that costs the model's. Without trials the errors are those of the products themselves.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.site import Site, count
from pessa_cli.checkpoint.dtypes import ITEM_BYTES
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.ranks.plan import RankPlan, plan_ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import LEVELS, Size, Spectra, Spectrum, Trials, largest_pairs, pair_shares

SIDES = ("qk", "vo")


class PruneStep(NamedTuple):
    """Some directions of one head that go together: from which rank to which, what that frees, adds and costs."""

    site: Site
    side: str  # "qk" or "vo"
    head: int
    rank: int  # that is left
    parameters: int
    error: float  # relative squared error of the block's output, added to that of the steps before
    harm: float  # what that error does to the whole model; the error itself where nothing tells
    price: float  # per parameter


@dataclass(frozen=True)
class Point:
    """A point of the trade-off: what is left of the attention that may be pruned, and at what errors."""

    attention: int
    parameters: int
    error: float  # the largest of a block, relative
    harm: float  # to the whole model


def ranks_for(sites: list[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size) -> RankPlan:
    """The ranks that a rule gives to the chosen blocks of a model of this size.

    Those that meet a budget do so at the lowest price. Raises PessaError for a budget that cannot be met, and for a
    rule that would prune all of Q-K or all of V-O.
    """
    if not rule.budgeted:
        return plan_ranks(sites, spectra, rule)
    steps = ordered_steps(sites, spectra, rule)
    if rule.max_error is not None:
        return _plan(sites, spectra, _within(steps, spectra, rule.max_error))
    attention = sum(count(site.tensors) for site in sites)
    hint = "give {share:.2f} or more, or choose more --sites"
    if rule.target_attention is not None:
        what, most, now = "attention parameters", rule.target_attention * attention, attention
    elif rule.target_params is not None:
        what, most, now = "parameters", rule.target_params * whole.parameters, whole.parameters
    else:
        assert rule.target_size is not None
        what, most, now, hint = "bytes", float(rule.target_size), whole.nbytes, "give a larger size"
    taken, left = [], float(now)
    for step in steps:
        if left <= most:
            break
        taken.append(step)
        left -= step.parameters * (1 if rule.target_size is None else ITEM_BYTES[step.site.dtype])
    if left > most:
        raise PessaError(
            f"{rule}: {most:,.0f} of {now:,} {what} are wanted, and {left:,.0f} are left without any attention "
            "that may go",
            hint.format(share=left / now),
        )
    return _plan(sites, spectra, taken)


def trade_off(
    sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size, points: int = 20
) -> list[Point]:
    """What is kept against what it costs, from everything to next to nothing; errors are predictions."""
    attention = now = sum(count(site.tensors) for site in sites)
    errors: dict[str, float] = defaultdict(float)
    harm, curve = 0.0, [Point(attention, whole.parameters, 0.0, 0.0)]
    for step in ordered_steps(sites, spectra, rule):
        now -= step.parameters
        errors[step.site.name] += step.error
        harm += step.harm
        if attention - now >= len(curve) * attention / points:
            worst = math.sqrt(max(errors.values()))
            curve.append(Point(now, whole.parameters - attention + now, worst, harm))
    return curve


def ordered_steps(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule) -> list[PruneStep]:
    """All steps that a rule's `round_to` and `min_rank` allow, the cheapest first."""
    steps = [step for site in sites for side in SIDES for step in _steps(site, side, spectra[site.name], rule)]
    return sorted(steps, key=lambda step: step.price)  # stable, and within one side prices only rise


def _steps(site: Site, side: str, spectra: Spectra, rule: Rule) -> Iterator[PruneStep]:
    """The steps of one side of a block in the order of their prices."""
    worth, unit = _worth(spectra, side)
    before = site.always_kept if side == "qk" else 0  # kept always, and no part of the spectrum
    stored = [rank - before for rank in (site.qk_ranks if side == "qk" else site.vo_ranks)]
    grid, least = -(-rule.round_to // unit), -(-rule.min_rank // unit)
    chunks = [
        (float(worth[head, low:high].mean()), -high, head, low, high)
        for head, rank in zip(range(len(worth)), stored, strict=False)
        for low, high in _chunks(rank // unit, grid, least)
    ]
    chunks.sort()
    masses = np.cumsum([mean * (high - low) for mean, _, _, low, high in chunks])
    if not len(masses):
        return
    trials = spectra.trials
    errors = _errors(worth, masses, trials, side)
    each, harmful = unit * _parameters(site, side), 1.0 if trials is None else trials.harm
    price = 0.0
    for (_, _, head, low, high), error in zip(chunks, np.diff(errors, prepend=0.0).tolist(), strict=True):
        parameters, harm = each * (high - low), error * harmful
        price = max(price, harm / parameters)
        yield PruneStep(site, side, head, before + unit * low, parameters, error, harm, price)


def _worth(spectra: Spectra, side: str) -> tuple[Spectrum, int]:
    """What of one side is worth how much, descending in each head, and how many directions each of these is.

    Under RoPE those of Q-K are frequency pairs, each as a share of its head.
    """
    if side == "vo":
        return spectra.vo**2, 1
    if spectra.qk is not None:
        return spectra.qk**2, 1
    if spectra.pairs is None:
        return spectra.vo[:0], 1
    return -np.sort(-pair_shares(spectra.pairs), axis=-1), 2


def _chunks(rank: int, step: int, least: int) -> Iterator[tuple[int, int]]:
    """The directions of a head that go together, from the last: (rank after, rank before)."""
    while rank > least:
        lower = max(least, (rank - 1) // step * step)
        yield lower, rank
        rank = lower


def _errors(worth: Spectrum, masses: NDArray[np.float64], trials: Trials | None, side: str) -> NDArray[np.float64]:
    """The relative squared error of the block's output once so much of a spectrum's squares is gone.

    Between what was tried, straight lines in the logarithms; in proportion below and above.
    """
    if trials is None:
        return masses / (total if (total := float(worth.sum())) > 0 else 1.0)
    tried = np.maximum.accumulate(np.array(trials.qk if side == "qk" else trials.vo))
    at = np.cumsum(np.sort(worth, axis=None))[[max(0, int(level * worth.size) - 1) for level in LEVELS]]
    known = (at > 0) & (tried > 0)
    if not known.any():
        return masses * 0.0
    x, y, where = np.log(at[known]), np.log(tried[known]), np.log(np.maximum(masses, np.finfo(float).tiny))
    inside = np.exp(np.interp(where, x, y) + (where - where.clip(x[0], x[-1])))
    return np.maximum.accumulate(np.where(masses > 0, inside, 0.0))


def _within(steps: Sequence[PruneStep], spectra: Mapping[str, Spectra], most: float) -> list[PruneStep]:
    """The steps that leave the relative error of every block's output at `most`."""
    if any(spectra[step.site.name].trials is None for step in steps):
        raise UsageError("--max-error is about real inputs", "give it some: --calibrate DATA")
    errors: dict[str, float] = defaultdict(float)
    full: set[str] = set()
    taken = []
    for step in steps:
        name = step.site.name
        if name not in full and errors[name] + step.error <= most**2:
            errors[name] += step.error
            taken.append(step)
        else:
            full.add(name)
    return taken


def _plan(sites: Sequence[Site], spectra: Mapping[str, Spectra], taken: Sequence[PruneStep]) -> RankPlan:
    plan = {"qk": {s.name: list(s.qk_ranks) for s in sites}, "vo": {s.name: list(s.vo_ranks) for s in sites}}
    for step in taken:
        plan[step.side][step.site.name][step.head] = step.rank
    qk, vo = ({name: tuple(ranks) for name, ranks in side.items()} for side in plan.values())
    pairs = {
        site.name: largest_pairs(found, np.array(qk[site.name]) // 2)
        for site in sites
        if (found := spectra[site.name].pairs) is not None and qk[site.name] != site.full
    }
    return RankPlan(qk, vo, pairs)


def _parameters(site: Site, side: str) -> int:
    """How many parameters one direction of one head takes."""

    none: Ranks = (0,) * site.kv_heads
    one: Ranks = (1, *none[1:])
    shapes = site.shapes(one, none) if side == "qk" else site.shapes(none, one)
    return count(shapes) - count(site.shapes(none, none))
