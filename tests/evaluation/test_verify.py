"""What `verify` compares on, what it names, and what it suggests."""

from __future__ import annotations

import hashlib
import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from harness import WEIGHTS, Pessa, Tensors, TinyFolder, copy_of, edit_weights, is_refusal
from safetensors.torch import load_file
from tiny_models import build

import pessa_cli.models.inputs
from pessa_cli.evaluation.compare import run_both
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.models.hooks import block_squares
from pessa_cli.models.inputs import built_in_speech
from pessa_cli.surgery.model import open_model

CLIP = Path(pessa_cli.models.inputs.__file__).with_name("speech.wav")


def test_the_built_in_clip_is_the_one_whose_source_is_recorded() -> None:
    assert CLIP.with_suffix(".md").read_text().count("public domain") >= 2
    found = hashlib.sha256(CLIP.read_bytes()).hexdigest()
    assert found == "fcf6d86c9153f3a03b6db1122006028f75a06dfd98c90bb19165617cd89b7064"
    samples = built_in_speech()
    assert samples.shape == (80_000,)
    assert samples.dtype == np.float32
    assert 0.9 < abs(samples).max() <= 1
    assert abs(float(samples.mean())) < 0.02


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_outside_attention_that_are_not_finite_are_named(
    value: float, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    name = "bert.embeddings.word_embeddings.weight"
    folder = copy_of(tiny_folder("bert"), tmp_path / "broken")
    edit_weights(lambda tensors: tensors[name].view(-1)[3].fill_(value))(folder)
    for models in ((folder, tiny_folder("bert")), (tiny_folder("bert"), folder), (folder, folder)):
        is_refusal(pessa("verify", *models), name, "broken", "not finite")


def test_infinities_in_a_mask_are_allowed(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder("bert"), tmp_path / "masked")
    edit_weights(lambda tensors: tensors.update(mask=torch.full((3, 3), float("-inf"))))(folder)
    assert pessa("verify", folder, folder, "--level", "weights").code == 0


def test_a_missing_bias_is_a_difference(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    name = "bert.encoder.layer.0.attention.self.query.bias"
    folder = copy_of(tiny_folder("bert"), tmp_path / "less")
    edit_weights(lambda tensors: tensors.pop(name))(folder)
    for models in ((folder, tiny_folder("bert")), (tiny_folder("bert"), folder)):
        found = pessa("verify", *models, "--level", "weights", "--json")
        assert (found.code, list(json.loads(found.out)["unequal"])) == (1, [name])


@pytest.mark.parametrize("kind", ["bert", "llama", "whisper"])
def test_the_inputs_are_named(kind: str, tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder(kind))
    report = verify_models(model, model)
    assert report.same
    assert report.outputs is not None
    assert report.outputs.inputs == ("built-in speech" if kind == "whisper" else "random tokens")


def test_the_suggested_limits_accept_what_was_measured(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder, out = tiny_folder("whisper"), tmp_path / "out"
    written = pessa("prune", folder, "-o", out, "--ratio", "0.3").err.strip()
    assert written.endswith(f"pessa verify {folder} {out} --tolerance 1 --min-agreement 0")
    assert pessa("verify", folder, out, "--tolerance", "1", "--min-agreement", "0").code == 0
    refused = pessa("verify", folder, out)
    assert refused.code == 1
    options = refused.err.strip().rpartition("accept it: ")[2].split()
    assert options[0] == "--tolerance"
    assert pessa("verify", folder, out, *options).code == 0
    assert pessa("verify", folder, out, options[0], str(0.9 * float(options[1])), *options[2:]).code == 1


def test_a_device_that_does_not_exist(pessa: Pessa, tiny_folder: TinyFolder) -> None:
    folder = tiny_folder("bert")
    is_refusal(pessa("verify", folder, folder, "--device", "nonsense"), "--device nonsense", code=2)
    assert pessa("verify", folder, folder, "--device", "cpu", "--level", "blocks").code == 0


def test_blocks_that_no_input_reaches_are_named(pessa: Pessa, tmp_path: Path) -> None:
    """Text does not reach the vision part: its weights are compared, and the report says that its outputs are not."""
    build("llava").save_pretrained(tmp_path / "llava")
    folder = copy_of(tmp_path / "llava", tmp_path / "same")
    done = pessa("verify", tmp_path / "llava", folder, "--level", "blocks", "--json")
    report = json.loads(done.out)
    assert (done.code, report["same"], report["skipped"]) == (0, True, [])
    assert report["unreached"] == ["vision.self.0", "vision.self.1", "vision.mlp.0", "vision.mlp.1"]
    assert {found["where"].rpartition(".")[0] for found in report["blocks"]} == {"text.self", "text.mlp"}
    assert "vision.self.0" in pessa("verify", tmp_path / "llava", folder, "--level", "blocks").out
    name = next(name for name in load_file(folder / WEIGHTS) if "vision" in name and "v_proj.weight" in name)
    edit_weights(lambda tensors: tensors[name].mul_(1.5))(folder)
    assert pessa("verify", tmp_path / "llava", folder, "--level", "blocks").code == 1


@pytest.mark.parametrize(
    ("left", "skipped", "unreached"),
    [
        ("", "encoder.self.0 encoder.self.1 encoder.mlp.0 encoder.mlp.1", ""),
        ("encoder.self.0 encoder.mlp.0", "encoder.self.1", "encoder.mlp.1"),  # as if layer 1 had been skipped
        ("encoder.self.0 encoder.self.1 encoder.mlp.0", "encoder.mlp.1", ""),
        ("encoder.self.0 encoder.self.1", "encoder.mlp.0 encoder.mlp.1", ""),
    ],
)
def test_a_block_that_does_not_run_beside_others_is_not_the_same(
    left: str, skipped: str, unreached: str, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error must not count as 0. No class of transformers skips a single block, so results are taken away."""

    def some(*args: Any) -> Any:
        blocks, outputs, texts = run_both(*args)
        return {name: blocks[name] for name in left.split()}, outputs, texts

    model = open_model(tiny_folder("bert"))
    assert verify_models(model, model, "blocks").same
    monkeypatch.setattr("pessa_cli.evaluation.verify.run_both", some)
    report = verify_models(model, model, "blocks")
    assert (report.same, report.skipped, report.unreached) == (False, skipped.split(), unreached.split())
    assert skipped.split()[0] in report.failures[0]
    assert "does not run" in report.failures[0]


def test_a_block_that_did_not_run_has_no_error(tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("whisper"))
    ours, theirs = tiny.load(tiny_folder("whisper")), tiny.load(tiny_folder("whisper"))
    with ExitStack() as hooks, torch.inference_mode():
        squares = block_squares(model.sites, ours, theirs, hooks)
        ours.get_encoder()(tiny.inputs(ours)["input_features"])
    assert set(squares) == {site.name for site in model.sites if site.name.startswith("encoder.")}
    assert all(off == 0 < whole for off, whole in squares.values())


def test_names_that_transformers_does_not_load(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """A prefix of a training program is kept; the weights alone do not show that it is one too many."""

    def prefixed(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[f"student.{name}"] = tensors.pop(name)

    folder = copy_of(tiny_folder("llama"), tmp_path / "student")
    edit_weights(prefixed)(folder)
    assert pessa("decompose", folder, "-o", tmp_path / "out").code == 0
    assert pessa("verify", folder, tmp_path / "out", "--level", "weights").code == 0
    for level in ("blocks", "outputs"):
        result = pessa("verify", folder, tmp_path / "out", "--level", level)
        is_refusal(result, "model.layers.0.self_attn.k_proj.weight: missing", "--level weights")
