"""Budgets over attention and MLPs, one width for all layers, and the plans that trials compare."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sites import SITE, spectra_by

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_table import MLPS
from pessa_cli.blocks.site import Site, count
from pessa_cli.checkpoint.dtypes import UNIT_ROUNDOFF
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.ranks.budget import candidates, ordered_moves, predicted, ranks_for
from pessa_cli.ranks.cost import UnmetBudgetError
from pessa_cli.ranks.plan import BY_LAYER, ONE_WIDTH, PREDICTED, RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Size, Spectra, Trials

MLP = MlpSite(
    spec=MLPS["whisper"][0],
    layer=0,
    into=("fc1",),
    out="fc2",
    width=16,
    input_width=8,
    output_width=8,
    kept=16,
    biases=frozenset(),
    dtype="F32",
)
SITES: list[Site] = [SITE, replace(SITE, layer=1), MLP, replace(MLP, layer=1)]
WHOLE = Size(2000, 8000)


def spectra(second: float = 1.0) -> dict[str, Spectra]:
    """Return spectra with trials in which what the second layer loses does `second` times the harm."""
    found = {}
    for layer, harm in enumerate((1.0, second)):
        heads = np.linspace(2, 1, 4) * np.ones((2, 1))
        tried = (0.01, 0.03, 0.1, 0.3)
        trials = Trials({"qk": tried, "vo": tried}, harm)
        found[f"{SITE.kind}.{layer}"] = spectra_by(heads, heads, True, trials)
        channels = {"mlp": np.linspace(3, 1, 16)[None]}
        found[f"{MLP.kind}.{layer}"] = Spectra(channels, True, Trials({"mlp": tried}, harm))
    return found


def share(plan: RankPlan, sites: list[Site] = SITES) -> float:
    return sum(count(plan.kept(site).tensors) for site in sites) / sum(count(site.tensors) for site in sites)


def test_a_budget_is_shared_by_attention_and_mlps() -> None:
    for target in (0.9, 0.7, 0.5):
        plan = ranks_for(SITES, spectra(), Rule(target_layers=target), WHOLE)
        assert target - 0.02 < share(plan) <= target
        assert share(plan, SITES[:2]) < 1 > share(plan, SITES[2:])
    dear = ranks_for(SITES, spectra(100.0), Rule(target_layers=0.7), WHOLE)
    assert share(dear, SITES[::2]) < share(dear, SITES[1::2])  # the harm decides between the layers


def test_an_mlp_keeps_a_channel_and_no_budget_is_met_below_that() -> None:
    with pytest.raises(UnmetBudgetError):
        ranks_for(SITES[2:], spectra(), Rule(target_layers=0.05), WHOLE)
    plan = ranks_for(SITES[2:], spectra(), Rule(target_layers=1 / 16), WHOLE)
    assert plan.ranks == {site.name: {"mlp": (1,)} for site in SITES[2:]}


@pytest.mark.parametrize("step", [1, 4])
def test_uniform_widths_are_those_of_all_layers_and_heads(step: int) -> None:
    rule = Rule(target_layers=0.7, uniform=True, round_to=step)
    plan = ranks_for(SITES, spectra(100.0), rule, WHOLE)
    assert share(plan) <= 0.7
    for seam, sites in (("qk", SITES[:2]), ("vo", SITES[:2]), ("mlp", SITES[2:])):
        widths = {rank for site in sites for rank in plan.ranks[site.name][seam]}
        assert len(widths) == 1
        assert {width % step for width in widths} == {0}
    moves = list(ordered_moves(SITES, spectra(), rule))
    assert sum(step.parameters for move in moves for step in move) < sum(count(site.tensors) for site in SITES)
    assert len({step.rank for move in moves[:1] for step in move}) == 1


def test_uniform_is_for_budgets() -> None:
    with pytest.raises(UsageError, match="--uniform is for a budget"):
        Rule(ratio=0.3, uniform=True)


def test_the_plans_to_compare_have_the_same_size() -> None:
    found = candidates(SITES, spectra(100.0), Rule(target_layers=0.7), WHOLE)
    shares = ["the same share", "the same share, widths by price"]
    assert list(found) == ["by price", *shares, "attention alone", "MLPs alone"]
    assert all(0.6 < share(plan) <= 0.7 for plan in found.values())
    assert share(found["attention alone"], SITES[2:]) == share(found["MLPs alone"], SITES[:2]) == 1
    same = found["the same share"]
    assert {same.ranks[site.name]["mlp"] for site in SITES[2:]} == {(11,)}
    for name in shares:
        assert abs(share(found[name], SITES[:2]) - share(found[name], SITES[2:])) < 0.07
    assert list(candidates(SITES[:2], spectra(), Rule(target_layers=0.7), WHOLE)) == ["by price"]
    assert list(candidates(SITES[2:], spectra(), Rule(target_layers=0.7), WHOLE)) == ["by price", "the same share"]


def test_the_cost_of_one_width_is_predicted() -> None:
    """The plan that is taken has one width, and by the same spectra widths by layer would do less harm."""
    rule = Rule(target_layers=0.7, uniform=True)
    named = candidates(SITES, spectra(100.0), rule, WHOLE)
    assert list(named) == [ONE_WIDTH, BY_LAYER]
    assert all(0.6 < share(plan) <= 0.7 for plan in named.values())
    found = predicted(SITES, spectra(100.0), rule, WHOLE)
    assert found is not None
    assert (found.plan, found.taken, found.unit) == (named[ONE_WIDTH], ONE_WIDTH, PREDICTED)
    assert found.plan == ranks_for(SITES, spectra(100.0), rule, WHOLE) != named[BY_LAYER]
    assert found.harms[ONE_WIDTH] > found.harms[BY_LAYER] > 0
    assert predicted(SITES, spectra(), replace(rule, uniform=False), WHOLE) is None


@pytest.mark.parametrize(
    ("rule", "kept"),
    [
        (Rule(mlp_ratio=0.3), (12, 12)),
        (Rule(mlp_ratio=0.3, round_to=8), (16, 16)),
        (Rule(mlp_rank=5), (5, 5)),
        (Rule(mlp_thr=2.0), (8, 8)),
        (Rule(), (16, 16)),
        (Rule(ratio=0.5), (16, 16)),
    ],
    ids=str,
)
def test_channels_that_a_rule_keeps(rule: Rule, kept: tuple[int, int]) -> None:
    plan = ranks_for(SITES, spectra(), rule, WHOLE)
    assert tuple(plan.ranks[site.name]["mlp"][0] for site in SITES[2:]) == kept
    narrow: list[Site] = [replace(MLP, kept=4)]
    assert ranks_for(narrow, spectra(), replace(rule, ratio=None), WHOLE).ranks[MLP.name] == {"mlp": (4,)}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(
    ("rule", "site", "cut"),
    [
        (Rule(), MLP, True),
        (Rule(lossless=True, mlp_rank=15), MLP, False),
        (Rule(ratio=0.5), MLP, False),
        (Rule(), replace(MLP, zero_at_zero=False), False),
    ],
    ids=["lossless", "an MLP rule", "a rule for attention", "an activation that is not zero at zero"],
)
def test_the_lossless_rule_drops_the_tail_below_rounding(rule: Rule, site: MlpSite, cut: bool, dtype: str) -> None:
    sites: list[Site] = [SITE, replace(site, dtype=dtype)]
    for factor, kept in ((0.99, 12), (1.01, 13)):
        values = np.ones(16)
        values[12:] = factor * UNIT_ROUNDOFF[dtype] * 12**0.5 / 2  # of four values the norm is twice this
        for norms in (None, values):
            seams = {"mlp": values[None] if norms is None else np.linspace(3, 0, 16)[None]}
            found = spectra() | {MLP.name: Spectra(seams, norms is not None, norms=norms)}
            (width,) = ranks_for(sites, found, rule, WHOLE).ranks[MLP.name]["mlp"]
            assert width == (kept if cut else rule.mlp_rank or 16)


def test_no_mlp_is_left_without_channels() -> None:
    with pytest.raises(PessaError, match=r"without channels: its largest value is 3"):
        ranks_for(SITES, spectra(), Rule(mlp_thr=5.0), WHOLE)


def test_budgets_and_options_for_mlps_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--target-layers also chooses the widths of MLPs"):
        Rule(target_layers=0.5, mlp_ratio=0.3)
    with pytest.raises(UsageError, match="--mlp-ratio and --mlp-rank cannot be combined"):
        Rule(mlp_ratio=0.3, mlp_rank=4)
