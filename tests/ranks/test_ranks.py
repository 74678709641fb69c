"""Rules applied to small hand-written spectra, whose correct ranks are easy to count."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from sites import SITE, plan_by, spectra_by

from pessa_cli.blocks.site import AttentionSite
from pessa_cli.checkpoint.dtypes import UNIT_ROUNDOFF
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.ranks.plan import plan_ranks
from pessa_cli.ranks.rule import Rule

QK = [[4.0, 3.0, 2.0, 1.0], [0.4, 0.3, 0.2, 0.0]]
VO = [[8.0, 6.0, 1e-9, 0.0], [5.0, 5.0, 5.0, 5.0]]


def planned(
    rule: Rule, site: AttentionSite = SITE, qk: Any = QK, vo: Any = VO
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    spectra = {site.name: spectra_by(None if qk is None else np.array(qk), np.array(vo))}
    plan = plan_ranks([site], spectra, rule)
    return plan.ranks[site.name]["qk"], plan.ranks[site.name]["vo"]


@pytest.mark.parametrize(
    ("rule", "qk", "vo"),
    [
        (Rule(qk_thr=0.3, vo_thr=5.0), (4, 1), (2, 0)),  # values above the threshold are kept, equal ones are not
        (Rule(qk_thr=0.25), (4, 2), (4, 4)),  # the other side is not pruned
        (Rule(vo_thr=0.0), (4, 4), (3, 4)),
        (Rule(ratio=0.0), (4, 4), (4, 4)),
        (Rule(ratio=0.25), (4, 2), (2, 4)),
        (Rule(ratio=0.5), (4, 0), (2, 2)),  # of equal values the later in a head is dropped first
        (Rule(ratio=0.99), (1, 0), (1, 0)),
        (Rule(rank=3), (3, 3), (3, 3)),
        (Rule(rank=9), (4, 4), (4, 4)),
        (Rule(energy=0.5), (1, 1), (1, 2)),
        (Rule(energy=0.9), (3, 3), (2, 4)),
        (Rule(energy=1.0), (4, 3), (3, 4)),
        (Rule(), (4, 3), (2, 4)),  # 1e-9 is below the float32 rounding error of 10
        (Rule(qk_thr=0.3, vo_thr=5.0, round_to=2), (4, 2), (2, 0)),  # dropped directions stay dropped
        (Rule(qk_thr=0.3, vo_thr=5.0, round_to=3), (4, 3), (3, 0)),
        (Rule(qk_thr=0.3, vo_thr=5.0, min_rank=2), (4, 2), (2, 2)),
        (Rule(rank=1, min_rank=9), (4, 4), (4, 4)),
    ],
)
def test_rules(rule: Rule, qk: tuple[int, ...], vo: tuple[int, ...]) -> None:
    assert planned(rule) == (qk, vo)


@pytest.mark.parametrize("dtype", list(UNIT_ROUNDOFF))
def test_lossless_drops_tails_just_below_the_rounding_of_the_dtype(dtype: str) -> None:
    site = replace(SITE, dtype=dtype)
    for tail, rank in ((0.9, 1), (1.1, 2)):
        small = tail * UNIT_ROUNDOFF[dtype] / math.sqrt(2)
        assert planned(Rule(), site, [[1.0, small, small, 0.0]] * 2)[0] == (rank, rank)


def test_ratio_compares_directions_over_all_blocks_but_never_qk_with_vo() -> None:
    sites = [SITE, replace(SITE, layer=1)]
    spectra = {
        sites[0].name: spectra_by(np.full((2, 4), 1.0), np.full((2, 4), 100.0)),
        sites[1].name: spectra_by(np.full((2, 4), 2.0), np.full((2, 4), 50.0)),
    }
    plan = plan_ranks(sites, spectra, Rule(ratio=0.5))
    assert plan == plan_by(
        qk={sites[0].name: (0, 0), sites[1].name: (4, 4)}, vo={sites[0].name: (4, 4), sites[1].name: (0, 0)}
    )


def test_without_a_qk_spectrum_qk_is_not_pruned() -> None:
    assert planned(Rule(ratio=0.5), qk=None) == ((4, 4), (2, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"qk_thr": -1.0},
        {"vo_thr": math.nan},
        {"vo_thr": math.inf},
        {"ratio": 1.0},
        {"ratio": -0.1},
        {"energy": 0.0},
        {"energy": 1.5},
        {"rank": 0},
        {"round_to": 0},
        {"min_rank": -1},
        {"ratio": 0.1, "rank": 3},
        {"qk_thr": 0.1, "energy": 0.5},
    ],
)
def test_invalid_rules_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Rule(**options)


@pytest.mark.parametrize(("rule", "side"), [(Rule(qk_thr=5.0), "Q-K"), (Rule(vo_thr=9.0), "V-O")])
def test_pruning_everything_is_an_error_that_names_the_largest_value(rule: Rule, side: str) -> None:
    with pytest.raises(PessaError, match=f"all of {side}.*{4 if side == 'Q-K' else 8}"):
        planned(rule)


@pytest.mark.parametrize("rule", [Rule(), Rule(energy=0.5), Rule(energy=1.0)])
def test_a_head_of_zeros_keeps_nothing_and_is_no_division_by_zero(rule: Rule) -> None:
    qk = [[0.0] * 4, [0.4, 0.3, 0.2, 0.1]]
    with np.errstate(all="raise"):
        ranks = [planned(rule, qk=qk)[0] for _ in range(5)]
    assert {head for head, _ in ranks} == {0}
    assert all(other > 0 for _, other in ranks)
