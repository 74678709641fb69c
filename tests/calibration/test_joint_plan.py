"""Plans for a budget that are assembled and tried at the model's output, on held-out inputs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calibrating import batches
from calibrating import data as data
from harness import Pessa, TinyFolder, copy_of, edit_weights, is_refusal
from mlps import saved

from pessa_cli.calibration.collect import FOLDS, _sampled
from pessa_cli.calibration.joint_plan import OutputHarm, best_plan
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import quietly
from pessa_cli.models import windows
from pessa_cli.models.hooks import output_of
from pessa_cli.ranks.budget import candidates, ranks_for
from pessa_cli.ranks.plan import BY_LAYER, ONE_WIDTH, OVERFITTED, Comparison, RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.run import Run

RULE = Rule(target_layers=0.7)


@contextmanager
def decomposed(model: Model) -> Iterator[Decomposition]:
    with decomposition_of(model, Run(), reuse=True) as found:
        found.decompose(model.sites)
        yield found


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_harm_is_that_of_the_written_model(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """For logits the KL divergence per token; nothing is lost with the whole model, and more with a smaller one."""
    model = open_model(tiny_folder(name))
    loaded = tiny.load(tiny_folder(name))
    inputs = [tiny.inputs(loaded)]
    with torch.no_grad():
        kind, before = output_of(loaded, inputs[0])
    with decomposed(model) as found, OutputHarm(loaded, model.sites, inputs, found) as harm:
        plans = [ranks_for(model.sites, found.spectra, Rule(target_layers=share), model.size) for share in (0.8, 0.5)]
        harms = [harm.of(plan) for plan in (RankPlan.full(model.sites), *plans)]
        assert harms[0] < 1e-6 < harms[1] < harms[2]
        assert harm.of(RankPlan.full(model.sites)) < 1e-6  # what was cut before is back
    prune_model(model, tmp_path / "out", Rule(target_layers=0.8), model.sites)
    with torch.no_grad():
        _, after = output_of(tiny.load(tmp_path / "out"), inputs[0])
    if kind == "logits":
        first, second = before.double().log_softmax(-1), after.double().log_softmax(-1)
        expected = float((first.exp() * (first - second)).sum(-1).mean())
    else:
        expected = float((before - after).norm() / before.norm())
    assert harms[1] == pytest.approx(expected, rel=1e-3)


@dataclass
class Told:
    """In place of measurements: the harm of each plan is what the test says, in the order of the calls."""

    harms: list[float]
    unit: str = "logits"
    asked: list[RankPlan] = field(default_factory=list)

    def of(self, plan: RankPlan) -> float:
        self.asked.append(plan)
        return self.harms[len(self.asked) - 1]


@pytest.mark.parametrize("least", [0, 1, 2])
def test_the_plan_of_least_harm_is_taken(least: int, tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("bert"))
    with decomposed(model) as found:
        named = candidates(model.sites, found.spectra, RULE, model.size)
        told: Any = Told([0.1 if place == least else 0.2 for place in range(len(named))])
        taken = best_plan(told, model.sites, found.spectra, RULE, model.size, quietly)
    assert told.asked == list(named.values())
    assert taken.taken == list(named)[least]
    assert taken.plan == list(named.values())[least]
    assert dict(zip(named, told.harms, strict=True)) == taken.harms


def test_max_error_is_the_harm_to_the_output(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, pessa: Pessa
) -> None:
    folder, given = tiny_folder("llama"), [argument for path in data for argument in ("--calibrate", path)]
    sizes = []
    for most in (1e-4, 1e-2):
        out = tmp_path / str(most)
        done = pessa("prune", folder, *given, "--max-error", most, "-o", out)
        assert done.code == 0, done
        manifest = json.loads((out / "pessa.json").read_text())
        compared = manifest["compared"]
        assert compared["unit"] == "nats per token"
        assert 0 <= compared["harms"][compared["taken"]] <= most
        sizes.append(open_model(out).parameters)
    assert sizes[1] < sizes[0] < open_model(folder).parameters
    is_refusal(pessa("prune", folder, "--max-error", 0.1, "-o", tmp_path / "no"), "--calibrate DATA", code=2)


def test_no_plan_has_so_little_harm(tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("bert"))
    told: Any = Told([0.5] * 100)
    with decomposed(model) as found, pytest.raises(PessaError, match=r"--max-error 0.1: .* at least 0.5"):
        best_plan(told, model.sites, found.spectra, Rule(max_error=0.1), model.size, quietly)


def test_a_budget_with_data_compares_plans(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, pessa: Pessa
) -> None:
    folder, given = tiny_folder("bert"), [argument for path in data for argument in ("--calibrate", path)]
    done = pessa("prune", folder, *given, "--target-layers", 0.7, "-o", tmp_path / "out")
    assert done.code == 0, done
    compared = json.loads((tmp_path / "out" / "pessa.json").read_text())["compared"]
    harms = compared["harms"]
    assert len(harms) == 5
    assert harms[compared["taken"]] == min(harms.values())
    assert f"{compared['taken']} (taken)" in done.err


def test_little_data_are_told_from_enough(
    data: list[Path], tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one input of 20 tokens tells is not true of another; of equal inputs nothing is unseen."""
    folder = saved("llama", tmp_path / "model")
    edit_weights(lambda tensors: tensors["lm_head.weight"].mul_(20))(folder)
    given = [argument for path in data[:2] for argument in ("--calibrate", path)]
    for enough in (False, True):
        if enough:
            monkeypatch.setattr(windows, "inputs_of", lambda model, *_: iter(batches(model)[:1]))
        out = tmp_path / str(enough)
        done = pessa("prune", folder, *given, "--target-layers", 0.9, "--json", "-o", out)
        assert done.code == 0, done
        compared = json.loads((out / "pessa.json").read_text())["compared"]
        unseen, seen = compared["harms"][compared["taken"]], compared["harm_on_seen_inputs"]
        warned = f"harm {unseen:.2g} on inputs not seen, {seen:.2g} on inputs seen (2 characters of text)"
        assert (warned in done.err) != enough
        assert (unseen > OVERFITTED * seen) != enough


@pytest.mark.parametrize(
    ("unseen", "seen", "warns"),
    [(0.12, 0.01, True), (0.12, 0.119, False), (0.12, None, False), (1e-3, 1e-5, False)],
)
def test_when_more_data_would_help(unseen: float, seen: float | None, warns: bool) -> None:
    found = Comparison(RankPlan({}), "by price", {"by price": unseen, "the same share": 1.0}, "nats", seen, "3 minutes")
    expected = "more calibration data would help: harm 0.12 on inputs not seen, 0.01 on inputs seen (3 minutes)"
    assert found.warning == (expected if warns else None)
    assert ("harm_on_seen_inputs" in found.to_dict()) == (seen is not None)


@pytest.mark.parametrize("rule", [replace(RULE, uniform=True), Rule(max_error=0.1, uniform=True)], ids=str)
def test_one_width_is_taken_although_widths_by_layer_do_less_harm(rule: Rule, tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("bert"))
    told: Any = Told([0.06, 0.03] * 100)
    with decomposed(model) as found:
        taken = best_plan(told, model.sites, found.spectra, rule, model.size, quietly)
    assert (taken.taken, taken.harms) == (ONE_WIDTH, {ONE_WIDTH: 0.06, BY_LAYER: 0.03})
    assert taken.plan in told.asked[::2]
    for seam in ("qk", "vo", "mlp"):
        kept = {rank for site in model.sites for rank in taken.plan.ranks[site.name].get(seam, ())}
        assert len(kept) == 1


@pytest.mark.parametrize(("length", "fewest", "most"), [(512, 5, 8), (20, 103, 204), (3000, 5, 8)])
def test_how_many_inputs_are_tried(length: int, fewest: int, most: int) -> None:
    """Eight, evenly spaced; or as many as have 4,096 tokens together, since a few short ones tell little."""
    inputs = [({"input_ids": torch.full((1, length), number)}, 1) for number in range(2000)]
    samples: list[Any] = []
    assert len(list(_sampled(inputs, samples, 1))) == len(inputs)
    assert fewest <= len(samples) <= most
    numbers = [int(given["input_ids"][0, 0]) for given in samples]
    steps = {later - earlier for earlier, later in pairwise(numbers)}
    assert len(steps) == 1
    assert numbers[0] == 1
    assert steps.pop() % FOLDS == 0


def test_of_one_input_nothing_is_held_out(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, pessa: Pessa
) -> None:
    done = pessa("prune", tiny_folder("llama"), "--calibrate", data[0], "--target-layers", 0.8, "-o", tmp_path / "out")
    assert done.code == 0, done
    assert "plans tried on the calibration data" in done.err
    assert "with one input none can be held out" in done.err
    assert json.loads((tmp_path / "out" / "pessa.json").read_text())["compared"]["held_out"] is False


@pytest.mark.parametrize("finite", [0, 1])
def test_a_plan_whose_outputs_are_not_finite_is_never_taken(finite: int, tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("bert"))
    with decomposed(model) as found:
        told: Any = Told([0.5 if place == 2 and finite else math.inf for place in range(5)])
        if not finite:
            with pytest.raises(PessaError, match="are not finite"):
                best_plan(told, model.sites, found.spectra, RULE, model.size, quietly)
            return
        taken = best_plan(told, model.sites, found.spectra, RULE, model.size, quietly)
    assert taken.harms[taken.taken] == 0.5


def test_outputs_that_are_not_finite_do_infinite_harm(tiny_folder: TinyFolder) -> None:
    model, loaded = open_model(tiny_folder("llama")), tiny.load(tiny_folder("llama"))
    inputs = [tiny.inputs(loaded)]
    with decomposed(model) as found, OutputHarm(loaded, model.sites, inputs, found) as harm:
        loaded.model.norm.weight.data[0] = math.nan
        assert harm.of(RankPlan.full(model.sites)) == math.inf


def test_a_model_whose_outputs_are_not_finite(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, pessa: Pessa
) -> None:
    folder = copy_of(tiny_folder("llama"), tmp_path / "model")
    edit_weights(lambda tensors: tensors["model.norm.weight"].fill_(math.nan))(folder)
    given = [argument for path in data for argument in ("--calibrate", path)]
    is_refusal(pessa("prune", folder, *given, "--target-layers", 0.8, "-o", tmp_path / "out"), "are not finite")
    assert not (tmp_path / "out").exists()
