"""Windows that are made from calibration data: of which recordings, with which texts, and how they are recorded."""

from __future__ import annotations

import json
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import soundfile

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.audio import SAMPLE_RATE
from pessa_cli.models.augment import LONGEST, SHORTEST, AugmentedItem, ClipPart, augment
from pessa_cli.models.data import CalibrationData, amount_of, read_data
from pessa_cli.statistics.file import augmentation_of, files_of

APART = 4


def speech(folder: Path, seconds: Iterable[float], rate: int = SAMPLE_RATE) -> list[Path]:
    """Write files of noise, each with its own loudness, by which it is known again."""
    rng, files = np.random.default_rng(3), []
    for number, length in enumerate(seconds):
        files.append(folder / f"{number}.wav")
        soundfile.write(files[-1], 0.1 * rng.standard_normal(round(length * rate)), rate)
    return files


def lines(folder: Path, files: list[Path], rows: list[dict[str, str]]) -> Path:
    path = folder / "clips.jsonl"
    texts = [json.dumps({"audio": file.name, **row}) for file, row in zip(files, rows, strict=True)]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def made(data: CalibrationData, count: int = 40, seed: int = 0) -> list[AugmentedItem]:
    found = augment(data, count, seed, APART).items
    windows = [item for item in found if isinstance(item, AugmentedItem)]
    assert len(windows) == len(found) == count
    return windows


def parts(item: AugmentedItem) -> list[ClipPart]:
    assert item.window is not None
    return [*item.window.recordings]


def test_windows_of_all_lengths_with_the_texts_of_their_clips(tmp_path: Path) -> None:
    files = speech(tmp_path, np.random.default_rng(0).uniform(1, 5, 24))
    rows = [{"text": f"text {number}", "language": "en"} for number in range(24)]
    data = read_data([lines(tmp_path, files, rows)])
    windows = made(data)
    for item in windows:
        assert item.text == " ".join(f"text {part.item.audio.stem}" for part in parts(item) if part.item.audio)
        assert item.language == "en"
    for item in windows[:4]:
        assert len(item.samples) <= LONGEST * SAMPLE_RATE + 1
        assert 0.85 < len(item.samples) / SAMPLE_RATE / item.seconds < 1.15
    lengths = np.array([item.seconds for item in windows])
    assert lengths.min() < 2 * SHORTEST
    assert lengths.max() > 20
    assert len({part.item.sha256 for item in windows for part in parts(item)}) == 24


def test_a_seed_decides_and_the_order_of_the_data_does_not(tmp_path: Path) -> None:
    files = speech(tmp_path, [1, 2, 3, 4, 1.5, 2.5])
    one, two, other = (made(read_data(paths), 4, seed) for paths, seed in ((files, 1), (files[::-1], 1), (files, 2)))
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.samples, b.samples)
    assert any(len(a.samples) != len(b.samples) for a, b in zip(one, other, strict=True))
    assert one[0].window is not None
    assert not np.array_equal(one[0].samples, one[0].window.samples)  # changed, and not only joined


@pytest.mark.parametrize("seconds", [2.0, 60.0], ids=["whole", "in parts"])
def test_held_out_windows_are_made_from_other_recordings(seconds: float, tmp_path: Path) -> None:
    windows = made(read_data(speech(tmp_path, [seconds] * 16, 500)), 200)
    held_out, others = (
        {part.item.sha256 for item in side for part in parts(item)}
        for side in (windows[::APART], [item for number, item in enumerate(windows) if number % APART])
    )
    assert len(held_out) == 4
    assert len(others) == 12
    assert not held_out & others


def test_of_few_recordings_the_clips_are_held_out_and_of_few_clips_nothing(tmp_path: Path) -> None:
    windows = made(read_data(speech(tmp_path, [200.0])))
    places = [{(part.start, part.stop) for item in windows[at::APART] for part in parts(item)} for at in range(APART)]
    assert not places[0] & (places[1] | places[2] | places[3])
    assert {item.text for item in windows} == {None}
    starts = sorted(places[0] | places[1] | places[2] | places[3])
    assert starts[0][0] == 0.0
    assert starts[-1][1] == 200.0
    assert all(SHORTEST <= stop - start <= LONGEST for start, stop in starts[:-1])
    assert all(end == start for (_, end), (start, _) in pairwise(starts))
    (tmp_path / "two").mkdir()
    assert len({part.item.sha256 for part in parts(made(read_data(speech(tmp_path / "two", [3.0, 4.0])), 1)[0])}) <= 2


def test_languages_are_not_joined_and_an_unknown_text_leaves_the_window_without_one(tmp_path: Path) -> None:
    files = speech(tmp_path, [2.0] * 12)
    rows = [{"text": "x", "language": "de" if number < 8 else "fr"} for number in range(12)]
    windows = made(read_data([lines(tmp_path, files, rows)]), 60)
    assert all({part.item.language for part in parts(item)} == {item.language} for item in windows)
    shares = [sum(item.language == language for item in windows) / 60 for language in ("de", "fr")]
    assert shares[0] > shares[1] > 0.1
    rows[0] = {"language": "de"}
    for item in made(read_data([lines(tmp_path, files, rows)]), 60):
        assert (item.text is None) == any(part.text is None for part in parts(item))


def test_the_identities_name_the_files_and_the_augmentation(tmp_path: Path) -> None:
    data = read_data(speech(tmp_path, [2.0] * 3))
    changed = augment(data, 5, 7, APART)
    assert augmentation_of(changed.identities) == "5 windows, seed 7"
    assert augmentation_of(data.identities) is None
    assert files_of(changed.identities) == files_of(data.identities)
    assert changed.identities != augment(data, 6, 7, APART).identities


def test_the_amount_of_data_is_that_of_the_recordings(tmp_path: Path) -> None:
    data = read_data(speech(tmp_path, [12.0] * 10))
    assert amount_of(data.items) == "2 minutes of audio"
    assert amount_of(augment(data, 40, 0, APART).items) == "2 minutes of audio"
    (tmp_path / "a.txt").write_text("é" * 1234)
    assert amount_of(read_data([tmp_path / "a.txt"]).items) == "1,234 characters of text"


def test_what_cannot_be_augmented(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UsageError, match="--augment 3: these calibration data are text"):
        augment(read_data([tmp_path / "a.txt"]), 3, 0, APART)
    (tmp_path / "bad.wav").write_bytes(b"no audio")
    with pytest.raises(PessaError, match=r"cannot read .*bad\.wav"):
        augment(read_data([tmp_path / "bad.wav"]), 3, 0, APART)
    soundfile.write(tmp_path / "none.wav", np.zeros(0), 8000)
    with pytest.raises(PessaError, match=r"none\.wav contains no samples"):
        augment(read_data([tmp_path / "none.wav"]), 3, 0, APART)
