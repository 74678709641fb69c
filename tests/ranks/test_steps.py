"""The steps of a budget and the choice of pairs, worked out by hand for blocks whose two sides have unequal sizes."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from attention import GROUPED
from sites import plan_by, spectra_by, trials_by

from pessa_cli.blocks.site import ROPE, AttentionSite
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.common.errors import UsageError
from pessa_cli.ranks.budget import PruneStep, ordered_steps, ranks_for, trade_off
from pessa_cli.ranks.cost import UnmetBudgetError
from pessa_cli.ranks.plan import RankPlan, plan_ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import LEVELS, Size, Spectra, Trials, largest_pairs, pair_shares, smallest_dropped

QK_EACH = 2 * 5 + 6 + 2 + 1  # parameters of one direction: two query heads, the key, and their biases
VO_EACH = 6 + 2 * 7 + 1  # the value, two columns of W_O, and the value bias
BIASED = replace(GROUPED, biases=frozenset("qkvo"))
QK = np.array([[4.0, 2.0, 1.0], [3.0, 1.5, 0.5]])
VO = np.array([[5.0, 2.5, 2.0], [6.0, 1.0, 0.1]])
WHOLE = Size(1000, 8000)
ROTATED = replace(
    GROUPED,
    spec=ARCHITECTURES["llama"][0],
    between=ROPE,
    unmerged=8,
    head_dim=8,
    qk_ranks=(8, 8),
    vo_ranks=(8, 8),
)
PAIRS = np.array([[8.0, 1.0, 6.0, 5.0], [0.2, 0.45, 0.26, 0.09]])  # shares: .4 .05 .3 .25 and .2 .45 .26 .09
EIGHT = np.array([np.linspace(8, 1, 8), np.linspace(4, 0.5, 8)])


def spectra_of(site: AttentionSite, trials: Trials | None = None) -> dict[str, Spectra]:
    return {site.name: spectra_by(QK, VO, trials is not None, trials)}


def steps_of(site: AttentionSite, spectra: dict[str, Spectra], rule: Rule) -> list[PruneStep]:
    """Return the steps of a block beside another that keeps its directions; without one, the last of a side remains."""
    other = replace(site, layer=9)
    kept = {other.name: spectra_by(np.zeros((0, 3)), np.zeros((0, 3)))}
    return ordered_steps([site, other], spectra | kept, rule)


def test_one_direction_of_each_side_remains() -> None:
    """The one whose price is highest, unless another block keeps some."""
    for spectra in (spectra_of(BIASED), {BIASED.name: spectra_by(QK[::-1], VO[::-1])}):
        every = steps_of(BIASED, spectra, Rule())
        found = ordered_steps([BIASED], spectra, Rule())
        last = {side: [step for step in every if step.seam.name == side][-1] for side in ("qk", "vo")}
        assert found == [step for step in every if step not in last.values()]
        assert {step.rank for step in last.values()} == {0}
    assert len(ordered_steps([BIASED], spectra_of(BIASED), Rule(min_rank=1))) == 8
    part = replace(BIASED, vo_ranks=(1, 0))
    assert {step.seam.name for step in ordered_steps([part], spectra_of(part), Rule())} == {"qk"}


def test_every_step_by_hand() -> None:
    """Errors are shares of the squared spectrum of one side, and the price is per parameter."""
    steps = steps_of(BIASED, spectra_of(BIASED), Rule())
    expected = []
    for side, spectrum, each in (("qk", QK, QK_EACH), ("vo", VO, VO_EACH)):
        for head in range(2):
            for rank in range(3):
                error = spectrum[head, rank] ** 2 / (spectrum**2).sum()
                expected.append((error / each, side, head, rank, each, error))
    expected.sort()
    assert [(s.seam.name, s.group, s.rank, s.parameters) for s in steps] == [row[1:5] for row in expected]
    assert np.allclose([(s.price, s.error, s.harm) for s in steps], [(row[0], row[5], row[5]) for row in expected])
    assert {step.site for step in steps} == {BIASED}


def test_steps_of_several_directions_have_the_mean_price() -> None:
    steps = steps_of(BIASED, spectra_of(BIASED), Rule(round_to=2, min_rank=1))
    found = {(s.seam.name, s.group, s.rank): s for s in steps}
    # From 3 to 2, and from 2 to 1, which is the least.
    assert set(found) == {(side, head, rank) for side in ("qk", "vo") for head in range(2) for rank in (2, 1)}
    assert found["vo", 1, 1].error == pytest.approx(1.0 / (VO**2).sum())
    wide = steps_of(BIASED, spectra_of(BIASED), Rule(round_to=3))
    assert {(s.seam.name, s.group): (s.rank, s.parameters) for s in wide} == {
        (side, head): (0, 3 * each) for side, each in (("qk", QK_EACH), ("vo", VO_EACH)) for head in range(2)
    }
    by_head = {(s.seam.name, s.group): s.error for s in wide}
    assert by_head["qk", 0] == pytest.approx((QK[0] ** 2).sum() / (QK**2).sum())
    assert by_head["vo", 1] == pytest.approx((VO[1] ** 2).sum() / (VO**2).sum())
    order = [(s.seam.name, s.group) for s in wide if s.seam.name == "vo"]
    assert order == [("vo", 0), ("vo", 1)]  # of VO the head with less goes first


def test_of_equal_directions_the_last_of_the_first_head_goes_first() -> None:
    equal = {BIASED.name: spectra_by(None, np.ones((2, 3)))}
    steps = steps_of(replace(BIASED, unmerged=3), equal, Rule())
    assert [(s.group, s.rank) for s in steps] == [(0, 2), (1, 2), (0, 1), (1, 1), (0, 0), (1, 0)]


def test_directions_that_are_not_stored_are_not_dropped_again() -> None:
    stored = replace(BIASED, qk_ranks=(1, 3), vo_ranks=(2, 0))
    steps = steps_of(stored, spectra_of(stored), Rule())
    assert sorted((s.seam.name, s.group, s.rank) for s in steps) == [
        ("qk", 0, 0), ("qk", 1, 0), ("qk", 1, 1), ("qk", 1, 2), ("vo", 0, 0), ("vo", 0, 1),
    ]  # fmt: skip
    nothing = replace(BIASED, qk_ranks=(0, 0), vo_ranks=(0, 0))
    assert steps_of(nothing, spectra_of(nothing), Rule()) == []
    assert ranks_for([nothing], spectra_of(nothing), Rule(target_params=1.0), WHOLE).ranks[nothing.name]["vo"] == (0, 0)


def test_directions_that_cannot_be_merged_are_always_kept() -> None:
    partial = replace(BIASED, head_dim=5, unmerged=2, qk_ranks=(5, 5), vo_ranks=(3, 3))
    steps = steps_of(partial, spectra_of(partial), Rule())
    for side, ranks in (("qk", (2, 3, 4)), ("vo", (0, 1, 2))):
        assert sorted((s.group, s.rank) for s in steps if s.seam.name == side) == [
            (h, r) for h in range(2) for r in ranks
        ]
    plan = ranks_for([partial], spectra_of(partial), Rule(qk_thr=1.2), WHOLE)
    assert plan.ranks[partial.name]["qk"] == (4, 4)
    assert plan.ranks[partial.name]["vo"] == (3, 3)


def test_pairs_of_a_block_with_rope() -> None:
    spectra = {ROTATED.name: spectra_by(None, EIGHT, pairs=PAIRS)}
    steps = [s for s in steps_of(ROTATED, spectra, Rule()) if s.seam.name == "qk"]
    shares = {0: [0.4, 0.3, 0.25, 0.05], 1: [0.45, 0.26, 0.2, 0.09]}
    order = sorted((shares[head][place], -place, head) for head in range(2) for place in range(4))
    assert [(s.group, s.rank) for s in steps] == [(head, -2 * place) for _, place, head in order]
    assert np.allclose([s.error for s in steps], [share / 2 for share, _, _ in order])
    assert {s.parameters for s in steps} == {2 * (2 * 5 + 6)}
    odd = [s for s in steps_of(ROTATED, spectra, Rule(round_to=3, min_rank=1)) if s.seam.name == "qk"]
    assert {s.rank for s in odd} == {4, 2}  # steps of two pairs, and at least one pair is kept
    unknown = steps_of(ROTATED, {ROTATED.name: spectra_by(None, EIGHT)}, Rule())
    assert {s.seam.name for s in unknown} == {"vo"}
    size = sum(s.parameters for s in steps[:3])
    attention = 8 * (4 * (5 + 7) + 2 * 2 * 6)
    rule = Rule(target_attention=1 - size / attention)
    free = {ROTATED.name: replace(spectra[ROTATED.name], seams={"vo": 1e3 * EIGHT}, trials=None)}
    plan = ranks_for([ROTATED], free, rule, WHOLE)
    assert sum(plan.ranks[ROTATED.name]["qk"]) + sum(plan.ranks[ROTATED.name]["vo"]) < 32
    chosen = {s.name: s for s in [ROTATED]}
    for name, pairs in plan.pairs.items():
        assert pairs == largest_pairs(PAIRS, np.array(plan.ranks[name]["qk"]) // 2)
        assert chosen[name].full != plan.ranks[name]["qk"]
    whole = ranks_for([ROTATED], free, Rule(target_attention=1.0), WHOLE)
    assert whole.pairs == {}


TRIED = trials_by(tuple(0.01 * level for level in LEVELS), tuple(0.03 * level for level in LEVELS), 5.0)


def test_errors_and_harm_of_trials_by_hand() -> None:
    """At the directions that trials dropped the error is what they measured; beyond them it is proportional."""
    spectrum = np.array([[4.0, 3.0, 2.0, 1.0], [3.5, 2.5, 1.5, 0.5]])
    site = replace(BIASED, head_dim=4, qk_ranks=(4, 4), vo_ranks=(4, 4))
    trials = trials_by((0.001, 0.003, 0.02, 0.1), (0.002, 0.001, 0.05, 0.0), 5.0)
    spectra = {site.name: spectra_by(spectrum, spectrum, True, trials)}
    steps = steps_of(site, spectra, Rule())
    dropped = np.cumsum(np.sort(spectrum.ravel()) ** 2)
    for side, measured in (("qk", (0.001, 0.003, 0.02, 0.1)), ("vo", (0.002, 0.002, 0.05, 0.05))):
        sums = np.cumsum([s.error for s in steps if s.seam.name == side])
        assert np.allclose(sums[[0, 1, 3, 5]], measured)
        between = np.exp(np.interp(np.log(dropped[2]), np.log(dropped[[1, 3]]), np.log([measured[1], measured[2]])))
        assert sums[2] == pytest.approx(between)
        assert sums[7] == pytest.approx(measured[3] * dropped[7] / dropped[5])
    assert [s.harm for s in steps] == pytest.approx([5.0 * s.error for s in steps])
    for side, each in (("qk", QK_EACH), ("vo", VO_EACH)):
        own = [s for s in steps if s.seam.name == side]
        assert [s.price for s in own] == pytest.approx(np.maximum.accumulate([s.harm / each for s in own]))
    small = {site.name: spectra_by(1e-3 * spectrum, 1e-3 * spectrum, True, trials)}  # the unit does not matter
    again = steps_of(site, small, Rule())
    assert [s.error for s in again] == pytest.approx([s.error for s in steps])
    for measured in ((0.0,) * 4, (0.0, 0.0, 0.0, 0.3)):
        harmless = {site.name: spectra_by(spectrum, spectrum, True, trials_by(measured, measured, 5.0))}
        errors = [s.error for s in steps_of(site, harmless, Rule()) if s.seam.name == "vo"]
        assert sum(errors[:6]) == pytest.approx(measured[3])
    zeros = spectrum.copy()
    zeros[1] = 0
    half = {site.name: spectra_by(zeros, zeros, True, trials)}
    errors = [s.error for s in steps_of(site, half, Rule()) if s.seam.name == "qk"]
    assert errors[:4] == [0.0] * 4
    assert sum(errors[:6]) == pytest.approx(0.1)


def test_a_spectrum_of_zeros_has_no_errors() -> None:
    zeros = {BIASED.name: spectra_by(0 * QK, 0 * VO)}
    assert [s.error for s in steps_of(BIASED, zeros, Rule())] == [0.0] * 12
    tiny = {BIASED.name: spectra_by(1e-6 * QK, 1e-6 * VO)}
    assert sum(s.error for s in steps_of(BIASED, tiny, Rule())) == pytest.approx(2.0)


def test_the_trade_off_by_hand() -> None:
    """A point after each step that passes another twelfth; the error is the square root of a block's sum."""
    sites = [BIASED, replace(BIASED, layer=1)]
    spectra = {site.name: spectra_by(QK, VO, True, TRIED) for site in sites}
    steps = ordered_steps(sites, spectra, Rule())
    whole = 2 * (6 * (QK_EACH + VO_EACH) + 7)
    points = trade_off(sites, spectra, Rule(), Size(5000, 1), points=12)
    assert (points[0].chosen, points[0].parameters, points[0].error, points[0].harm) == (whole, 5000, 0.0, 0.0)
    now, harm, errors, expected = whole, 0.0, dict.fromkeys(spectra, 0.0), 1
    for step in steps:
        now, harm = now - step.parameters, harm + step.harm
        errors[step.site.name] += step.error
        if whole - now >= expected * whole / 12:
            point = points[expected]
            assert (point.chosen, point.parameters) == (now, 5000 - whole + now)
            assert point.error == pytest.approx(max(errors.values()) ** 0.5)
            assert point.harm == pytest.approx(harm)
            expected += 1
    assert len(points) == expected > 8
    assert len(trade_off(sites, spectra, Rule(), Size(5000, 1), points=1000)) == len(steps) + 1
    assert len(trade_off(sites, spectra, Rule(), Size(5000, 1))) == len(
        trade_off(sites, spectra, Rule(), Size(5000, 1), points=20)
    )
    assert trade_off(sites, spectra, Rule(), Size(5000, 1), points=1)[-1].chosen == whole
    # The first step frees a thirteenth of the block exactly.
    exactly = trade_off([BIASED], {BIASED.name: spectra_by(QK * [1, 1, 0], VO)}, Rule(), Size(5000, 1), points=13)
    assert [point.chosen for point in exactly[:2]] == [13 * QK_EACH, 12 * QK_EACH]
    rounded = trade_off(sites, spectra, Rule(min_rank=2), Size(5000, 1), points=1000)
    assert rounded[-1].chosen == 2 * (4 * (QK_EACH + VO_EACH) + 7)


def test_budgets_by_hand() -> None:
    sites, attention = [BIASED], 6 * (QK_EACH + VO_EACH) + 7
    steps = ordered_steps(sites, spectra_of(BIASED), Rule())
    for count in range(1, len(steps)):
        gone = sum(step.parameters for step in steps[:count])
        expected = {"qk": [3, 3], "vo": [3, 3]}
        for step in steps[:count]:
            expected[step.seam.name][step.group] = step.rank
        for rule in (
            Rule(target_attention=(attention - gone + 0.5) / attention),
            Rule(target_params=(1000 - gone + 0.5) / 1000),
            Rule(target_size=8000 - 8 * gone),
        ):
            plan = ranks_for(sites, spectra_of(BIASED), rule, WHOLE)
            assert (list(plan.ranks[BIASED.name]["qk"]), list(plan.ranks[BIASED.name]["vo"])) == (
                expected["qk"],
                expected["vo"],
            )
    single = replace(BIASED, dtype="F16")
    plan = ranks_for([single], spectra_of(single), Rule(target_size=2000 - 2 * steps[0].parameters), Size(1000, 2000))
    assert sum(plan.ranks[single.name]["qk"]) + sum(plan.ranks[single.name]["vo"]) == 11


def test_a_budget_that_cannot_be_met_names_what_remains() -> None:
    attention = 6 * (QK_EACH + VO_EACH) + 7
    sites, spectra = [BIASED], spectra_of(BIASED)
    with pytest.raises(UnmetBudgetError, match=f"is 25 of {attention} attention parameters, but 87 remain") as caught:
        ranks_for(sites, spectra, Rule(target_attention=0.1, min_rank=1), WHOLE)
    assert caught.value.hint == "give 0.353 or more, or choose more --sites"
    with pytest.raises(UnmetBudgetError, match="is 100 of 1,000 parameters, but 800 remain") as caught:
        ranks_for(sites, spectra, Rule(target_params=0.1), WHOLE)
    assert caught.value.hint == "give 0.8 or more, or choose more --sites"
    with pytest.raises(UnmetBudgetError, match="is 10 of 8,000 bytes, but 6,400 remain") as caught:
        ranks_for(sites, spectra, Rule(target_size=10), WHOLE)
    assert caught.value.hint == "give a larger size"


def test_a_rule_without_a_budget_is_a_plan() -> None:
    rule = Rule(ratio=0.3)
    assert ranks_for([BIASED], spectra_of(BIASED), rule, WHOLE) == plan_ranks([BIASED], spectra_of(BIASED), rule)


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Rule(rope_ratio=0.25), ([0, 2, 3], [0, 1, 2])),  # the two smallest of eight shares
        (Rule(rope_ratio=0.5), ([0, 2], [1, 2])),  # the shares .05, .09, .2 and .25 go
        (Rule(rope_ratio=0.6), ([0, 2], [1, 2])),
        (Rule(rope_ratio=0.25, round_to=8), None),
        (Rule(rope_ratio=0.5, round_to=3), ([0, 2, 3], [0, 1, 2])),  # 4 directions, rounded up to 6
        (Rule(rope_ratio=0.9, min_rank=3), ([0, 2], [1, 2])),
        (Rule(rope_ratio=0.0), None),
    ],
)
def test_pairs_that_a_rule_keeps(rule: Rule, kept: tuple[list[int], list[int]] | None) -> None:
    spectra = {ROTATED.name: spectra_by(None, EIGHT, pairs=PAIRS)}
    plan = plan_ranks([ROTATED], spectra, rule)
    if kept is None:
        assert plan.pairs == {}
        assert plan.ranks[ROTATED.name]["qk"] == (8, 8)
        return
    assert tuple([p for run in runs for p in run] for runs in plan.pairs[ROTATED.name]) == kept
    assert plan.ranks[ROTATED.name]["qk"] == tuple(2 * len(pairs) for pairs in kept)
    assert plan.kept(ROTATED).pairs == plan.pairs[ROTATED.name]
    assert plan.kept(ROTATED).qk_ranks == plan.ranks[ROTATED.name]["qk"]
    assert plan.kept(ROTATED).vo_ranks == plan.ranks[ROTATED.name]["vo"]


def test_pairs_that_are_not_stored_stay_away() -> None:
    pairs = ((range(0, 1), range(2, 3)), (range(1, 3),))
    stored = replace(ROTATED, pairs=pairs, qk_ranks=(4, 4))
    zeros = PAIRS * np.array([[1, 0, 1, 0], [0, 1, 1, 0]])
    assert plan_ranks([stored], {stored.name: spectra_by(None, EIGHT, pairs=zeros)}, Rule(rope_ratio=0.0)).pairs == {
        stored.name: pairs
    }
    plan = plan_ranks([stored], {stored.name: spectra_by(None, EIGHT, pairs=zeros)}, Rule(ratio=0.5))
    assert plan.pairs == {stored.name: pairs}
    assert plan.ranks[stored.name]["qk"] == (4, 4)
    assert RankPlan.stored([stored, BIASED]) == plan_by(
        {stored.name: (4, 4), BIASED.name: (3, 3)},
        {stored.name: (8, 8), BIASED.name: (3, 3)},
        {stored.name: pairs},
    )
    mixed = plan_ranks(
        [replace(BIASED, layer=3), ROTATED],
        {replace(BIASED, layer=3).name: spectra_by(QK, VO), ROTATED.name: spectra_by(None, EIGHT, pairs=PAIRS)},
        Rule(rank=2, rope_ratio=0.5),
    )
    assert set(mixed.pairs) == {ROTATED.name}
    assert mixed.ranks[replace(BIASED, layer=3).name]["qk"] == (2, 2)
    with pytest.raises(UsageError, match="--rope-ratio"):
        plan_ranks([BIASED], spectra_of(BIASED), Rule(rope_ratio=0.5))


def test_the_largest_pairs_and_shares() -> None:
    found = largest_pairs(np.array([[9.0, 1, 8, 7], [1, 1, 1, 1], [0, 0, 0, 5]]), np.array([3, 2, 0]))
    assert found == ((range(0, 1), range(2, 4)), (range(0, 2),), ())
    ties = largest_pairs(np.tile([1.0, 3.0, 2.0], (1, 40)), np.array([60]))  # all of the 3.0, and the first 2.0
    assert ties == (
        (
            *(range(3 * place + 1, 3 * place + 3) for place in range(20)),
            *(range(place, place + 1) for place in range(61, 120, 3)),
        ),
    )
    assert all(type(run.start) is int for runs in found for run in runs)
    shares = pair_shares(np.array([[1.0, 3.0], [0.0, 0.0], [0.1, 0.1]]))
    assert shares.tolist() == [[0.25, 0.75], [0.0, 0.0], [0.5, 0.5]]


def test_no_other_choice_of_directions_has_a_smaller_sum() -> None:
    spectra = {"a": np.array([[4.0, 2.0], [3.0, 1.0]]), "b": np.array([[5.0, 2.5, 2.0]])}
    for count in range(7):
        kept = smallest_dropped(spectra, count / 7 + 1e-9)
        assert kept["a"].shape == (2,)
        assert kept["b"].shape == (1,)
        lost = sum(
            float(row[rank:].sum()) for name in spectra for row, rank in zip(spectra[name], kept[name], strict=True)
        )
        every = [float(v) for found in spectra.values() for v in found.ravel()]
        assert lost == min(sum(chosen) for chosen in combinations(every, count))
    equal = {"a": np.ones((2, 3)), "b": np.ones((1, 2))}
    assert {name: kept.tolist() for name, kept in smallest_dropped(equal, 0.5).items()} == {"a": [1, 1], "b": [2]} or (
        {name: kept.tolist() for name, kept in smallest_dropped(equal, 0.5).items()} == {"a": [1, 2], "b": [1]}
    )


def test_rules_as_text() -> None:
    assert str(Rule()) == str(Rule(lossless=True)) == "lossless"
    assert str(Rule(qk_thr=0.5, vo_thr=0.25)) == "qk_thr 0.5, vo_thr 0.25"
    assert str(Rule(ratio=0.0)) == "ratio 0"
    assert str(Rule(rank=3, round_to=2, min_rank=1, rope_ratio=0.25)) == (
        "rank 3, rope_ratio 0.25, round_to 2, min_rank 1"
    )
    assert str(Rule(target_size=123_456_789_012)) == "target_size 123456789012"


def test_criteria_that_exclude_each_other() -> None:
    with pytest.raises(UsageError, match=r"^--qk-thr/--vo-thr and --ratio cannot be combined") as caught:
        Rule(qk_thr=0.1, vo_thr=0.2, ratio=0.5)
    assert caught.value.hint == "give one of them"
    with pytest.raises(UsageError, match="excludes --rope-ratio"):
        Rule(target_params=0.5, rope_ratio=0.1)
    assert Rule(ratio=0.5, rope_ratio=0.1).given == ["ratio"]
    assert Rule(max_error=0.0).budgeted
    assert not Rule(ratio=0.0).budgeted
    assert Rule(lossless=True).given == ["lossless"]
    assert Rule().given == []
