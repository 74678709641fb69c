"""A file to read that does not exist, or is a pipe: each option that names it says so, and nothing is written."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
from harness import Pessa, TinyFolder, copy_of, is_refusal, snapshot
from tuned import sums, with_tokenizer

LINES = (
    "verify whisper whisper --audio nosuch.wav",
    "verify whisper whisper --audio tone.wav --audio nosuch.wav",
    "verify llama llama --text nosuch.txt",
    "eval whisper --speech nosuch.jsonl",
    "eval whisper --speech nosuch.wav",
    "eval llama --text nosuch.txt",
    "eval llama --tasks nosuch.json",
    "eval bert --pairs nosuch.csv",
    "eval llama --text words.txt --adapter nosuch",
    "tune llama -o out --method lora --device cpu --data nosuch.jsonl",
    "tune llama -o out --method lora --device cpu --data sums.jsonl --eval-data nosuch.jsonl",
    "tune llama -o out --recipe nosuch.toml --data sums.jsonl",
    "prune llama -o out --calibrate nosuch.txt --ratio 0.3",
    "prune whisper -o out --calibrate tone.wav --calibrate nosuch.wav --ratio 0.3",
    "inspect llama --calibrate nosuch.txt",
    "run nosuch.toml llama -o out",
    "run recipe.toml llama -o out",
    "merge llama nosuch -o out",
    "inspect nosuch",
    "verify llama nosuch",
    "bench llama nosuch",
    "export nosuch -o out",
)


@pytest.fixture
def world(tiny_folder: TinyFolder, place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models, data, and a recipe that names a file that does not exist."""
    monkeypatch.chdir(place)
    copy_of(tiny_folder("whisper"), place / "whisper")
    for name in ("llama", "bert"):
        with_tokenizer(tiny_folder(name), place / name)
    soundfile.write(place / "tone.wav", np.sin(np.arange(8000) / 9), 16000)
    (place / "words.txt").write_text("some words")
    (place / "recipe.toml").write_text('[prune]\nratio = 0.3\ncalibrate = ["nosuch.txt"]\n')
    sums(place / "sums.jsonl")
    return place


def test_every_option_that_names_a_file(world: Path, pessa: Pessa, subtests: pytest.Subtests) -> None:
    before = snapshot(world)
    for line in LINES:
        missing = next(word for word in reversed(line.split()) if "nosuch" in word or word == "recipe.toml")
        missing = "nosuch.txt" if missing == "recipe.toml" else missing
        with subtests.test(line):
            result = pessa(*line.split())
            is_refusal(result, f"{missing} does not exist", code=1)
            assert snapshot(world) == before


def test_pipes(world: Path, pessa: Pessa, subtests: pytest.Subtests) -> None:
    """Reading one may never end, so it is refused without being opened, and not called missing."""
    names = sorted({word for line in LINES for word in line.split() if "nosuch" in word} | {"nosuch.txt"})
    for name in names:
        os.mkfifo(world / name)
    before = sorted(path.name for path in world.iterdir())
    for line in (*LINES, "verify nosuch"):
        with subtests.test(line):
            result = pessa(*line.split())
            is_refusal(result, "nosuch", code=1)
            assert "does not exist" not in result.err
            assert "download" not in result.err
            assert sorted(path.name for path in world.iterdir()) == before
