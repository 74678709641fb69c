"""What `verify` compares on, what it names, and what it suggests."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import Pessa, TinyFolder, copy_of, edit_weights, is_refusal

import pessa_cli.models.inputs
from pessa_cli.evaluation.verify import verify_models
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
