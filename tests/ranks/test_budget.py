"""Budgets: the directions with the lowest price are dropped, as many as needed, within the allowed errors."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from calibrating import batches, block_errors, collected
from harness import Pessa, TinyFolder, is_refusal
from sites import SITE, ranks_by, spectra_by, trials_by

from pessa_cli.blocks.site import AttentionSite
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.ranks.budget import ordered_steps, ranks_for, trade_off
from pessa_cli.ranks.cost import UnmetBudgetError
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import LEVELS, Size, Spectra, Trials
from pessa_cli.surgery.decomposition import measure
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

SITES = [SITE, replace(SITE, layer=1)]
WHOLE = Size(1000, 4000)
EACH = 16  # the parameters of one direction of SITE, the same for Q-K and V-O


def spectra_of(
    first: float, second: float, trials: tuple[Trials | None, Trials | None] = (None, None)
) -> dict[str, Spectra]:
    """Return the spectra of two blocks, geometric with these ratios."""
    made = {}
    for site, ratio, known in zip(SITES, (first, second), trials, strict=True):
        values = np.stack([ratio ** np.arange(4.0), 0.9 * ratio ** np.arange(4.0)])
        made[site.name] = spectra_by(values, values.copy(), known is not None, known)
    return made


def left(plan: RankPlan, sites: list[AttentionSite]) -> int:
    return EACH * sum(sum(plan.ranks[s.name]["qk"]) + sum(plan.ranks[s.name]["vo"]) for s in sites)


@pytest.mark.parametrize("share", [1.0, 0.9, 0.5, 0.26, 0.07])
def test_a_share_of_attention_is_kept_and_no_more(share: float) -> None:
    plan = ranks_for(SITES, spectra_of(0.5, 0.7), Rule(target_attention=share), WHOLE)
    whole = EACH * 32
    assert share * whole - EACH < left(plan, SITES) <= share * whole


def test_params_and_sizes_count_the_whole_model() -> None:
    spectra = spectra_of(0.5, 0.7)
    for rule in (Rule(target_params=0.8), Rule(target_size=3200)):
        assert (
            left(ranks_for(SITES, spectra, rule, WHOLE), SITES) == EACH * 32 - 13 * EACH
        )  # the 200 parameters to drop are 12.5 directions
    with pytest.raises(PessaError, match="520 remain"):
        ranks_for(SITES, spectra, Rule(target_params=0.4), WHOLE)
    with pytest.raises(PessaError, match="2,080 remain"):
        ranks_for(SITES, spectra, Rule(target_size=100), WHOLE)


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        (Rule(target_attention=0.0625), True),  # two of 32 directions
        (Rule(target_attention=0.06), False),
        (Rule(target_attention=0.001), False),
        (Rule(target_params=0.52), True),
        (Rule(target_params=0.5), False),
        (Rule(target_size=2080), True),
        (Rule(target_size=2079), False),
    ],
    ids=str,
)
def test_a_budget_never_prunes_all_of_qk_or_of_vo(rule: Rule, fits: bool) -> None:
    """One direction of each remains, the most valuable one; a smaller budget is an error with both numbers."""
    spectra = spectra_of(0.5, 0.7)
    if fits:
        plan = ranks_for(SITES, spectra, rule, WHOLE)
        assert [sum(map(sum, side.values())) for side in (ranks_by(plan, "qk"), ranks_by(plan, "vo"))] == [1, 1]
    else:
        with pytest.raises(UnmetBudgetError, match=r"the budget is [\d,]+ of [\d,]+ .*, but [\d,]+ remain"):
            ranks_for(SITES, spectra, rule, WHOLE)
    points = trade_off(SITES, spectra, Rule(), WHOLE, points=32)
    assert points[-1].chosen == 2 * EACH


@pytest.mark.parametrize("option", ["rank", "min_rank"])
def test_a_rank_larger_than_every_head_is_refused(option: str) -> None:
    for rank in (4, 5):
        rule = Rule(rank=rank) if option == "rank" else Rule(min_rank=rank)
        if rank == 4:
            assert ranks_for(SITES, spectra_of(0.5, 0.7), rule, WHOLE).ranks[SITE.name]["vo"] == (4, 4)
        else:
            with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} 5: the largest head has 4"):
                ranks_for(SITES, spectra_of(0.5, 0.7), rule, WHOLE)


def test_the_cheapest_directions_of_all_blocks_are_dropped_first() -> None:
    """No dropped direction has a larger share than a kept one, so no plan of the same size drops a smaller sum."""
    spectra = spectra_of(0.3, 0.9)
    plan = ranks_for(SITES, spectra, Rule(target_attention=0.5), WHOLE)
    shares = {name: found.seams["vo"] ** 2 / (found.seams["vo"] ** 2).sum() for name, found in spectra.items()}
    kept = [shares[s.name][h, r] for s in SITES for h, rank in enumerate(plan.ranks[s.name]["vo"]) for r in range(rank)]
    gone = [
        shares[s.name][h, r] for s in SITES for h, rank in enumerate(plan.ranks[s.name]["vo"]) for r in range(rank, 4)
    ]
    assert max(gone) <= min(kept)
    assert sum(plan.ranks[SITES[0].name]["vo"]) < sum(plan.ranks[SITES[1].name]["vo"])


def test_trials_take_precedence_over_the_spectrum() -> None:
    tried = tuple(0.01 * level for level in LEVELS)
    cheap, dear = trials_by(tried, tried, 1.0), trials_by(tuple(100 * e for e in tried), tried, 1.0)
    plan = ranks_for(SITES, spectra_of(0.7, 0.7, (cheap, dear)), Rule(target_attention=0.6), WHOLE)
    assert sum(plan.ranks[SITES[0].name]["qk"]) < sum(plan.ranks[SITES[1].name]["qk"]) == 8
    harmful = replace(cheap, harm=1e3)
    plan = ranks_for(SITES, spectra_of(0.7, 0.7, (harmful, cheap)), Rule(target_attention=0.6), WHOLE)
    assert plan.ranks[SITES[0].name]["vo"] == (4, 4)
    assert sum(plan.ranks[SITES[1].name]["vo"]) < 8


def test_predicted_errors_interpolate_the_trials() -> None:
    tried = (0.001, 0.004, 0.02, 0.3)
    spectra = spectra_of(0.6, 0.8, (trials_by(tried, tried, 2.0), trials_by(tried, tried, 2.0)))
    steps = [s for s in ordered_steps(SITES, spectra, Rule()) if (s.site, s.seam.name) == (SITES[1], "vo")]
    assert [step.price for step in steps] == sorted(step.price for step in steps)
    sums = np.cumsum([step.error for step in steps])
    assert sums[3] == pytest.approx(0.02)  # half of eight directions
    assert sums[5] == pytest.approx(0.3)
    assert 0.3 < sums[6] < sums[7] < 1


@pytest.mark.parametrize("step", [1, 2, 3, 8])
@pytest.mark.parametrize("least", [0, 1, 3])
def test_ranks_respect_round_to_and_min_rank(step: int, least: int) -> None:
    rule = Rule(target_attention=0.7, round_to=step, min_rank=least)
    allowed = {max(least, min(4, multiple)) for multiple in range(0, 9, step)} | {4}
    try:
        plan = ranks_for(SITES, spectra_of(0.5, 0.7), rule, WHOLE)
    except UnmetBudgetError:
        assert least == 3  # the minimum of three of four directions per head is more than 70 %
        return
    assert {
        rank for side in (ranks_by(plan, "qk"), ranks_by(plan, "vo")) for ranks in side.values() for rank in ranks
    } <= allowed


def test_max_error_cannot_be_planned_without_trials() -> None:
    with pytest.raises(UsageError, match="--max-error needs trials on calibration data"):
        ranks_for(SITES, spectra_of(0.5, 0.7), Rule(max_error=0.1), WHOLE)


def test_the_trade_off_curve_is_monotonic() -> None:
    points = trade_off(SITES, spectra_of(0.5, 0.7), Rule(), WHOLE, points=8)
    assert points[0].chosen == EACH * 32
    assert points[0].parameters == 1000
    assert all(a.chosen > b.chosen and a.error <= b.error and a.harm <= b.harm for a, b in pairwise(points))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_trials_are_the_errors_of_pruned_blocks(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    """Trials measure the first block's error with half of V-O dropped, and the KL divergence from pruning one block."""
    folder = tiny_folder(name)
    model = open_model(folder)
    found = collected(model, data, tmp_path / "s")
    spectra = measure(model, model.attention, statistics=found)
    site = model.attention[0]
    trials = spectra[site.name].trials
    assert trials is not None
    assert list(trials.errors["vo"]) == sorted(trials.errors["vo"])
    prune_model(model, tmp_path / "half", Rule(ratio=0.5), [site], layout="dense", statistics=found)
    assert 0 < trials.errors["vo"][2] < 1
    outputs = []
    for made in (folder, tmp_path / "half"):
        loaded = tiny.load(made)
        seen: list[torch.Tensor] = []
        o = next(module for n, module in loaded.named_modules() if n.endswith(site.o))
        o.register_forward_hook(lambda _m, _a, output, seen=seen: seen.append(output.flatten()))
        with torch.no_grad():
            for given in batches(loaded):
                loaded(**given)
        outputs.append(torch.cat(seen))
    both = float((outputs[0] - outputs[1]).norm() / outputs[0].norm())
    pruned_too = sum(trials.errors[seam][2] for seam in spectra[site.name].seams)  # not Q-K by frequency pairs
    # Trials use held-out inputs, and the statistics of the others.
    assert 0.2 * pruned_too < both**2 < 1.2 * pruned_too


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_budgets_are_better_than_equal_shares(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    model = open_model(folder)
    found = collected(model, data, tmp_path / "s")
    budget = Rule(target_attention=0.7)
    written = prune_model(model, tmp_path / "budget", budget, model.attention, statistics=found)
    assert str(budget) in json.dumps(written.summary)
    same = Rule(ratio=0.3, rope_ratio=0.3 if name == "llama" else None)
    prune_model(model, tmp_path / "same", same, model.attention, statistics=found)
    assert open_model(tmp_path / "budget").parameters <= open_model(tmp_path / "same").parameters + 100
    assert block_errors(tmp_path / "budget", folder) < 1.05 * block_errors(tmp_path / "same", folder)


def test_the_commands(tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, pessa: Pessa) -> None:
    folder, file, out = tiny_folder("bert"), tmp_path / "s.safetensors", tmp_path / "out"
    given = [argument for path in data for argument in ("--calibrate", path)]
    curve = pessa(
        "inspect", folder, *given, "--sites", "all", "--statistics", file, "--curve", "--plot", tmp_path / "curve.png"
    )
    assert curve.code == 0, curve
    assert "harm" in curve.out
    assert (tmp_path / "curve.png").stat().st_size > 1000
    points = json.loads(pessa("inspect", folder, "--statistics", file, "--curve", "--json").out)["curve"]
    assert points[0]["harm"] == 0 < points[-1]["harm"]
    whole = open_model(folder)
    most = whole.nbytes // 1000 - 10  # kB
    assert pessa("prune", folder, "-o", out, "--force", "--statistics", file, "--target-params", "0.9").code == 0
    largest = 32 + 32  # parameters of one direction, which is what may be cut too much
    assert 0.9 * whole.parameters - largest < open_model(out).parameters <= 0.9 * whole.parameters
    assert pessa("prune", folder, "-o", out, "--force", "--statistics", file, "--target-size", f"{most}kB").code == 0
    assert 1000 * most - 4 * largest < open_model(out).nbytes <= 1000 * most
    assert pessa("prune", folder, "-o", out, "--force", "--statistics", file, "--target-layers", "0.8").code == 0
    assert pessa("decompose", folder, "-o", tmp_path / "full", "--sites", "all", "--statistics", file).code == 0
    again = pessa("prune", tmp_path / "full", "-o", tmp_path / "cut", "--target-layers", "0.8")
    assert again.code == 0, again
    assert math.isclose(open_model(tmp_path / "cut").parameters, open_model(out).parameters, rel_tol=0.01)
    no = tmp_path / "no"
    is_refusal(pessa("prune", folder, "-o", no, "--statistics", file, "--max-error", "0.2"), "--calibrate", code=2)
    is_refusal(pessa("prune", folder, "-o", no, "--target-params", "0.1"), "0.1", code=1)
    is_refusal(pessa("prune", folder, "-o", no, "--target-params", "1.1"), "--target-params", code=2)
    is_refusal(pessa("prune", folder, "-o", no, "--target-size", "big"), "--target-size", code=2)
    is_refusal(pessa("prune", folder, "-o", no, "--max-error", "0.1"), "--max-error", code=2)
    is_refusal(pessa("prune", folder, "-o", no, "--ratio", "0.1", "--target-params", "0.9"), "--ratio", code=2)
    is_refusal(pessa("prune", folder, "-o", no, "--max-wer-increase", "1"), "--evaluate", code=2)
    is_refusal(pessa("prune", folder, "-o", no, "--max-wer-increase", "1", "--evaluate", file), "speech", code=2)
    assert not no.exists()
