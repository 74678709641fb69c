"""The measures of `pessa eval`, against values by hand and independent computations, and on damaged models."""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny
import torch
from characters import tokenizer
from harness import Pessa, Real, TinyFolder, is_refusal
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, AutoTokenizer, WhisperForConditionalGeneration
from tuned import disturb, with_tokenizer, write_lines

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import UsageError
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.perplexity import Perplexity, windows
from pessa_cli.evaluation.similarity import Embedding, Similarity, embedding_of, spearman
from pessa_cli.evaluation.word_errors import Clip, WordErrors, compare_words
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.tuning.registry import build_config

BECKETT = "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better."
STORY = "the keeper lit the lamp on the ninth of march, and it burned until three sails came home. " * 3
# Pairs of sentences with a similarity from 0 to 5, as judged by the authors of this file.
ALIKE = (
    ("A man is playing a guitar.", "A man plays the guitar.", 4.9),
    ("Two dogs run across the snow.", "A pair of dogs is running in the snow.", 4.8),
    ("The bank raised its interest rates.", "Interest rates were increased by the bank.", 4.8),
    ("A woman is slicing an onion.", "Someone is cutting vegetables.", 3.4),
    ("The train to Hamburg was late.", "The bus to Berlin was on time.", 2.2),
    ("A child is drawing a house.", "A boy is painting a picture.", 3.0),
    ("He repaired the roof of the barn.", "The stock market fell on Friday.", 0.0),
    ("The soup is too salty.", "A satellite was launched into orbit.", 0.0),
)


def csv_of(path: Path, rows: Any = ALIKE) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


@pytest.fixture
def bert(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    return with_tokenizer(tiny_folder("bert"), tmp_path / "bert")


@pytest.fixture
def clips(clip: Path, tmp_path: Path) -> Path:
    """A clip, its fourfold repetition, which is longer than Whisper's window, and a silent clip without a text."""
    samples = load_audio(clip)
    soundfile.write(tmp_path / "long.wav", np.tile(samples, 4), SAMPLE_RATE)
    soundfile.write(tmp_path / "silent.wav", samples * 0, SAMPLE_RATE)
    rows: list[dict[str, Any]] = [
        {"file": str(clip), "text": BECKETT},
        {"audio": "silent.wav", "text": None},
        {"audio": "long.wav", "text": " ".join([BECKETT] * 4)},
    ]
    return write_lines(tmp_path / "clips.jsonl", rows)


def test_word_counts_by_hand() -> None:
    text = "Mr. Brown doesn't like the colour, um, of 20 dollars!"  # mister brown does not like the color of $20
    assert compare_words([text], ["mister brown does not like the color of twenty dollars"]) == (0, 9)
    assert compare_words([text], ["mister brown does like a color of twenty dollars please"]) == (3, 9)
    assert compare_words([text, "Yes."], ["", "yes, yes"]) == (10, 10)
    assert compare_words(["Grüße, Jürgen!"], ["grusse jurgen"]) == (0, 2)
    assert compare_words(["Grüße, Jürgen!"], ["grusse jürgen"], english=False) == (1, 2)


def test_speech(pessa: Pessa, real: Real, clip: Path, clips: Path) -> None:
    result = pessa("eval", real("whisper-tiny.en"), "--speech", clips, "--batch", 2, "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    score = found["models"][0]["speech"]
    assert (score["clips"], score["words"]) == (2, 60)
    assert score["value"] == score["errors"] / 60 <= 0.02
    assert score["interval"][0] <= score["value"] <= score["interval"][1]
    assert 0 < score["nats_per_token"]["value"] < 1
    assert score["nats_per_token"]["interval"] is None  # the other clip is longer than a window
    assert "English" in score["how"]
    assert "1 without a text left out" in score["how"]
    paths = [clip, clips.with_name("long.wav")]
    assert found["sha256"] == {str(path): sha256_of(path) for path in paths}


def test_speech_is_scored_from_memory(real: Real, clips: Path) -> None:
    """Scoring needs no file. Negative control: a model with damaged attention has a higher error rate."""
    source = real("whisper-tiny.en")
    model = WhisperForConditionalGeneration.from_pretrained(source, dtype=torch.float32).eval()
    speech = WordErrors.load(clips, AutoProcessor.from_pretrained(source), ScoreSettings(limit=1, new_tokens=30))
    clips.unlink()
    assert [speech.score(model).value for _ in range(2)] == [0.0, 0.0]
    with torch.no_grad():
        for layer in model.model.encoder.layers:
            layer.self_attn.out_proj.weight.zero_()
    assert speech.score(model).value > 0.5
    processor = AutoProcessor.from_pretrained(source)
    german = WordErrors.of("clips", speech.clips, processor, ScoreSettings(language="German"))
    with pytest.raises(UsageError, match="English only"):
        german.score(model)
    with pytest.raises(UsageError, match="--language klingon"):
        WordErrors.of("clips", speech.clips, processor, ScoreSettings(language="klingon"))


def test_other_languages(real: Real, clip: Path) -> None:
    """The language goes to a multilingual Whisper and chooses the text normaliser."""
    processor, asked = AutoProcessor.from_pretrained(real("whisper-tiny.en")), []

    class Parrot:
        device, dtype = torch.device("cpu"), torch.float32
        config = SimpleNamespace(max_source_positions=1500, max_target_positions=448)
        generation_config = SimpleNamespace(is_multilingual=True)

        def generate(self, input_features: torch.Tensor, **options: Any) -> torch.Tensor:
            asked.append({key: options.get(key) for key in ("language", "max_new_tokens")})
            ids = processor.tokenizer("Grusse Jurgen, Mister", add_special_tokens=False).input_ids
            return torch.tensor([ids] * len(input_features))

    clips = [Clip(clip, "", "Grüße, Jürgen, Mr.")] * 3
    found = [
        WordErrors.of("clips", clips, processor, ScoreSettings(language=language, batch=2)).score(Parrot())
        for language in (None, "German", "en")
    ]
    assert [score.counts["errors"] for score in found] == [9, 9, 0]
    assert [score.counts["words"] for score in found] == [9] * 3
    assert asked == [{"language": language, "max_new_tokens": 224} for language in (None, "de", "en") for _ in range(2)]


def test_every_token_counts_once() -> None:
    for length, window, stride in ((100, 64, 32), (64, 64, 32), (65, 64, 63), (7, 64, 1), (200, 10, 3)):
        spans = list(windows(length, window, stride))
        assert [i for _, new, end in spans for i in range(new, end)] == list(range(1, length))
        assert all(start < new and end - start <= window for start, new, end in spans)
    # Without overlap the first token of each window has no context.
    assert list(windows(10, 4, 4)) == [(0, 1, 4), (4, 5, 8), (8, 9, 10)]


def test_perplexity_of_less_than_a_window(llama: Path, tmp_path: Path) -> None:
    model = tiny.load(llama)
    (tmp_path / "short.txt").write_text(STORY[:60])
    ids = torch.tensor([tokenizer()(STORY[:60])["input_ids"]])
    with torch.no_grad():
        expected = math.exp(model(input_ids=ids, labels=ids).loss)
    score = Perplexity.load(tmp_path / "short.txt", tokenizer()).score(model)
    assert score.value == pytest.approx(expected, rel=1e-5)
    assert score.counts == {"tokens": 60, "windows": 1, "window": 64, "stride": 64}


def documented_perplexity(model: Any, ids: torch.Tensor, window: int, stride: int) -> float:
    """The loop in the documentation of transformers on perplexity, with the exact number of tokens per window."""
    total, tokens, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + window, ids.shape[1])
        given = ids[:, begin:end]
        labels = given.clone()
        labels[:, : -(end - before)] = -100
        count = int((labels[:, 1:] != -100).sum())
        with torch.no_grad():
            total += float(model(given, labels=labels).loss) * count
        tokens, before = tokens + count, end
        if end == ids.shape[1]:
            break
    return math.exp(total / tokens)


def test_perplexity_in_windows(pessa: Pessa, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text(STORY)
    model, ids = tiny.load(llama), torch.tensor([tokenizer()(STORY)["input_ids"]])
    options = ("--text", tmp_path / "story.txt", "--window", 48, "--stride", 20)
    result = pessa("eval", llama, *options, "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    score = found["models"][0]["text"]
    assert score["value"] == pytest.approx(documented_perplexity(model, ids, 48, 20), rel=1e-5)
    assert (score["tokens"], score["window"], score["stride"]) == (len(STORY), 48, 20)
    assert found["sha256"] == {str(tmp_path / "story.txt"): sha256_of(tmp_path / "story.txt")}
    assert "windows of 48 tokens, stride 20; tokens: story.txt 270" in pessa("eval", llama, *options).out
    # The model has 64 positions.
    capped = Perplexity.load(tmp_path / "story.txt", tokenizer(), ScoreSettings(window=512, stride=40)).score(model)
    assert capped.value == pytest.approx(documented_perplexity(model, ids, 64, 40), rel=1e-5)
    disturbed = get_peft_model(tiny.load(llama), build_config("lora", 8, ["q_proj", "v_proj", "o_proj"]))
    disturb(disturbed, 0.5)
    assert Perplexity.load(tmp_path / "story.txt", tokenizer()).score(disturbed.eval()).value != pytest.approx(
        capped.value
    )


def test_perplexity_of_documents(llama: Path, tmp_path: Path) -> None:
    """JSON lines are separate documents: no document is context for another."""
    model, texts = tiny.load(llama), (STORY[:50], STORY[20:60])
    file = write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    total = 0.0
    for text in texts:
        ids = torch.tensor([tokenizer()(text)["input_ids"]])
        total += math.log(documented_perplexity(model, ids, 64, 64)) * len(text)
    both = Perplexity.load(file, tokenizer())
    file.unlink()
    assert [both.score(model).value for _ in range(2)] == pytest.approx([math.exp(total / 90)] * 2, rel=1e-5)
    first = Perplexity.load(write_lines(file, [{"text": text} for text in texts]), tokenizer(), ScoreSettings(limit=1))
    assert first.score(model).counts["tokens"] == len(texts[0])


def test_spearman_by_hand() -> None:
    one, two = np.array([1.0, 2, 3]), np.array([10.0, 30, 20])
    assert spearman(one, one * 7) == pytest.approx(1)
    assert spearman(one, -one) == pytest.approx(-1)
    assert spearman(one, two) == pytest.approx(0.5)
    assert spearman(np.array([1.0, 1, 2]), one) == pytest.approx(math.sqrt(3) / 2)  # ranks 1.5, 1.5, 3
    assert math.isnan(spearman(one, one * 0))


def test_spearman_as_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    generator = np.random.default_rng(0)
    for most in (3, 10, 10_000):
        a, b = generator.integers(most, size=(2, 200))
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def one_by_one(model: Any, reader: Any, pooling: str, tokens: int) -> Iterator[tuple[float, float]]:
    """The given and the computed similarity of each pair, one sentence at a time, so without padding or mask."""
    for *pair, given in ALIKE:
        vectors = []
        for sentence in pair:
            ids = torch.tensor([reader(sentence)["input_ids"][:tokens]])
            with torch.no_grad():
                hidden = model.base_model(input_ids=ids).last_hidden_state[0]
            vectors.append(hidden.mean(0) if pooling == "mean" else hidden[0])
        yield given, float(torch.cosine_similarity(vectors[0], vectors[1], dim=0))


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pairs(pooling: str, pessa: Pessa, bert: Path, tmp_path: Path) -> None:
    if pooling == "cls":
        config = {"word_embedding_dimension": 32, "pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
        (bert / "1_Pooling").mkdir()
        (bert / "1_Pooling" / "config.json").write_text(json.dumps(config))
        (bert / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    file = csv_of(tmp_path / "pairs.csv", [("sentence1", "sentence2", "score"), *ALIKE])
    result = pessa("eval", bert, "--pairs", file, "--batch", 3, "--json")
    assert result.code == 0, result
    score = json.loads(result.out)["models"][0]["pairs"]
    expected = list(one_by_one(tiny.load(bert), tokenizer(), pooling, 20 if pooling == "cls" else 40))
    assert score["value"] == pytest.approx(spearman(*np.array(expected).T))
    assert score["pairs"] == len(ALIKE)
    assert pooling in score["how"]


def test_minilm_correlates_with_human_ratings(real: Real, tmp_path: Path) -> None:
    source = real("minilm")
    embedding = embedding_of(source, tiny.read_config(source))
    assert embedding == Embedding("mean", 256)
    pairs = Similarity.load(csv_of(tmp_path / "pairs.csv"), AutoTokenizer.from_pretrained(source), embedding=embedding)
    (tmp_path / "pairs.csv").unlink()
    model = AutoModel.from_pretrained(source).eval()
    score = pairs.score(model)
    assert score.value > 0.9
    assert score.figure.interval is not None
    assert 0.3 < score.figure.interval[0] < score.value <= score.figure.interval[1]
    with torch.no_grad():
        for layer in model.encoder.layer:
            layer.attention.self.value.weight.normal_(generator=torch.Generator().manual_seed(0))
    assert pairs.score(model).value < 0.8


def test_one_row_a_model(pessa: Pessa, llama: Path, bert: Path, tmp_path: Path) -> None:
    row = {"instruction": "Is it?\n\nAnswer format: yes/no", "input": "", "output": "it is yes", "answer": "yes"}
    (tmp_path / "task.json").write_text(json.dumps([row]))
    (tmp_path / "story.txt").write_text(STORY)
    result = pessa("eval", llama, llama, "--tasks", tmp_path / "task.json", "--text", tmp_path / "story.txt")
    assert result.code == 0, result
    captions, intervals, heading, *rows = result.out.splitlines()[1:]
    assert "perplexity, windows of 64 tokens" in captions
    assert "bootstrap over windows" in intervals
    assert heading.split("  ")[0] == "model"
    assert [part.strip() for part in heading.split("  ") if part] == [
        *("model", "task", "mean"),
        *("perplexity", "nats per token", "KL to the first"),
    ]
    assert len(rows) == 3
    is_refusal(
        pessa("eval", llama, bert, "--text", tmp_path / "story.txt"), "--text", "BertForMaskedLM", "--pairs", code=2
    )


def test_refusals(pessa: Pessa, llama: Path, bert: Path, clip: Path, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    story, pairs, file = tmp_path / "story.txt", csv_of(tmp_path / "pairs.csv"), tmp_path / "file"
    story.write_text(STORY)
    is_refusal(pessa("eval", llama), "--speech", code=2)
    is_refusal(pessa("eval", llama, "--pairs", pairs), "LlamaForCausalLM", "--tasks or --text", code=2)
    is_refusal(pessa("eval", tiny_folder("whisper"), "--text", story, "--pairs", pairs), "--text and --pairs", code=2)
    is_refusal(pessa("eval", llama, "--text", story, "--window", 8, "--stride", 9), "8", "--stride 9", code=2)
    is_refusal(pessa("eval", llama, "--text", story, "--limit", -1), "--limit -1", code=2)
    is_refusal(pessa("eval", llama, "--text", tmp_path / "none.txt"), "none.txt")
    is_refusal(pessa("eval", llama, "--text", clip), "beckett.wav")
    is_refusal(pessa("eval", llama, "--text", write_lines(tmp_path / "empty.jsonl", [{"text": ""}])), "line 1")
    (tmp_path / "blank.txt").write_text("")
    is_refusal(pessa("eval", llama, "--text", tmp_path / "blank.txt"), "blank.txt is empty")
    file.write_text("a,b\n")
    is_refusal(pessa("eval", bert, "--pairs", file), "row 1")
    csv_of(file, [(*ALIKE[0][:2], "very")] * 2)
    is_refusal(pessa("eval", bert, "--pairs", file), "1 rows", "row 2")
    csv_of(file, ALIKE[1:3])
    is_refusal(pessa("eval", bert, "--pairs", file), "2 pairs")
    (bert / "modules.json").write_text(json.dumps([{"type": "sentence_transformers.models.Dense"}]))
    is_refusal(pessa("eval", bert, "--pairs", pairs), "Dense")
    (bert / "modules.json").write_text("[1")
    is_refusal(pessa("eval", bert, "--pairs", pairs), "sentence-transformers", "modules.json")


def test_refused_clips(pessa: Pessa, real: Real, clips: Path, tmp_path: Path) -> None:
    model = real("whisper-tiny.en")
    is_refusal(pessa("eval", model, "--speech", tmp_path / "none.jsonl"), "none.jsonl")
    is_refusal(pessa("eval", model, "--speech", tmp_path / "silent.wav"), "none of the 1 clips")
    is_refusal(pessa("eval", model, "--speech", write_lines(clips, [{"text": "hello"}])), "1 lines", "audio")


@pytest.mark.skipif(not os.environ.get("PESSA_DATA"), reason="PESSA_DATA names no folder with speech/ and text/")
def test_other_data(pessa: Pessa, real: Real) -> None:
    """The scores of the real models that the documentation states."""
    data = Path(os.environ["PESSA_DATA"])

    def value(model: str, option: str, path: str, *more: object) -> float:
        result = pessa("eval", real(model), f"--{option}", data / path, *more, "--json")
        assert result.code == 0, result
        return float(json.loads(result.out)["models"][0][option]["value"])

    assert value("whisper-tiny.en", "speech", "speech/clips.jsonl") == pytest.approx(0.020, abs=0.006)
    assert value("minilm", "pairs", "text/stsb-en-dev.csv", "--limit", 200) > 0.8
    assert value("smollm2-135m", "text", "text/wikitext2-valid.txt", "--limit", 2) < 25
