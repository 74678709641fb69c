"""`pessa verify`, `eval`, `bench` and the search load every model and tokenizer once, and read and encode data once."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tiny
import torch
from characters import tokenizer
from harness import Pessa, Real, TinyFolder
from peft import get_peft_model
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    WhisperFeatureExtractor,
    WhisperProcessor,
)
from tuned import disturb, with_tokenizer, write_lines

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.evaluation import bench, verify
from pessa_cli.evaluation.bench import BenchSettings, Runner
from pessa_cli.models.load import encodes_alike
from pessa_cli.surgery.model import open_model
from pessa_cli.tuning.registry import build_config

TEXTS = ("the keeper lit the lamp on the ninth of march, ", "and it burned until three sails came home. ")
PAIRS = [("a man plays", "a man is playing", 5), ("a red house", "the stock market", 0), ("salty soup", "soup", 3)]


class Calls:
    """Counts calls of functions and methods: `counted(owner, name, key)` counts by what `key` makes of the call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch

    def counted(self, owner: Any, name: str, key: Callable[..., Any] = lambda *_, **__: "") -> Counter[Any]:
        counter: Counter[Any] = Counter()
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            counter[key(*args, **kwargs)] += 1
            return original(*args, **kwargs)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            counter[key(self, *args, **kwargs)] += 1
            return original(self, *args, **kwargs)

        self._monkeypatch.setattr(owner, name, method if name.startswith("__") else call)
        return counter

    def models(self) -> Counter[Any]:
        """The models that transformers loads, by their folders; without one, it only compares names and shapes."""
        counter: Counter[Any] = Counter()
        original = PreTrainedModel.from_pretrained.__func__

        def from_pretrained(cls: Any, folder: Any, *args: Any, **kwargs: Any) -> Any:
            if folder is not None:
                counter[Path(folder)] += 1
            return original(cls, folder, *args, **kwargs)

        self._monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(from_pretrained))
        return counter

    def texts(self) -> Counter[Any]:
        """The texts that a tokenizer encodes; a batch counts as each of its texts."""
        counter: Counter[Any] = Counter()
        original = PreTrainedTokenizerBase.__call__

        def encode(self: Any, text: Any, *args: Any, **kwargs: Any) -> Any:
            counter.update([text] if isinstance(text, str) else text)
            return original(self, text, *args, **kwargs)

        self._monkeypatch.setattr(PreTrainedTokenizerBase, "__call__", encode)
        return counter

    def hashes(self) -> Counter[str]:
        """The files that are hashed, by name."""
        return self.counted(hashlib, "file_digest", lambda file, _: Path(file.name).name)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@pytest.fixture
def both(llama: Path, pruned: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A tiny LLaMA and its pruned version, both with a tokenizer."""
    return llama, with_tokenizer(pruned("llama"), tmp_path / "pruned")


def test_verify_with_texts(both: tuple[Path, Path], tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    files = [tmp_path / f"{i}.txt" for i in range(2)]
    for file, text in zip(files, TEXTS, strict=True):
        file.write_text(text)
    models, texts = calls.models(), calls.texts()
    tokenizers = calls.counted(AutoTokenizer, "from_pretrained")
    blocks = calls.counted(verify, "read_site", lambda reader, site: (reader.folder, site.name))
    assert pessa("verify", *both, "--text", files[0], "--text", files[1]).code == 1
    assert models == dict.fromkeys(both, 1)
    assert tokenizers.total() == 1
    assert texts == dict.fromkeys(TEXTS, 1)
    assert blocks == {
        (folder, f"decoder.{kind}.{i}"): 1 for folder in both for kind in ("self", "mlp") for i in range(2)
    }


def test_verify_with_clips(real: Real, clip: Path, tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    source = real("whisper-tiny.en")
    samples, rate = soundfile.read(clip)
    soundfile.write(tmp_path / "short.wav", samples[: 2 * rate], rate)
    processors = calls.counted(AutoProcessor, "from_pretrained")
    features = calls.counted(WhisperFeatureExtractor, "__call__")
    read = calls.counted(soundfile, "read", lambda path, **_: Path(path).name)
    assert pessa("verify", source, source, "--audio", clip, "--audio", tmp_path / "short.wav").code == 0
    assert processors.total() == 1
    assert features.total() == 2
    assert read == {"beckett.wav": 1, "short.wav": 1}


@pytest.mark.parametrize("metric", ["likelihood", "generation"])
def test_eval_of_two_models_with_equal_tokenizers(
    metric: str, both: tuple[Path, Path], tmp_path: Path, pessa: Pessa, calls: Calls
) -> None:
    """Each data file is hashed once, and each of its texts is encoded once for both models."""
    row = {"instruction": "Is it?\n\nAnswer format: yes/no", "input": "", "output": "it is yes", "answer": "yes"}
    (tmp_path / "task.json").write_text(json.dumps([row]))
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    models, texts, hashes = calls.models(), calls.texts(), calls.hashes()
    data = ("--tasks", tmp_path / "task.json", "--text", tmp_path / "texts.jsonl")
    result = pessa("eval", *both, *data, "--metric", metric)
    assert result.code == 0, result
    assert models == dict.fromkeys(both, 1)
    assert hashes["task.json"] == hashes["texts.jsonl"] == 1
    assert len(texts) == len(TEXTS) + (2 if metric == "likelihood" else 1)
    assert set(texts.values()) == {1}


def test_eval_of_pairs(tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    both = [with_tokenizer(tiny_folder("bert"), tmp_path / name) for name in ("one", "other")]
    (tmp_path / "pairs.csv").write_text("".join(f"{a},{b},{value}\n" for a, b, value in PAIRS))
    texts, hashes = calls.texts(), calls.hashes()
    assert pessa("eval", *both, "--pairs", tmp_path / "pairs.csv").code == 0
    assert hashes["pairs.csv"] == 1
    assert texts == dict.fromkeys([text for first, second, _ in PAIRS for text in (first, second)], 1)


def test_eval_of_speech(real: Real, clip: Path, tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    source = real("whisper-tiny.en")
    write_lines(tmp_path / "clips.jsonl", [{"audio": str(clip), "text": "Ever tried. Ever failed."}])
    models, hashes = calls.models(), calls.hashes()
    features = calls.counted(WhisperFeatureExtractor, "__call__")
    processors = calls.counted(WhisperProcessor, "from_pretrained")
    assert pessa("eval", source, source, "--speech", tmp_path / "clips.jsonl").code == 0
    assert models == {source: 1}
    assert hashes["beckett.wav"] == features.total() == 1
    assert processors.total() <= 2


def test_eval_with_and_without_an_adapter(llama: Path, tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    """The base is loaded once; once an adapter has changed it, it is loaded anew."""
    torch.manual_seed(0)
    tuned = get_peft_model(tiny.load(llama), build_config("lora", 8, ["q_proj", "v_proj"]))
    disturb(tuned, 0.5)
    tuned.save_pretrained(tmp_path / "adapter")
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    models, adapted = calls.models(), f"{llama}+{tmp_path / 'adapter'}"
    options = ("--text", tmp_path / "texts.jsonl", "--json")
    together = json.loads(pessa("eval", llama, adapted, *options).out)["models"]
    assert models == {llama: 1}
    again = json.loads(pessa("eval", adapted, llama, *options).out)["models"]
    assert models == {llama: 3}
    assert [model["text"]["value"] for model in together] == [model["text"]["value"] for model in again[::-1]]
    assert together[0]["text"]["value"] != together[1]["text"]["value"]


def test_tokenizers_that_differ_do_not_share_data(llama: Path, tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    """Negative control: only tokenizers of the same state share encoded data."""
    other = tokenizer()
    other.add_tokens(["lamp"])
    with_tokenizer(llama, tmp_path / "same")
    other.save_pretrained(with_tokenizer(llama, tmp_path / "other"))
    first, same, changed = (AutoTokenizer.from_pretrained(f) for f in (llama, tmp_path / "same", tmp_path / "other"))
    first(["one", "three"], padding=True, truncation=True, max_length=3)
    assert encodes_alike(first, same)
    assert not encodes_alike(first, changed)
    write_lines(tmp_path / "texts.jsonl", [{"text": text} for text in ("sails", "a lap")])
    texts, hashes = calls.texts(), calls.hashes()
    assert pessa("eval", llama, tmp_path / "other", "--text", tmp_path / "texts.jsonl").code == 0
    assert texts == {"sails": 2, "a lap": 2}
    assert hashes["texts.jsonl"] == 1


def test_search_with_calibration(llama: Path, tmp_path: Path, pessa: Pessa, calls: Calls) -> None:
    for name, text in zip(("calibrate.txt", "evaluate.txt"), TEXTS, strict=True):
        (tmp_path / name).write_text(text * 3)
    hashes, texts = calls.hashes(), calls.texts()
    data = ("--calibrate", tmp_path / "calibrate.txt", "--evaluate", tmp_path / "evaluate.txt")
    result = pessa("prune", llama, "-o", tmp_path / "out", "--max-ppl-increase", "90%", *data)
    assert result.code == 0, result
    assert hashes["evaluate.txt"] == 1
    assert texts[TEXTS[1] * 3] == 1


def test_search_on_a_compact_model(llama: Path, tmp_path: Path, pessa: Pessa) -> None:
    """The search cuts a compact model further, and the written model has the quality that it found."""
    (tmp_path / "story.txt").write_text(TEXTS[1] * 3)
    assert pessa("prune", llama, "-o", tmp_path / "compact", "--ratio", "0.2", "--rope-ratio", "0.2").code == 0
    limit = ("--max-ppl-increase", "90%", "--evaluate", tmp_path / "story.txt")
    result = pessa("prune", tmp_path / "compact", "-o", tmp_path / "out", *limit, "--json")
    assert result.code == 0, result
    found = json.loads(result.out)["search"]
    models = [open_model(folder) for folder in (tmp_path / "out", tmp_path / "compact", llama)]
    assert models[0].parameters < models[1].parameters < models[2].parameters
    scored = json.loads(pessa("eval", tmp_path / "out", "--text", tmp_path / "story.txt", "--json").out)
    value = scored["models"][0]["text"]["value"]
    assert value <= found["limit"]
    assert any(abs(value - each["value"]) < 1e-4 * value for each in found["tried"])


def test_bench_runs_one_model_on_inputs_made_once(tiny_folder: TinyFolder, calls: Calls) -> None:
    """A worker process gets the opened checkpoint, and reads neither its headers nor its weights again."""
    model = open_model(tiny_folder("llama"))
    models, opened = calls.models(), calls.counted(CheckpointReader, "__init__")
    inputs = calls.counted(bench, "random_tokens")
    runner = Runner(model, BenchSettings(tokens=2))
    for kind in runner.answer("kinds"):
        for _ in range(2):
            runner.answer(kind)
    assert models == {tiny_folder("llama"): 1}
    assert inputs.total() == 1
    assert opened.total() == 0
