"""Ranks that meet a budget over all heads and blocks at the lowest predicted loss of quality.

The price of a direction is the predicted error that dropping it adds, per unit of the budget that it frees: a
parameter, a byte, or a multiply-add (`Cost`). Within one seam of one block, directions are ordered by the spectrum.
Trials on calibration data measure how dropping a share of them changes the block's output, and how an error of the
block changes the model's output (`Trials`). Without trials the error is the relative squared error of the product.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.seam import Seam
from pessa_cli.blocks.site import Site, count
from pessa_cli.common.errors import UsageError
from pessa_cli.ranks.cost import Cost, UnmetBudgetError, budget_of, cost_of, parameters
from pessa_cli.ranks.plan import BY_LAYER, ONE_WIDTH, PREDICTED, Comparison, RankPlan, check_ranks, plan_ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import LEVELS, Size, Spectra, Spectrum, Trials, largest_pairs, pair_shares


class PruneStep(NamedTuple):
    """Directions of one group of a seam that are dropped together, with their predicted cost."""

    site: Site
    seam: Seam
    group: int  # the key/value head; 0 for an MLP
    rank: int  # the rank that remains
    parameters: int  # the number of parameters freed
    cost: float  # what it frees of the budget: parameters, bytes or multiply-adds
    error: float  # the relative squared error of the block's output that this step adds to the steps before it
    harm: float  # the predicted change of the model's output, see `Trials.harm`; without trials the same as `error`
    price: float  # the harm per unit of the cost, made non-decreasing within one seam


@dataclass(frozen=True)
class Point:
    """A point of the trade-off between size and predicted errors."""

    chosen: int  # the remaining parameters of the chosen blocks
    parameters: int  # the remaining parameters of the whole model
    error: float  # the largest relative error of a block's output
    harm: float  # the predicted change of the model's output, as in PruneStep


def ranks_for(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size) -> RankPlan:
    """Return the ranks that a rule gives to the chosen blocks of a model whose total size is `whole`.

    For a rule with a budget, directions are dropped in the order of their price until the budget is met; at least one
    direction of Q-K and one of V-O remain. Raises UnmetBudgetError if the budget cannot be met, and PessaError if a
    rule without a budget would prune all of Q-K or all of V-O; UsageError for --max-error, which only trials can meet,
    and for ranks that are larger than every head.
    """
    check_ranks(sites, rule)
    if not rule.budgeted:
        return plan_ranks(sites, spectra, rule)
    if rule.max_error is not None:
        raise UsageError("--max-error needs trials on calibration data", "give it: --calibrate DATA")
    return _plan(sites, spectra, _taken(sites, spectra, rule, whole))


def predicted(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size) -> Comparison | None:
    """Return the plan of a rule with `uniform`, and what the spectra predict for it and for widths by layer.

    The harm of a plan is the sum of `PruneStep.harm`. None for any other rule. Raises the errors of `ranks_for`.
    """
    if not rule.uniform:
        return None
    plan = ranks_for(sites, spectra, rule, whole)
    rules = {ONE_WIDTH: rule, BY_LAYER: replace(rule, uniform=False)}
    harms = {name: sum(step.harm for step in _taken(sites, spectra, each, whole)) for name, each in rules.items()}
    return Comparison(plan, ONE_WIDTH, harms, PREDICTED)


def _taken(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size) -> list[PruneStep]:
    """Return the steps that meet a budget, in order. Raises UnmetBudgetError if it cannot be met."""
    budget = budget_of(sites, rule, whole)
    taken: list[PruneStep] = []
    left = budget.now
    for move in ordered_moves(budget.sites, spectra, rule, budget.cost):
        if left <= budget.most:
            break
        taken += move
        left -= sum(step.cost for step in move)
    budget.check(left, rule)
    return taken


def candidates(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size) -> dict[str, RankPlan]:
    """Return plans that meet a budget, by what they are; which of them does the least harm only trials can tell.

    "by price" is that of `ranks_for`. Two others give attention and MLPs the same share of their parameters, and choose
    the ranks of attention by price: "the same share" gives all MLPs the same share of their channels, and "the same
    share, widths by price" chooses these widths by price, too. The last two cut only one of the two kinds. They are
    left out if there are no MLPs, or if they cannot meet the budget. Shares are of what the budget counts. With
    `uniform` the first plan is the one to take, and that of `ranks_for` without it shows what uniformity costs. Raises
    the errors of `ranks_for`.
    """
    by_price = ranks_for(sites, spectra, rule, whole)
    if rule.uniform:
        return {ONE_WIDTH: by_price, BY_LAYER: ranks_for(sites, spectra, replace(rule, uniform=False), whole)}
    found = {"by price": by_price}
    mlps = [site for site in sites if "mlp" in site.ranks]
    others = [site for site in sites if "mlp" not in site.ranks]
    if not mlps:
        return found
    cost = cost_of(rule, whole)
    kept = sum(cost(site, by_price.ranks[site.name]) for site in sites)
    share = kept / sum(cost(site, site.ranks) for site in sites)
    ranks: dict[str, Mapping[str, Ranks]] = {}
    for site in mlps:
        (stored,), step = site.ranks["mlp"], rule.round_to
        ranks[site.name] = {"mlp": (min(stored, max(step, int(share * stored) // step * step)),)}
    if not others:
        return found | {"the same share": RankPlan(ranks)}
    apart = rule.with_share(share)
    with suppress(UnmetBudgetError):  # so much can only be cut of attention and MLPs together
        rest, widths = (ranks_for(own, spectra, apart, whole) for own in (others, mlps))
        found["the same share"] = RankPlan({**ranks, **rest.ranks}, rest.pairs)
        found["the same share, widths by price"] = RankPlan({**widths.ranks, **rest.ranks}, rest.pairs)
    for name, own, full in (("attention alone", others, mlps), ("MLPs alone", mlps, others)):
        before = sum(cost(site, site.ranks) for site in own)
        left = kept - sum(cost(site, site.ranks) for site in full)
        if 0 < left <= before:
            with suppress(UnmetBudgetError):
                plan = ranks_for(own, spectra, rule.with_share(left / before), whole)
                found[name] = RankPlan({**RankPlan.full(full).ranks, **plan.ranks}, plan.pairs)
    return found


def trade_off(
    sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, whole: Size, points: int = 20
) -> list[Point]:
    """Return the predicted trade-off between size and errors at about `points` sizes, from the whole model down."""
    before = now = sum(count(site.tensors) for site in sites)
    errors: dict[str, float] = defaultdict(float)
    harm, curve = 0.0, [Point(before, whole.parameters, 0.0, 0.0)]
    for move in ordered_moves(sites, spectra, rule, cost_of(rule, whole)):
        for step in move:
            now -= step.parameters
            errors[step.site.name] += step.error
            harm += step.harm
        if before - now >= len(curve) * before / points:
            worst = math.sqrt(max(errors.values()))
            curve.append(Point(now, whole.parameters - before + now, worst, harm))
    return curve


def ordered_moves(
    sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, cost: Cost = parameters
) -> Iterator[Sequence[PruneStep]]:
    """Yield the steps that are taken together, the cheapest first: single ones or, with `uniform`, those of all layers.

    With `uniform` all groups of the seams of one kind of block have the same width after each move.
    """
    if not rule.uniform:
        yield from ([step] for step in ordered_steps(sites, spectra, rule, cost))
        return
    moves: list[tuple[float, Sequence[PruneStep]]] = []
    for kind, name in dict.fromkeys((site.kind, seam.name) for site in sites for seam in site.seams):
        steps = [
            step
            for site in sites
            if site.kind == kind
            for step in _level_steps(site, site.seam(name), spectra[site.name], rule, cost)
        ]
        price = 0.0
        for rank in sorted({step.rank for step in steps}, reverse=True):
            move = [step for step in steps if step.rank == rank]
            price = max(price, sum(step.harm for step in move) / sum(step.cost for step in move))
            moves.append((price, move))
        if moves and name != "mlp" and moves[-1][1][0].rank == 0:  # all of Q-K or V-O
            moves.pop()
    yield from (move for _, move in sorted(moves, key=lambda each: each[0]))


def _level_steps(site: Site, seam: Seam, spectra: Spectra, rule: Rule, cost: Cost) -> Iterator[PruneStep]:
    """Yield the steps of one seam of a block in which all of its groups are cut to the same rank, the smallest last."""
    worth, unit = _importance(spectra, seam)
    if not worth.size:
        return
    stored = np.array([rank - seam.always_kept for rank in seam.ranks]) // unit
    grid = -(-rule.round_to // unit)
    least = grid if seam.name == "mlp" else -(-rule.min_rank // unit)
    direction, each, error = unit * round(_each(site, seam, parameters)), unit * _each(site, seam, cost), 0.0
    harmful = 1.0 if spectra.trials is None else spectra.trials.harm
    tails = np.concatenate([np.cumsum(worth[:, ::-1], -1)[:, ::-1], np.zeros((len(worth), 1))], -1)
    before = int(stored.max())
    for low, _ in _chunks(before, grid, least):
        mass = sum(tails[head, min(low, rank)] - tails[head, rank] for head, rank in enumerate(stored.tolist()))
        now = float(_errors(worth, np.array([mass]), spectra.trials, seam)[0])
        added, error = max(0.0, now - error), max(error, now)
        cut = [(head, min(before, rank) - low) for head, rank in enumerate(stored.tolist()) if rank > low]
        for head, dropped in cut:
            share, rank, freed = added / len(cut), seam.always_kept + unit * low, each * dropped
            harm = share * harmful
            yield PruneStep(site, seam, head, rank, direction * dropped, freed, share, harm, harm / freed)
        before = low


def ordered_steps(
    sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule, cost: Cost = parameters
) -> list[PruneStep]:
    """Return all steps that the rule's `round_to` and `min_rank` allow, ordered by price, the cheapest first.

    If they would drop all of Q-K or all of V-O, the last step of that side is left out.
    """
    steps = [
        step for site in sites for seam in site.seams for step in _steps(site, seam, spectra[site.name], rule, cost)
    ]
    # The sort is stable and prices within one seam never decrease, so the steps of a seam stay in their order.
    steps.sort(key=lambda step: step.price)
    for name in dict.fromkeys(seam.name for site in sites for seam in site.seams):
        own = [step for step in steps if step.seam.name == name]
        least = {(site.name, at): n for site in sites for at, n in enumerate(site.ranks.get(name, ()))}
        least |= {(step.site.name, step.group): step.rank for step in own}
        if own and not any(least.values()):
            steps.remove(own[-1])
    return steps


def _steps(site: Site, seam: Seam, spectra: Spectra, rule: Rule, cost: Cost) -> Iterator[PruneStep]:
    """Yield the steps of one seam of a block, ordered by price."""
    worth, unit = _importance(spectra, seam)
    stored = [rank - seam.always_kept for rank in seam.ranks]  # the spectrum does not cover what is always kept
    grid = -(-rule.round_to // unit)
    least = grid if seam.name == "mlp" else -(-rule.min_rank // unit)  # no MLP is left without channels
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
    errors = _errors(worth, masses, trials, seam)
    direction, each = unit * round(_each(site, seam, parameters)), unit * _each(site, seam, cost)
    price, harmful = 0.0, 1.0 if trials is None else trials.harm
    for (_, _, head, low, high), error in zip(chunks, np.diff(errors, prepend=0.0).tolist(), strict=True):
        dropped, harm, rank = high - low, error * harmful, seam.always_kept + unit * low
        price = max(price, harm / (each * dropped))
        yield PruneStep(site, seam, head, rank, direction * dropped, each * dropped, error, harm, price)


def _importance(spectra: Spectra, seam: Seam) -> tuple[Spectrum, int]:
    """Return the importance of the units of one seam, descending in each group, and the number of directions per unit.

    The importance of a direction is its squared spectrum. For Q-K under RoPE the units are frequency pairs of two
    directions, and their importance is a share of the head's total.
    """
    if (found := spectra.seams.get(seam.name)) is not None:
        return found**2, 1
    if seam.symmetry != "pairs" or spectra.pairs is None:
        return np.empty((0, 0)), 1
    return -np.sort(-pair_shares(spectra.pairs), axis=-1), 2


def _chunks(rank: int, step: int, least: int) -> Iterator[tuple[int, int]]:
    """Yield ranges of directions of a head that are dropped together, from the last, as (rank after, rank before)."""
    while rank > least:
        lower = max(least, (rank - 1) // step * step)
        yield lower, rank
        rank = lower


def _errors(worth: Spectrum, masses: NDArray[np.float64], trials: Trials | None, seam: Seam) -> NDArray[np.float64]:
    """Predict the relative squared error of the block's output for each sum of dropped importance in `masses`.

    Errors measured by trials are interpolated linearly in log-log coordinates, and extrapolated proportionally. Without
    trials the error is the dropped share of the total importance.
    """
    if trials is None:
        return masses / (total if (total := float(worth.sum())) > 0 else 1.0)
    tried = np.maximum.accumulate(np.array(trials.errors[seam.name]))
    at = np.cumsum(np.sort(worth, axis=None))[[max(0, int(level * worth.size) - 1) for level in LEVELS]]
    known = (at > 0) & (tried > 0)
    if not known.any():
        return masses * 0.0
    x, y, where = np.log(at[known]), np.log(tried[known]), np.log(np.maximum(masses, np.finfo(float).tiny))
    inside = np.exp(np.interp(where, x, y) + (where - where.clip(x[0], x[-1])))
    return np.maximum.accumulate(np.where(masses > 0, inside, 0.0))


def _plan(sites: Sequence[Site], spectra: Mapping[str, Spectra], taken: Sequence[PruneStep]) -> RankPlan:
    """Return the rank plan after the taken steps; of frequency pairs the most important are kept."""
    plan = {site.name: {name: list(ranks) for name, ranks in site.ranks.items()} for site in sites}
    for step in taken:
        plan[step.site.name][step.seam.name][step.group] = step.rank
    ranks = {place: {name: tuple(kept) for name, kept in seams.items()} for place, seams in plan.items()}
    pairs = {
        site.name: largest_pairs(found, np.array(ranks[site.name]["qk"]) // 2)
        for site in sites
        if (found := spectra[site.name].pairs) is not None and ranks[site.name]["qk"] != site.seam("qk").full
    }
    return RankPlan(ranks, pairs)


def _each(site: Site, seam: Seam, cost: Cost) -> float:
    """Return what one direction of one group of a seam costs; for parameters, in weights and biases."""
    none: dict[str, Ranks] = {name: (0,) * len(ranks) for name, ranks in site.ranks.items()}
    one = none | {seam.name: (1, *none[seam.name][1:])}
    return cost(site, one) - cost(site, none)
