"""The claims of the README on real weights: Whisper tiny.en, MiniLM and SmolLM2-135M."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch
from compare_methods import heard
from harness import NEARLY_ALL, Once, Pessa, Real, RealPruned, is_refusal
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer, WhisperForConditionalGeneration

from pessa_cli.blocks.site import select
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.evaluation.word_errors import compare_words
from pessa_cli.models.audio import load_audio
from pessa_cli.models.inputs import clip_features
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.totals import totals

NAMES = ("whisper-tiny.en", "minilm", "smollm2-135m")


@pytest.fixture(scope="session")
def float32(real: Real, once: Once) -> Callable[[str], Path]:
    """A real model in float32; only tiny.en is stored in float16 and is converted."""

    def folder(name: str) -> Path:
        source = real(name)
        if name != "whisper-tiny.en":
            return source

        def widened(into: Path) -> None:
            WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32).save_pretrained(into)
            AutoProcessor.from_pretrained(source).save_pretrained(into)

        return once("whisper-tiny.en-float32", widened)

    return folder


@pytest.mark.parametrize("name", NAMES)
def test_full_rank_in_float32_changes_nothing(
    name: str, float32: Callable[[str], Path], clip: Path, tmp_path: Path
) -> None:
    source = float32(name)
    decompose_model(open_model(source), tmp_path / "out")
    audio = [clip] if name.startswith("whisper") else []
    report = verify_models(open_model(source), open_model(tmp_path / "out"), audio=audio)
    assert report.failures == []
    assert report.worst.error < 1e-6
    assert report.outputs is not None
    assert report.outputs.error < 1e-4
    assert report.outputs.what == ("hidden states" if name == "minilm" else "logits")
    assert [text.reference == text.candidate for text in report.texts] == ([] if name == "minilm" else [True])


@pytest.mark.parametrize("name", NAMES)
def test_negative_control_one_head_scaled_by_one_percent(
    name: str, float32: Callable[[str], Path], tmp_path: Path
) -> None:
    """The checks of the test above must fail when a single head of a single block is scaled by 1.01."""
    source = float32(name)
    (tmp_path / "changed").mkdir()
    for path in source.iterdir():
        if path.is_file() and path.suffix != ".safetensors":
            (tmp_path / "changed" / path.name).write_bytes(path.read_bytes())
    weights = load_file(source / "model.safetensors")
    site = open_model(source).attention[2]
    weights[f"{site.v}.weight"][: site.head_dim] *= 1.01
    save_file(weights, tmp_path / "changed" / "model.safetensors", {"format": "pt"})
    report = verify_models(open_model(source), open_model(tmp_path / "changed"))
    assert not report.same
    assert report.worst.where.startswith(f"{site.name} head ")
    assert report.worst.error == pytest.approx(0.01, rel=1e-3)
    assert any(line.startswith("blocks:") for line in report.failures)
    assert any(line.startswith("outputs:") for line in report.failures)


def test_biases_and_heads_of_the_real_models(real: Real) -> None:
    found = {name: {frozenset(site.biases) for site in open_model(real(name)).attention} for name in NAMES}
    assert found == {
        "whisper-tiny.en": {frozenset("qvo")},
        "minilm": {frozenset("qkvo")},
        "smollm2-135m": {frozenset()},
    }
    llama = open_model(real("smollm2-135m")).attention[0]
    assert (llama.heads, llama.kv_heads, llama.head_dim) == (9, 3, 64)


def test_lossless_shrinks_tiny_en_and_keeps_its_transcript(real: Real, clip: Path, tmp_path: Path) -> None:
    model = open_model(real("whisper-tiny.en"))
    written = prune_model(model, tmp_path / "out", Rule())
    counts = totals(model.reader.header, model.attention, written.sites, written.ranks)
    assert counts["attention_pruned"] > 0.015
    out = open_model(tmp_path / "out")
    assert out.parameters == counts["parameters_after"] < counts["parameters"]
    assert out.nbytes == counts["bytes_after"]
    report = verify_models(model, out, audio=[clip])
    assert report.failures == []
    assert "Fail better" in report.texts[0].candidate
    # The error is not larger than that of the factors at full rank, which comes only from rounding to float16.
    decompose_model(model, tmp_path / "full")
    whole = verify_models(model, open_model(tmp_path / "full"), audio=[clip])
    assert report.outputs is not None
    assert whole.outputs is not None
    assert report.outputs.error < 2 * whole.outputs.error


def test_vanilla_is_clearly_worse_at_the_same_ratio(real: Real, clip: Path, tmp_path: Path) -> None:
    source = real("whisper-tiny.en")
    model = open_model(source)
    processor = AutoProcessor.from_pretrained(source)
    inputs = clip_features(processor, load_audio(clip))
    original = heard(source, inputs, processor)
    encoder = select(model.attention, ("encoder.self",))
    rates = {}
    for method in ("svd", "vanilla"):
        prune_model(model, tmp_path / method, Rule(ratio=0.1), encoder, method)
        rates[method] = compare_words([original], [heard(tmp_path / method, inputs, processor)]).rate
    assert rates["svd"] == 0
    assert rates["vanilla"] > 0.3


def test_compact_smollm2_generates_the_same_text_as_the_dense_one(
    real: Real, real_pruned: RealPruned, tmp_path: Path
) -> None:
    source = real("smollm2-135m")
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    written = {}
    folders = {layout: real_pruned("smollm2-135m", NEARLY_ALL, layout) for layout in ("compact", "dense")}
    for layout, folder in folders.items():
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        written[layout] = model.generate(**prompt, max_new_tokens=20, do_sample=False).tolist()
        if layout == "compact":
            model.save_pretrained(tmp_path / "saved")
            again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
            assert again.generate(**prompt, max_new_tokens=20, do_sample=False).tolist() == written["compact"]
    assert written["compact"] == written["dense"]
    sizes = {layout: (folder / "model.safetensors").stat().st_size for layout, folder in folders.items()}
    assert sizes["compact"] < sizes["dense"] - 1_000_000


@pytest.mark.skipif(not os.environ.get("PESSA_DATA"), reason="PESSA_DATA names no folder with speech/clips.jsonl")
def test_lossless_keeps_the_transcripts_of_other_speech(real: Real, tmp_path: Path) -> None:
    clips = [
        path
        for path in sorted((Path(os.environ["PESSA_DATA"]) / "speech").iterdir())
        if path.suffix in (".wav", ".flac")
    ]
    model = open_model(real("whisper-tiny.en"))
    prune_model(model, tmp_path / "out", Rule())
    report = verify_models(model, open_model(tmp_path / "out"), audio=clips)
    assert len(report.texts) == len(clips)
    different = [text for text in report.texts if text.reference != text.candidate]
    assert different == []


def test_a_recipe_prunes_within_a_limit_on_the_word_error_rate(
    real: Real, clip: Path, tmp_path: Path, pessa: Pessa
) -> None:
    """The model is calibrated on the first half of the clip, and scored on the second half."""
    samples, rate = soundfile.read(clip)
    for name, part in (("first", samples[: len(samples) // 2]), ("second", samples[len(samples) // 2 :])):
        soundfile.write(tmp_path / f"{name}.wav", part, rate)
    transcript = "No matter. Try again. Fail again. Fail better."
    (tmp_path / "held-out.jsonl").write_text(json.dumps({"audio": "second.wav", "text": transcript}))
    recipe = tmp_path / "recipe.toml"
    keys = {"sites": ["encoder.self"], "calibrate": [str(tmp_path / "first.wav")], "round_to": 4}
    keys |= {"evaluate": str(tmp_path / "held-out.jsonl"), "max_wer_increase": 20.0}
    recipe.write_text("[prune]\n" + "\n".join(f"{key} = {json.dumps(value)}" for key, value in keys.items()))
    done = pessa("run", recipe, real("whisper-tiny.en"), "-o", tmp_path / "out", "--json")
    assert done.code == 0, done
    searched = json.loads(done.out)["search"]
    within = [trial["target_layers"] for trial in searched["tried"] if trial["value"] <= searched["limit"]]
    assert json.loads((tmp_path / "out" / "pessa.json").read_text())["rule"].startswith(f"target_layers {min(within)}")
    scored = pessa("eval", tmp_path / "out", "--speech", tmp_path / "held-out.jsonl", "--json")
    assert json.loads(scored.out)["models"][0]["speech"]["value"] <= searched["limit"]
    again = [*("--calibrate", tmp_path / "second.wav"), *("--evaluate", tmp_path / "held-out.jsonl")]
    same = pessa("prune", real("whisper-tiny.en"), "-o", tmp_path / "no", "--max-wer-increase", "1", *again)
    is_refusal(same, "calibrated on", code=2)
