"""Calibration on files: texts are encoded by a tokenizer, and clips by a processor.

The other tests of calibration replace `inputs_of` by a function that returns tokens; these tests replace nothing.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import tiny_models
import torch
import whisper
from characters import tokenizer
from harness import Pessa, Real, TinyFolder, edit_json, is_refusal
from transformers import AutoProcessor, AutoTokenizer
from tuned import with_tokenizer
from whisper.model import ModelDimensions

from pessa_cli.blocks.site import select
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.models.data import read_data
from pessa_cli.models.load import load
from pessa_cli.models.windows import windows
from pessa_cli.sources.open import open_source
from pessa_cli.statistics.file import SavedStatistics
from pessa_cli.surgery.model import open_model

STORY = "the keeper lit the lamp on the ninth of march, and it burned until three sails came home. " * 3


def read_by(model: Path, limit: int) -> list[torch.Tensor]:
    """Return the expected windows of the story: each starts with <s>, and has at most `limit` tokens."""
    ids = tokenizer()(STORY, add_special_tokens=False).input_ids
    room = limit - 1
    parts = [ids[start : start + room] for start in range(0, len(ids), room)]
    assert tiny.read_config(model)["vocab_size"] > max(ids)
    return [torch.tensor([[1, *part]]) for part in parts]


def check_queries(folder: Path, statistics: Path, windows: list[torch.Tensor]) -> None:
    """Compare the statistics of the first block's queries with those of a run of the model on these windows."""
    site = open_model(folder).attention[0]
    found = SavedStatistics(statistics).of(site)
    assert int(found.frames) == sum(window.shape[1] for window in windows)
    model = tiny.load(folder)
    seen: list[torch.Tensor] = []
    query = next(module for name, module in model.named_modules() if name.endswith(site.q))
    query.register_forward_hook(lambda _module, _args, output: seen.append(output[0].double()))
    with torch.no_grad():
        for window in windows:
            model(input_ids=window)
    heads = torch.cat(seen).reshape(-1, site.kv_heads, site.group, site.head_dim).permute(1, 2, 0, 3).flatten(1, 2)
    expected = heads.mT @ heads
    assert torch.allclose(found.queries, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "window"), [("bert", 40), ("llama", 64)])
def test_a_long_text_is_read_in_windows(
    name: str, window: int, tiny_folder: TinyFolder, place: Path, pessa: Pessa
) -> None:
    folder = with_tokenizer(tiny_folder(name), place / name)
    (place / "story.txt").write_text(STORY)
    given = ("--calibrate", place / "story.txt", "--statistics", place / "s.safetensors")
    done = pessa("prune", folder, "-o", place / "out", "--ratio", "0.3", *given)
    assert done.code == 0, done
    parts = read_by(folder, window)
    assert len(parts) > 3
    check_queries(folder, place / "s.safetensors", parts)


@pytest.fixture
def roberta(place: Path) -> Path:
    """A tiny RoBERTa, whose positions start at 2, so that 38 of the 40 in its table are for tokens."""
    model = tiny_models.build("roberta")
    model.save_pretrained(place / "roberta")
    tokenizer().save_pretrained(place / "roberta")
    return place / "roberta"


def test_a_roberta_reads_a_short_text(roberta: Path, place: Path, pessa: Pessa) -> None:
    (place / "short.txt").write_text(STORY[:30])
    (place / "other.txt").write_text(STORY[40:70])
    data = ("--calibrate", place / "short.txt", "--calibrate", place / "other.txt")
    done = pessa("prune", roberta, "-o", place / "out", "--ratio", "0.3", *data, "--statistics", place / "s")
    assert done.code == 0, done
    texts = (STORY[:30], STORY[40:70])
    ids = [tokenizer()(text, return_tensors="pt").input_ids for text in texts]
    check_queries(roberta, place / "s", ids)


def test_a_roberta_reads_a_long_text_in_windows(roberta: Path, place: Path, pessa: Pessa) -> None:
    (place / "story.txt").write_text(STORY)
    given = ("--calibrate", place / "story.txt", "--statistics", place / "s")
    done = pessa("prune", roberta, "-o", place / "out", "--ratio", "0.3", *given)
    assert done.code == 0, done
    positions = tiny.read_config(roberta)["max_position_embeddings"]
    check_queries(roberta, place / "s", read_by(roberta, positions - 2))


@pytest.fixture
def english(real: Real, place: Path) -> Path:
    """A tiny Whisper with the processor and tokenizer of the real tiny.en, which writes at most 40 tokens."""
    folder = tiny.whisper_with_tokenizer(real("whisper-tiny.en"), place / "english")
    edit_json(lambda config: config.update(max_length=40), "generation_config.json")(folder)
    return folder


def query_counts(folder: Path, statistics: Path) -> dict[str, int]:
    """Return the number of queries of each kind of block."""
    found = SavedStatistics(statistics)
    return {site.spec.kind: int(found.of(site).frames) for site in open_model(folder).attention if site.layer == 0}


def test_clips_through_the_real_processor(english: Path, clip: Path, place: Path, pessa: Pessa) -> None:
    """One clip has a transcript. The other has two windows and no transcript, so that the model must transcribe it."""
    text = "Ever tried. Ever failed."
    samples = load_audio(clip)
    soundfile.write(place / "long.wav", np.tile(samples, 4)[: 40 * SAMPLE_RATE], SAMPLE_RATE)
    rows: list[dict[str, Any]] = [{"audio": str(clip), "text": text}, {"audio": "long.wav"}]
    (place / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    given = ("--calibrate", place / "clips.jsonl", "--statistics", place / "s")
    done = pessa("prune", english, "-o", place / "out", "--ratio", "0.3", *given)
    assert done.code == 0, done
    frames = query_counts(english, place / "s")
    assert frames["encoder.self"] == 3 * 1500
    assert frames["decoder.self"] == frames["decoder.cross"]
    (place / "one.jsonl").write_text(json.dumps(rows[0]))
    assert pessa("inspect", english, "--calibrate", place / "one.jsonl", "--statistics", place / "t").code == 0
    prompt = AutoTokenizer.from_pretrained(english)(text).input_ids[:-1]  # the last token is never an input
    assert query_counts(english, place / "t") == {
        "encoder.self": 1500,
        "decoder.self": len(prompt),
        "decoder.cross": len(prompt),
    }


@pytest.fixture
def multilingual(place: Path) -> Path:
    """A tiny Whisper converted from an openai-whisper file, with the multilingual tokenizer of that package."""
    torch.manual_seed(0)
    model = whisper.model.Whisper(ModelDimensions(80, 1500, 32, 4, 1, 51865, 448, 32, 4, 1))
    torch.nn.init.normal_(model.decoder.positional_embedding, std=0.1)  # openai-whisper does not initialize it
    with torch.no_grad():
        model.decoder.token_embedding.weight[50363] = 0  # the last token of the prompt, which it would repeat
    state = {name: tensor for name, tensor in model.state_dict().items() if tensor.dtype.is_floating_point}
    torch.save({"dims": vars(model.dims), "model_state_dict": state}, place / "m.pt")
    with open_source(str(place / "m.pt")) as converted:
        folder = Path(shutil.copytree(converted, place / "multilingual"))
    edit_json(lambda config: config.update(max_length=40), "generation_config.json")(folder)
    return folder


@pytest.mark.slow
def test_a_multilingual_whisper_is_given_language_and_task(
    multilingual: Path, clip: Path, place: Path, pessa: Pessa
) -> None:
    """The language is that of the data, or what the model itself detects; the transcript follows, or is written."""
    rows = [{"audio": str(clip), "text": "Ever tried."}]
    rows += [rows[0] | {"language": "de"}, {"audio": str(clip)}, {"audio": str(clip), "language": "de"}]
    (place / "clips.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    model, data = load(open_model(multilingual)), read_data([place / "clips.jsonl"])
    processor = AutoProcessor.from_pretrained(multilingual)
    features = processor(load_audio(clip), sampling_rate=SAMPLE_RATE, return_tensors="pt").input_features
    detected = processor.tokenizer.decode(model.detect_language(input_features=features))
    assert detected != "<|de|>"
    for (window, _), row in zip(windows(multilingual, model, data.items), rows, strict=True):
        language = row.get("language", detected.strip("<|>"))
        processor.tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
        if "text" in row:
            expected = processor.tokenizer(row["text"]).input_ids[:-1]
        else:
            written = model.generate(features, language=language, task="transcribe", do_sample=False)[0].tolist()
            text = [number for number in written if number < model.config.eos_token_id]
            assert len(text) > 5
            expected = processor.tokenizer.prefix_tokens + text
        assert window["decoder_input_ids"].tolist() == [expected]
    given = ("--calibrate", place / "clips.jsonl", "--statistics", place / "s")
    done = pessa("prune", multilingual, "-o", place / "out", "--ratio", "0.3", *given)
    assert done.code == 0, done
    assert query_counts(multilingual, place / "s")["encoder.self"] == 4 * 1500
    (place / "other.jsonl").write_text(json.dumps(rows[0] | {"language": "xx"}))
    is_refusal(pessa("inspect", multilingual, "--calibrate", place / "other.jsonl"), clip.name, "'xx'", code=2)


def test_an_english_whisper_refuses_another_language(english: Path, clip: Path, place: Path, pessa: Pessa) -> None:
    for language, code in (("en", 0), ("de", 2)):
        (place / "clips.jsonl").write_text(json.dumps({"audio": str(clip), "text": "Ever.", "language": language}))
        done = pessa("inspect", english, "--calibrate", place / "clips.jsonl")
        assert done.code == code, done
    is_refusal(done, "'de'", "English only", code=2)


def test_augmented_clips(english: Path, clip: Path, place: Path, pessa: Pessa) -> None:
    """The manifest and the statistics say how the data were augmented; statistics of the clips as they are differ."""
    (place / "clips.jsonl").write_text(json.dumps({"audio": str(clip), "text": "Ever tried. Ever failed."}))
    given = ("--ratio", "0.3", "--sites", "encoder.self", "--calibrate", place / "clips.jsonl")
    more = ("--augment", "3", "--augment-seed", "5")
    plain = pessa("prune", english, "-o", place / "plain", *given)
    first = pessa("prune", english, "-o", place / "out", *given, *more, "--statistics", place / "s")
    again = pessa("prune", english, "-o", place / "again", *given[:4], "--statistics", place / "s")
    same = pessa("prune", english, "-o", place / "same", *given, *more)
    assert [done.code for done in (plain, first, again, same)] == [0] * 4, (plain, first, again, same)
    found = {name: json.loads((place / name / "pessa.json").read_text()) for name in ("plain", "out", "again", "same")}
    assert "calibration_augmented" not in found["plain"]
    assert {found[name]["calibration_augmented"] for name in ("out", "again", "same")} == {"3 windows, seed 5"}
    assert len({each["calibration_sha256"] for each in found.values()}) == 2
    weights = {name: each["sha256"]["model.safetensors"] for name, each in found.items()}
    assert weights["same"] == weights["out"] != weights["plain"]
    sites = select(open_model(english).sites, ("encoder.self",))
    assert {int(SavedStatistics(place / "s").of(site).frames) for site in sites} == {3 * 1500}
