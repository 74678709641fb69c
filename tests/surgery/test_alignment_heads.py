"""Whisper's alignment heads: those of a teacher's layers are replaced, so that timestamps of words work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import Pessa, TinyFolder, copy_of, edit_json

from pessa_cli.blocks.alignment import alignment_heads
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.surgery.model import open_model

FILE = "generation_config.json"
TEACHER = [[1, 0], [7, 3], [31, 2]]


def listing(folder: Path, heads: list[list[int]]) -> Path:
    def change(found: dict[str, Any]) -> None:
        found.pop("_from_model_config", None)
        found |= {"alignment_heads": heads, "no_timestamps_token_id": 50, "is_multilingual": False}

    edit_json(change, FILE)(folder)
    return folder


def word_times(folder: Path) -> torch.Tensor:
    model = tiny.load(folder)
    features = torch.randn(1, 8, 60, generator=torch.Generator().manual_seed(2))
    written = model.generate(features, return_token_timestamps=True, max_new_tokens=4, min_new_tokens=4, num_frames=60)
    times: torch.Tensor = written["token_timestamps"]
    return times


@pytest.mark.parametrize("command", ["prune --ratio 0.4", "decompose"])
def test_heads_of_a_teacher_are_replaced_with_a_note(
    command: str, tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa
) -> None:
    source = listing(copy_of(tiny_folder("whisper"), tmp_path / "student"), TEACHER)
    before = (source / FILE).read_bytes()
    with pytest.raises(IndexError):
        word_times(source)
    name, *options = command.split()
    done = pessa(name, source, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert FILE in done.err
    assert "teacher" in done.err
    written = json.loads((tmp_path / "out" / FILE).read_text())
    assert written["alignment_heads"] == [[1, 0], [1, 1], [1, 2], [1, 3]]  # openai-whisper's choice
    assert written | {"alignment_heads": TEACHER} == json.loads(before)
    assert len(word_times(tmp_path / "out")[0]) > 3
    assert (source / FILE).read_bytes() == before
    manifest = json.loads((tmp_path / "out" / "pessa.json").read_text())
    assert FILE in manifest["notes"][0]
    assert manifest["source_sha256"][FILE] != manifest["sha256"][FILE]
    assert (name == "decompose") == verify_models(
        open_model(source), open_model(tmp_path / "out"), level="weights"
    ).same


def test_right_heads_are_copied_byte_for_byte(tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa) -> None:
    source = listing(copy_of(tiny_folder("whisper"), tmp_path / "model"), [[1, 3], [0, 2]])
    done = pessa("prune", source, "-o", tmp_path / "out", "--ratio", "0.4")
    assert done.code == 0, done.err
    assert FILE not in done.err
    assert (tmp_path / "out" / FILE).read_bytes() == (source / FILE).read_bytes()
    assert "notes" not in json.loads((tmp_path / "out" / "pessa.json").read_text())


@pytest.mark.parametrize(
    ("found", "wanted"),
    [
        ([], []),
        ([[1, 0], [0, 1], [1, 0]], [(0, 1), (1, 0)]),
        ([[0, 2]], [(1, 0), (1, 1)]),
        ([[2, 0], [0, 0]], [(1, 0), (1, 1)]),
        ([[0, -1]], None),
        ([[0, True]], None),
        ([[0]], None),
        (["01"], None),
        ({}, None),
        (7, None),
    ],
    ids=str,
)
def test_lists_by_hand(found: object, wanted: list[tuple[int, int]] | None) -> None:
    """Of a decoder with two layers of two heads."""
    assert alignment_heads(found, 2, 2) == wanted
