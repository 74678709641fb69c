"""Windows of speech: which recordings are scored, how long windows are, and that a seed decides every byte."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from speech_data import Recording, clips, to_score, transcripts, write

from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.models.augment import LONGEST, SHORTEST, Window, augmented, windows_of
from pessa_cli.models.data import read_data

RNG = np.random.default_rng(0)
RECORDINGS = [
    Recording(f"r{number}", f"text {number}", 0.1 * RNG.standard_normal(round(seconds * SAMPLE_RATE)).astype("float32"))
    for number, seconds in enumerate(RNG.uniform(0.3, 4, 120))
]


def seconds(window: Window[Recording]) -> float:
    return len(window.samples) / SAMPLE_RATE


def test_a_name_decides_the_part_for_good() -> None:
    names = [f"digits/{number}" for number in range(2000)]
    scored = {name for name in names if to_score(name, 0.5)}
    assert 900 < len(scored) < 1100
    assert scored > {name for name in names if to_score(name, 0.25)}, "a larger share takes more, and none back"
    assert to_score("digits/1", 0.5), "another hash would mix data that models were calibrated on into the scores"


def test_each_recording_is_scored_once() -> None:
    windows = windows_of(RECORDINGS, seed=3)
    assert sorted(each.name for window in windows for each in window.recordings) == sorted(e.name for e in RECORDINGS)
    assert windows[0].text == " ".join(each.text for each in windows[0].recordings)


def test_lengths() -> None:
    lengths = np.array([seconds(window) for window in windows_of(RECORDINGS, seed=3, count=300)])
    assert len(lengths) == 300
    assert lengths.min() >= SHORTEST
    assert lengths.max() <= LONGEST
    assert (lengths < 8).mean() > 0.35, "most of the 30 s is padding in many windows"
    assert (lengths > 20).mean() > 0.1


def test_windows_too_long_are_never_made() -> None:
    long = [Recording(str(number), "text", np.zeros(20 * SAMPLE_RATE, np.float32)) for number in range(5)]
    assert [len(window.recordings) for window in windows_of(long, seed=0)] == [1] * 5
    assert windows_of([], seed=0, count=4) == []


def test_a_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write(tmp_path / name, windows_of(RECORDINGS[:20], seed, 3), seed)
    files = [[file.read_bytes() for file in sorted((tmp_path / name).iterdir())] for name in "abc"]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_augmentation_changes_speed_gain_and_noise() -> None:
    tone = np.sin(np.arange(SAMPLE_RATE) * 2 * np.pi * 440 / SAMPLE_RATE).astype(np.float32)
    changed = [augmented(tone, np.random.default_rng(seed)) for seed in range(30)]
    lengths = np.array([len(each) for each in changed]) / len(tone)
    assert 0.9 <= lengths.min() < 0.95
    assert 1.05 < lengths.max() <= 1.12
    assert all(np.abs(each).max() <= 1 for each in changed)
    powers = np.array([np.mean(each**2) for each in changed])
    assert powers.max() > 5 * powers.min()
    full = np.zeros(round(LONGEST * SAMPLE_RATE), np.float32) + tone[:1] + 0.1
    assert max(len(augmented(full, np.random.default_rng(seed))) for seed in range(3)) <= LONGEST * SAMPLE_RATE + 1


@pytest.mark.parametrize("text", ["beep: [a tone]", "silence/1: (1 second)", "; comment: no", "join: <beep>", "none:"])
def test_what_is_no_speech(text: str) -> None:
    assert transcripts(f"{text}\ndigits/1: one\n") == {"digits/1": "one"}


def test_what_is_written_is_read_as_data(tmp_path: Path) -> None:
    windows = windows_of(RECORDINGS[:20], seed=0, count=2)
    write(tmp_path / "plain", windows)
    items = read_data([tmp_path / "plain" / "clips.jsonl"]).items
    assert [item.text for item in items] == [window.text for window in windows]
    for item, window in zip(items, windows, strict=True):
        assert item.audio is not None
        np.testing.assert_allclose(load_audio(item.audio), window.samples, atol=1 / 2**15)
    lines = (tmp_path / "plain" / "clips.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["of"] == [each.name for each in windows[0].recordings]
    assert [each.text for each in clips(tmp_path / "plain" / "clips.jsonl")] == [window.text for window in windows]
