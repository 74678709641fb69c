"""Budgets of work: the multiply-adds of blocks, worked out by hand, and the plans that meet such a budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import Pessa, TinyFolder, is_refusal
from sites import SITE, spectra_by

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_table import MLPS
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.blocks.table import ARCHITECTURES, TOWERS
from pessa_cli.common.errors import UsageError
from pessa_cli.ranks.budget import candidates, ordered_steps, ranks_for, trade_off
from pessa_cli.ranks.cost import UnmetBudgetError, check_budget
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Size, Spectra
from pessa_cli.ranks.work import HEARING, Work, check_work, work_of

ENCODER, DECODER, CROSS = (replace(SITE, spec=spec) for spec in ARCHITECTURES["whisper"])
MLP = MlpSite(MLPS["whisper"][0], 0, ("fc1",), "fc2", 16, 8, 8, 16, frozenset(), "F32")
SITES: list[Site] = [ENCODER, DECODER, CROSS, MLP, replace(MLP, spec=MLPS["whisper"][1])]
WORK = Work(frames=5, tokens=3)
WHISPER = Size(10_000, 40_000, "whisper")


def spectra() -> dict[str, Spectra]:
    heads = np.linspace(2, 1, 4) * np.ones((2, 1))
    return {
        site.name: spectra_by(heads, heads)
        if isinstance(site, AttentionSite)
        else Spectra({"mlp": np.linspace(3, 1, 16)[None]})
        for site in SITES
    }


def attention(site: AttentionSite, asking: float, read: float, pairs: float) -> float:
    """Return the multiply-adds of the matrices and products of a block in full, one matrix after the other."""
    slots, keys = site.heads * site.head_dim, site.kv_heads * site.head_dim
    matrices = asking * slots * (site.query_width + site.output_width) + read * keys * 2 * site.key_width
    return matrices + 2 * pairs * site.heads * site.head_dim


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        (ENCODER, attention(ENCODER, 5, 5, 25)),
        (DECODER, attention(DECODER, 3, 3, 1 + 2 + 3)),
        (CROSS, attention(CROSS, 3, 5, 15)),
        (SITES[3], 5 * 2 * 16 * 8),
        (SITES[4], 3 * 2 * 16 * 8),
    ],
    ids=lambda value: getattr(value, "kind", ""),
)
def test_multiply_adds_by_hand(site: Site, expected: float) -> None:
    assert WORK.multiply_adds(site, site.ranks) == expected
    assert replace(WORK, windows=4).multiply_adds(site, site.ranks) == 4 * expected
    none = {seam.name: (0,) * len(seam.ranks) for seam in site.seams}
    assert WORK.multiply_adds(site, none) == 0  # what is left costs in proportion to the ranks
    half = {seam.name: tuple(rank // 2 for rank in seam.ranks) for seam in site.seams}
    assert WORK.multiply_adds(site, half) == expected / 2


def test_a_fused_tensor_costs_what_its_parts_cost() -> None:
    fused = replace(ENCODER, spec=replace(ENCODER.spec, fused="blocks"), q="qkv", k="qkv", v="qkv")
    assert WORK.multiply_adds(fused, fused.ranks) == WORK.multiply_adds(ENCODER, ENCODER.ranks)


@pytest.mark.parametrize(
    ("rule", "model_type", "expected"),
    [
        ({}, "whisper", Work(1500, 100, 1)),
        ({"seconds": 10}, "whisper", Work(1500, 100 / 3, 1)),  # the window is padded
        ({"seconds": 45}, "whisper", Work(1500, 75, 2)),
        ({"seconds": 60, "tokens": 30}, "whisper", Work(1500, 15, 2)),
        ({"seconds": 10}, "wav2vec2", Work(500, 100 / 3, 1)),
        ({}, "llama", Work(512, 512, 1)),
        ({"tokens": 7}, "bart", Work(7, 7, 1)),
    ],
    ids=str,
)
def test_lengths_of_inputs(rule: dict[str, Any], model_type: str, expected: Work) -> None:
    found = Work.of(Rule(target_flops=0.5, **rule), Size(1, 1, model_type))
    assert (found.frames, found.windows) == (expected.frames, expected.windows)
    assert np.isclose(found.tokens, expected.tokens, rtol=1e-12)


def test_models_that_hear_are_in_the_table() -> None:
    assert set(HEARING) <= set(ARCHITECTURES)


def test_inputs_that_are_not_known_are_refused() -> None:
    with pytest.raises(UsageError, match="--seconds 3: the length of audio is not known for a model of type llama"):
        check_work(SITES, Rule(target_flops=0.5, seconds=3), Size(1, 1, "llama"))
    with pytest.raises(UsageError, match="--tokens 3 is the length of an input for --target-flops"):
        Rule(target_params=0.5, tokens=3)
    kinds = [replace(SITE.spec, kind=f"{tower.kind}.self") for tower in TOWERS["clip"]]
    both: list[Site] = [replace(SITE, spec=spec) for spec in kinds]
    with pytest.raises(UsageError, match=r"the parts of this model \(text, vision\) have lengths of their own"):
        check_work(both, Rule(target_flops=0.5), Size(1, 1, "clip"))
    check_work(both[:1], Rule(target_flops=0.5), Size(1, 1, "clip"))
    check_work(both, Rule(target_params=0.5), Size(1, 1, "clip"))


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("share", [0.9, 0.7, 0.5])
def test_a_budget_of_work_is_met(share: float, uniform: bool) -> None:
    rule = Rule(target_flops=share, uniform=uniform)
    plan = ranks_for(SITES, spectra(), rule, WHISPER)
    found = work_of(SITES, plan, rule, WHISPER)
    assert found is not None
    before, after = (
        sum(Work(1500, 100).multiply_adds(site, own.ranks[site.name]) for site in SITES)
        for own in (RankPlan.stored(SITES), plan)
    )
    assert (found["flops"], found["flops_after"]) == (2 * before, 2 * after)
    assert share - 0.15 < found["share"] == after / before <= share
    assert work_of(SITES, plan, Rule(target_layers=share), WHISPER) is None


def test_what_runs_more_often_is_cut_first() -> None:
    """The encoder reads 1,500 positions and the decoder few tokens; with many tokens it is the other way round."""
    for tokens, costly, cheap in ((1, ENCODER, DECODER), (300_000, DECODER, ENCODER)):
        plan = ranks_for(SITES, spectra(), Rule(target_flops=0.7, tokens=tokens), WHISPER)
        kept = [sum(sum(ranks) for ranks in plan.ranks[site.name].values()) for site in (costly, cheap)]
        assert kept[0] < kept[1] == 16
    same = ranks_for(SITES, spectra(), Rule(target_layers=0.7), WHISPER).ranks
    assert same[ENCODER.name] == same[DECODER.name]


def test_prices_are_harm_per_multiply_add() -> None:
    """Keys and values of cross-attention are computed once for a window, and its queries once for a token."""
    steps = {step.seam.name: step for step in ordered_steps([CROSS], spectra(), Rule(), WORK.multiply_adds)}
    for step in steps.values():
        heads, widths = CROSS.group, {"qk": CROSS.query_width, "vo": CROSS.output_width}
        cost = heads * 3 * widths[step.seam.name] + 5 * CROSS.key_width + heads * 15
        assert step.cost == cost
        assert step.price >= step.harm / cost
    curve = trade_off(SITES, spectra(), Rule(target_flops=0.5), WHISPER)
    assert curve != trade_off(SITES, spectra(), Rule(), WHISPER)


def test_the_plans_to_compare_have_the_same_work() -> None:
    rule = Rule(target_flops=0.7)
    found = candidates(SITES, spectra(), rule, WHISPER)
    shares = {name: (work_of(SITES, plan, rule, WHISPER) or {})["share"] for name, plan in found.items()}
    assert list(shares) == ["by price", "the same share", "the same share, widths by price", "attention alone"]
    assert all(0.6 < share <= 0.7 for share in shares.values()), shares


def test_the_share_is_shown_and_in_the_manifest(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder, out = tiny_folder("whisper"), tmp_path / "out"
    options = ("--target-flops", "0.8", "--tokens", "60", "--uniform")
    result = pessa("prune", folder, "-o", out, *options)
    assert result.code == 0, result.err
    manifest = json.loads((out / "pessa.json").read_text())
    work, harms = manifest["work"], manifest["compared"]["harms"]
    assert 0.7 < work["share"] == work["flops_after"] / work["flops"] <= 0.8
    assert (work["windows"], work["frames"], work["tokens"]) == (1, 1500, 60)
    assert f"({work['share']:.1%}) in these blocks" in result.out
    assert set(harms) == {"one width for all layers", "widths by layer"}
    assert f"{harms['one width for all layers']:.3g}  one width for all layers (taken)\n" in result.err
    assert f"{harms['widths by layer']:.3g}  widths by layer\n" in result.err
    found = json.loads(pessa("inspect", folder, *options, "--json").out)
    assert found["work"] == work
    assert found["compared"]["harms"] == pytest.approx(harms)


@pytest.mark.parametrize("command", ["prune", "inspect"])
@pytest.mark.parametrize("budget", ["--target-flops", "--target-layers", "--target-params"])
def test_a_budget_that_no_plan_meets_is_refused_before_the_work(
    command: str, budget: str, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pessa_cli.surgery.decomposition.decompose_block", lambda *_: pytest.fail("a block was read"))
    monkeypatch.setattr("pessa_cli.surgery.decomposition.spectra_of", lambda *_: pytest.fail("a block was read"))
    out = ("-o", tmp_path / "out") if command == "prune" else ()
    is_refusal(pessa(command, tiny_folder("whisper"), *out, budget, "1e-06"), f"{budget[2:].replace('-', '_')} 1e-06")


@pytest.mark.parametrize("name", ["target_flops", "target_layers"])
def test_the_early_check_refuses_only_what_no_plan_meets(name: str) -> None:
    """Just above what remains after all steps, a plan is found, and the early check agrees."""

    def rule(share: float) -> Rule:
        options: dict[str, Any] = {name: share}
        return Rule(min_rank=1, round_to=2, **options)

    with pytest.raises(UnmetBudgetError) as refused:
        ranks_for(SITES, spectra(), rule(1e-6), WHISPER)
    assert refused.value.hint is not None
    least = float(refused.value.hint.split()[1])  # rounded up to 0.001
    ranks_for(SITES, spectra(), rule(least), WHISPER)
    check_budget(SITES, rule(least), WHISPER)
    with pytest.raises(UnmetBudgetError):
        check_budget(SITES, rule(least - 0.002), WHISPER)
