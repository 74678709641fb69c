"""What `verify` proves of MLPs: equality up to the order of the channels that pessa.json holds, and differences."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from harness import Pessa, Tensors, copy_of, edit_json, edit_weights, is_refusal
from mlps import mlps_of, saved

from pessa_cli.checkpoint.manifest import MANIFEST_FILE
from pessa_cli.evaluation.report import Report
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import decompose_model, prune_model

BERT = "bert.encoder.layer.0"
NEAR = 1e-6


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("bert", tmp_path_factory.mktemp("original") / "model")


@pytest.fixture(scope="module")
def ordered(original: Path) -> Path:
    """The model with its channels in another order, and attention as it was."""
    out, model = original.parent / "ordered", open_model(original)
    decompose_model(model, out, [*mlps_of(model)])
    return out


def compared(reference: Path, candidate: Path, level: Any = "weights") -> Report:
    return verify_models(open_model(reference), open_model(candidate), level=level)


def errors(found: Report) -> dict[str, float]:
    return {each.where: each.error for each in found.weights if ".mlp." in each.where}


def norms(folder: Path, layer: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The norms of what writes each channel of an MLP, with its bias, and of what reads it, and of the output bias."""
    get, name = open_model(folder).reader.get, f"bert.encoder.layer.{layer}"
    rows, row_bias = (get(f"{name}.intermediate.dense.{part}").double() for part in ("weight", "bias"))
    out, bias = (get(f"{name}.output.dense.{part}").double() for part in ("weight", "bias"))
    return torch.cat([rows, row_bias.unsqueeze(1)], 1).norm(dim=1), out.norm(dim=0), bias.norm()


def numbers(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    return edit_json(lambda manifest: change(manifest["channels"]), MANIFEST_FILE)


def test_another_order_of_the_channels_is_the_same_model(original: Path, ordered: Path, pessa: Pessa) -> None:
    for level in ("weights", "blocks"):
        found = compared(original, ordered, level)
        assert found.same, found.failures
        assert set(errors(found)) == {
            f"encoder.mlp.{layer} {what}" for layer in (0, 1) for what in ("input", "output", "output bias")
        }
        assert set(errors(found).values()) == {0.0}
    assert compared(ordered, original).same
    assert compared(ordered, ordered).same
    done = pessa("verify", original, ordered, "--json")
    assert done.code == 0, done
    assert json.loads(done.out)["same"]


def test_without_or_with_other_numbers_the_weights_differ_but_not_the_function(
    original: Path, ordered: Path, tmp_path: Path, pessa: Pessa
) -> None:
    silent = copy_of(ordered, tmp_path / "silent")
    (silent / MANIFEST_FILE).unlink()
    found = compared(original, silent, "blocks")
    assert not found.same
    assert min(value for name, value in errors(found).items() if not name.endswith("bias")) > 0.5
    assert all(each.error < NEAR for each in found.blocks)  # only the numbers are missing

    def reverse(texts: dict[str, str]) -> None:
        texts["encoder.mlp.1"] = " ".join(reversed(texts["encoder.mlp.1"].split()))

    wrong = copy_of(ordered, tmp_path / "wrong")
    numbers(reverse)(wrong)
    found = compared(original, wrong)
    assert {name for name, value in errors(found).items() if value} == {"encoder.mlp.1 input", "encoder.mlp.1 output"}
    assert pessa("verify", original, wrong, "--level", "weights").code == 1


@pytest.mark.parametrize(
    ("tensor", "what"),
    [
        ("intermediate.dense.weight", "input"),
        ("intermediate.dense.bias", "input"),
        ("output.dense.weight", "output"),
        ("output.dense.bias", "output bias"),
    ],
)
def test_each_tensor_is_compared_and_located(
    tensor: str, what: str, original: Path, ordered: Path, tmp_path: Path
) -> None:
    changed = copy_of(ordered, tmp_path / "changed")

    def change(tensors: Tensors) -> None:
        tensors[f"{BERT}.{tensor}"].view(-1)[7] += 0.5

    edit_weights(change)(changed)
    written, read, bias = norms(ordered)
    place, whole = 0 if tensor == "intermediate.dense.weight" else 7, (written * read).norm()
    # What writes a channel counts times the norm of what reads it, and the other way round.
    reader = (whole**2 + bias**2) ** 0.5  # with its bias as one more column
    wanted = {"input": read[place] / whole, "output": written[place] / whole, "output bias": 1 / reader}[what] / 2
    found = errors(compared(original, changed))
    assert found.pop(f"encoder.mlp.0 {what}") == pytest.approx(float(wanted), rel=1e-5)
    assert set(found.values()) == {0.0}


@pytest.mark.parametrize("layout", ["compact", "dense"])
def test_of_cut_channels_exactly_what_they_held_is_missing(layout: Any, original: Path, tmp_path: Path) -> None:
    model = open_model(original)
    prune_model(model, tmp_path / "out", Rule(mlp_ratio=0.5), [*mlps_of(model)], layout=layout)
    found = compared(original, tmp_path / "out", "blocks")
    assert not found.same
    texts = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())["channels"]
    for site in mlps_of(model):
        kept = {int(number) for number in texts[site.name].split()}
        lost = torch.tensor([number not in kept for number in range(site.width)])
        assert int(lost.sum()) == site.width // 2
        written, read, _ = norms(original, site.layer)
        share = (written * read)[lost].norm() / (written * read).norm()
        wanted = {"output": share, "input": share, "output bias": 0.0}
        for what, value in wanted.items():
            assert errors(found)[f"{site.name} {what}"] == pytest.approx(float(value), rel=1e-6)
    assert all((each.error > 0.05) == (".mlp." in each.where) for each in found.blocks)
    assert compared(tmp_path / "out", tmp_path / "out").same


@pytest.mark.parametrize("name", ["whisper", "bert", "gptj", "phi3", "albert"])
def test_an_mlp_is_blamed_for_its_own_weights_alone(name: str, tmp_path: Path) -> None:
    """Each MLP gets the input of the reference's, also where its modules have no module of their own around them."""
    model = open_model(saved(name, tmp_path / "model"))
    prune_model(model, tmp_path / "attention", Rule(rank=2), [*model.attention])
    prune_model(model, tmp_path / "mlp", Rule(mlp_ratio=0.5), [*mlps_of(model)])
    for folder, mlp in (("attention", False), ("mlp", True)):
        found = compared(tmp_path / "model", tmp_path / folder, "blocks")
        assert {each.where for each in found.blocks} == {site.name for site in model.sites}
        for each in found.blocks:
            if (".mlp." in each.where) == mlp:
                assert each.error > 0.05, (folder, each)
            else:
                assert each.error < NEAR, (folder, each)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda texts: texts.update({"encoder.mlp.0": "1 1 2"}), "encoder.mlp.0"),
        (lambda texts: texts.update({"encoder.mlp.0": texts["encoder.mlp.0"] + " 48"}), "encoder.mlp.0"),
        (lambda texts: texts.update({"encoder.mlp.0": "-1 " + texts["encoder.mlp.0"][2:]}), "encoder.mlp.0"),
        (lambda texts: texts.update({"encoder.mlp.0": ""}), "encoder.mlp.0"),
        (lambda texts: texts.update({"encoder.mlp.0": None}), "encoder.mlp.0"),
        (lambda texts: texts.update({"encoder.self.0": texts["encoder.mlp.0"]}), "encoder.self.0"),
        (lambda texts: texts.update({"decoder.mlp.7": texts["encoder.mlp.0"]}), "decoder.mlp.7"),
    ],
)
def test_damaged_numbers_are_refused(
    change: Callable[[dict[str, Any]], object], culprit: str, ordered: Path, tmp_path: Path, pessa: Pessa
) -> None:
    numbers(change)(copy_of(ordered, tmp_path / "damaged"))
    is_refusal(pessa("inspect", tmp_path / "damaged"), MANIFEST_FILE, culprit)


def test_models_with_other_widths_are_not_compared(original: Path, tmp_path: Path, pessa: Pessa) -> None:
    tiny_models.build("bert", intermediate_size=40).save_pretrained(tmp_path / "narrow")
    is_refusal(pessa("verify", original, tmp_path / "narrow"), "encoder.mlp.0", "48 channels", "40 channels")
