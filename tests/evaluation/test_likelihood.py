"""Nats per token and the KL divergence from the first model of `pessa eval`, against values by hand."""

from __future__ import annotations

import copy
import csv
import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import tiny_models
import torch
from characters import tokenizer
from harness import Pessa, Real, TinyFolder
from peft import get_peft_model
from torch import Tensor
from transformers import WhisperProcessor
from tuned import disturb, with_tokenizer, write_lines

from pessa_cli.algebra.compare import kl_divergence
from pessa_cli.evaluation.evaluate import Loading
from pessa_cli.evaluation.likelihood import First, Passage, likelihoods
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.word_errors import Clip, WordErrors
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.models.inputs import clip_features
from pessa_cli.models.load import load
from pessa_cli.surgery.model import open_model
from pessa_cli.tuning.registry import build_config

TEXTS = ("the keeper lit the lamp on the ninth of march, ", "and it burned until three sails came home. ")


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    tuned = get_peft_model(tiny.load(llama), build_config("lora", 8, ["q_proj", "v_proj"]))
    disturb(tuned, 0.5)
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def scored(pessa: Pessa, *args: Any) -> list[dict[str, Any]]:
    result = pessa("eval", *args, "--json")
    assert result.code == 0, result
    models: list[dict[str, Any]] = json.loads(result.out)["models"]
    return models


def predicting(shares: Tensor, vocabulary: int = 100) -> Any:
    """A tiny GPT-J that predicts the same at every position: shares of the first tokens, by the bias of its last layer.

    shares: (tokens,), of the sum 1; the other tokens share a millionth.
    """
    model = tiny_models.build("gptj", vocab_size=vocabulary)
    rest = torch.full((vocabulary - len(shares),), 1e-6 / (vocabulary - len(shares)))
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.bias.copy_(torch.cat([shares * (1 - 1e-6), rest]).log())
    return model


def test_a_known_divergence() -> None:
    """Two models that differ in the bias of their last layer, with passages of different lengths."""
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.1, 0.2, 0.7])
    ids = torch.tensor([5, 0, 0, 2, 1, 0])
    passages = [Passage({"input_ids": ids[None, :-1]}, ids[1:]), Passage({"input_ids": ids[None, :2]}, ids[1:3])]
    found = likelihoods(predicting(q), passages, First(predicting(p), passages), "x")
    assert found.divergence is not None
    by_hand = float((p * (p / q).log()).sum())  # in nats, each position the same
    assert found.divergence.tolist() == pytest.approx([5 * by_hand, 2 * by_hand], rel=1e-4)
    assert found.nats.tolist() == pytest.approx([float(-q[ids[1:]].log().sum()), float(-2 * q[0].log())], rel=1e-4)
    assert found.divergence_per_token is not None
    assert found.divergence_per_token.value == pytest.approx(by_hand, rel=1e-4)
    assert found.divergence_per_token.interval == pytest.approx((by_hand, by_hand), rel=1e-4)
    # The other way round it is another value, and a larger vocabulary has none.
    back = likelihoods(predicting(p), passages, First(predicting(q), passages), "x").divergence_per_token
    assert back is not None
    assert back.value == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-4)
    other = torch.tensor([0.2, 0.2, 0.6])
    assert likelihoods(predicting(other), passages, First(predicting(q), passages), "x").divergence is not None
    assert likelihoods(predicting(q, 101), passages, First(predicting(p), passages), "x").divergence is None
    assert likelihoods(predicting(q), passages, First(predicting(p), passages[:1]), "x").divergence is None


def test_divergence_in_float64_and_with_excluded_tokens() -> None:
    """A change of 1e-4 in the logits, whose KL is known to second order, is lost in float32."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(130, 30_000, generator=generator)  # more positions than are compared at a time
    change = 1e-4 * torch.randn(30_000, generator=generator)
    p = logits.double().softmax(-1)
    changed = (logits + change).double() - logits.double()  # what of the change float32 keeps
    expected = ((p * changed**2).sum(-1) - (p * changed).sum(-1) ** 2) / 2
    assert torch.allclose(kl_divergence(logits, logits + change), expected, rtol=1e-3, atol=1e-14)
    assert expected.min() > 1e-12
    assert kl_divergence(logits, logits).eq(0).all()
    without = logits.clone()
    without[:, 7] = -torch.inf
    assert kl_divergence(without, without).eq(0).all()
    assert kl_divergence(without, logits).isfinite().all()
    assert kl_divergence(logits, without).isinf().all()


def test_text(pessa: Pessa, llama: Path, adapter: Path, texts: Path) -> None:
    """The first model is not changed by adapters on the same base: its divergence from itself is exactly 0."""
    adapted = f"{llama}+{adapter}"
    first, tuned, again = (model["text"] for model in scored(pessa, llama, adapted, llama, "--text", texts))
    assert "kl_to_first" not in first
    assert again["kl_to_first"] == {"value": 0.0, "interval": [0.0, 0.0]}
    assert again["difference"] == {"value": 0.0, "interval": [0.0, 0.0]}
    # By hand, document by document, each of less than a window.
    models = tiny.load(llama), get_peft_model(tiny.load(llama), build_config("lora", 8, ["q_proj", "v_proj"]))
    models[1].load_adapter(str(adapter), "saved")
    models[1].set_adapter("saved")
    nats, divergence, tokens = [0.0, 0.0], 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        with torch.no_grad():
            p, q = (model.eval()(input_ids=ids).logits[0, :-1].double().log_softmax(-1) for model in models)
        for i, each in enumerate((p, q)):
            nats[i] -= float(each.gather(1, ids[0, 1:, None]).sum())
        divergence, tokens = divergence + float((p.exp() * (p - q)).sum()), tokens + ids.shape[1] - 1
    assert [score["nats_per_token"]["value"] for score in (first, tuned)] == pytest.approx(
        [each / tokens for each in nats], rel=1e-5
    )
    assert tuned["kl_to_first"]["value"] == pytest.approx(divergence / tokens, rel=1e-4)
    assert tuned["nats_per_token"]["difference"]["value"] == pytest.approx((nats[1] - nats[0]) / tokens, rel=1e-4)
    low, high = tuned["kl_to_first"]["interval"]
    assert 0 < low <= tuned["kl_to_first"]["value"] <= high
    assert tuned["difference"]["value"] == pytest.approx(tuned["value"] - first["value"])


def test_the_table(pessa: Pessa, llama: Path, adapter: Path, texts: Path) -> None:
    shown = pessa("eval", llama, f"{llama}+{adapter}", "--text", texts).out.splitlines()
    assert "95 % intervals by the bootstrap over windows; differences to the first model on the same" in shown[1]
    assert shown[2].split("  ")[0] == "model"
    assert [part.strip() for part in shown[2].split("  ") if part][1:] == [
        "perplexity",
        "nats per token",
        "KL to the first",
    ]
    names = [line.split("  ")[0] for line in shown[3:]]
    assert names == [str(llama), f"{llama}+{adapter}", ""]
    assert shown[5].startswith("  difference")
    assert shown[4].count("[") == 3
    assert shown[5].count("[") == shown[5].count("[+") + shown[5].count("[-") == 2
    alone = pessa("eval", llama, "--text", texts).out
    assert "KL" not in alone
    assert "difference" not in alone


def test_without_kl(pessa: Pessa, llama: Path, adapter: Path, texts: Path) -> None:
    found = scored(pessa, llama, f"{llama}+{adapter}", "--text", texts, "--no-kl")
    assert ["kl_to_first" in model["text"] for model in found] == [False, False]
    assert ["difference" in model["text"]["nats_per_token"] for model in found] == [False, True]


@pytest.mark.parametrize("keep", [True, False])
def test_models_in_memory(keep: bool, tiny_folder: TinyFolder) -> None:
    """With a comparison the first model and the last one are in memory, otherwise only the last one."""
    loading = Loading(ScoreSettings(), keep)
    folders = [tiny_folder(name) for name in ("llama", "llama-biased", "bert")]
    models = [weakref.ref(loading.load(str(folder), open_model(folder), None)) for folder in folders]
    gc.collect()
    assert [model() is not None for model in models] == [keep, False, True]


def test_models_of_different_tokens(pessa: Pessa, llama: Path, tmp_path: Path, texts: Path) -> None:
    """The tokenizer of the second model has the letters a and b the other way round."""
    file = with_tokenizer(llama, tmp_path / "other") / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    note = f"no KL to the first on texts.jsonl for {tmp_path / 'other'}: its tokens are not those of the first"
    first, second = scored(pessa, llama, tmp_path / "other", "--text", texts)
    assert "notes" not in first
    assert second["notes"] == [note]
    assert "kl_to_first" not in second["text"]
    assert note in pessa("eval", llama, tmp_path / "other", "--text", texts).out


def test_pairs(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """The drop of the correlation has an interval of its own."""
    one, other = (with_tokenizer(tiny_folder("bert"), tmp_path / name) for name in ("one", "other"))
    model = tiny.load(other)
    disturb(model, 0.3)
    model.save_pretrained(other)
    rows = [(f"a {i * i} b", f"{'c' * (i % 7)} {i}", i % 5) for i in range(30)]
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    first, second = (model["pairs"] for model in scored(pessa, one, other, "--pairs", tmp_path / "pairs.csv"))
    drop = second["difference"]
    assert drop["value"] == pytest.approx(second["value"] - first["value"]) != 0
    assert first["interval"][0] < first["value"] < first["interval"][1]
    assert drop["interval"][0] < drop["value"] < drop["interval"][1]
    assert set(first) == {"metric", "value", "how", "data", "pairs", "interval"}


def test_speech(real: Real, clip: Path) -> None:
    """By hand, with the tokens that the tokenizer puts before a text; and a text that is all in upper case."""
    source = real("whisper-tiny.en")
    processor = WhisperProcessor.from_pretrained(source)
    model, text = load(open_model(source)), "Ever tried. Ever failed. No matter."
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.encoder.layers[0].self_attn.out_proj.weight.mul_(0.5)
    ids = processor.tokenizer(f" {text}", return_tensors="pt").input_ids[:, :-1]
    features, losses, logprobs = clip_features(processor, load_audio(clip))["input_features"], [], []
    for each in (model, changed):
        with torch.no_grad():
            out = each(input_features=features, decoder_input_ids=ids[:, :-1])
        losses.append(float(torch.nn.functional.cross_entropy(out.logits[0, 1:], ids[0, 2:])))
        logprobs.append(out.logits[0, 1:].double().log_softmax(-1))
    speech = WordErrors.of("x", [Clip(clip, "", text)], processor, ScoreSettings(new_tokens=2))
    passages = speech.passages(model)
    score = speech.score_tokens(changed, passages, First(model, passages))
    assert score.nats is not None
    assert score.divergence is not None
    assert score.nats.value == pytest.approx(losses[1], rel=1e-4)
    assert losses[1] != pytest.approx(losses[0], rel=1e-2)
    p, q = logprobs
    assert score.divergence.value == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert score.about_nats.startswith(f"{ids.shape[1] - 2} tokens of the reference texts of 1 clips")
    targets = [
        WordErrors.of("x", [Clip(clip, "", written)], processor, ScoreSettings()).passages(model)[0].targets.tolist()
        for written in (text.upper(), text.lower(), text)
    ]
    assert targets[0] == targets[1] != targets[2] == ids[0, 2:].tolist()


def test_the_prompt_of_a_multilingual_model(real: Real, clip: Path) -> None:
    """The tokens that the tokenizer's own function puts before a transcript; the language is asked for or detected."""
    processor = WhisperProcessor.from_pretrained(real("whisper-tiny.en"))
    of = processor.tokenizer.convert_tokens_to_ids
    model = tiny_models.build("whisper", vocab_size=51864, num_mel_bins=80, max_source_positions=1500)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = of("<|startoftranscript|>")
    model.generation_config.is_multilingual = True
    model.generation_config.lang_to_id = {"<|fr|>": of("<|fr|>")}  # all that can be detected

    def prompt(settings: ScoreSettings) -> list[int]:
        speech = WordErrors.of("x", [Clip(clip, "", "Hm")], processor, settings)
        ((inputs, targets),) = speech.passages(model)
        ids: list[int] = inputs["decoder_input_ids"][0].tolist()
        assert len(targets) == len(processor.tokenizer(" Hm", add_special_tokens=False).input_ids)
        return ids[: len(ids) - len(targets) + 1]

    for settings, language in ((ScoreSettings(language="German"), "<|de|>"), (ScoreSettings(), "<|fr|>")):
        expected = ["<|startoftranscript|>", language, "<|transcribe|>", "<|notimestamps|>"]
        assert processor.tokenizer.convert_ids_to_tokens(prompt(settings)) == expected


def test_only_long_clips(pessa: Pessa, real: Real, tmp_path: Path) -> None:
    """Which part of the text is said in which window is not known, so there are word errors only."""
    soundfile.write(tmp_path / "long.wav", np.zeros(31 * SAMPLE_RATE), SAMPLE_RATE)
    file = write_lines(tmp_path / "clips.jsonl", [{"audio": "long.wav", "text": "Ever tried."}])
    result = pessa("eval", real("whisper-tiny.en"), "--speech", file)
    assert result.code == 0, result
    assert "no nats per token of clips.jsonl" in result.out
    assert result.out.splitlines()[-2].split() == ["model", "word", "error", "rate"]
