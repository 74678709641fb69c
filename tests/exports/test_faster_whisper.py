"""A dense pruned model, converted by CTranslate2, transcribes in faster-whisper, which does not know pessa."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from ctranslate2.converters import TransformersConverter
from faster_whisper import WhisperModel
from harness import RealPruned, copy_of, edit_weights
from numpy.typing import NDArray
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model

SIDE_FILES = ["tokenizer.json", "preprocessor_config.json"]


@pytest.fixture(scope="module")
def compact(real_pruned: RealPruned) -> Path:
    return real_pruned("whisper-tiny.en", Rule(ratio=0.05))


@pytest.fixture(scope="module")
def dense(compact: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, pruned and then exported as in the documentation."""
    place = tmp_path_factory.mktemp("faster")
    export_model(open_model(compact), place / "dense", "dense")
    return place / "dense"


@pytest.fixture(scope="module")
def half_a_minute(clip: Path) -> NDArray[np.float32]:
    """The clip padded with silence to 30 s, because faster-whisper and transformers pad features differently."""
    samples = load_audio(clip)
    return np.pad(samples, (0, 30 * SAMPLE_RATE - len(samples)))


@pytest.fixture(scope="module")
def tokens(dense: Path, half_a_minute: NDArray[np.float32], tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """The tokens of faster-whisper for the dense folder."""
    return faster_whisper(dense, tmp_path_factory.mktemp("converted") / "out", half_a_minute)


def faster_whisper(folder: Path, into: Path, samples: NDArray[np.float32]) -> list[int]:
    """The tokens under greedy decoding, after conversion by CTranslate2."""
    TransformersConverter(str(folder), copy_files=SIDE_FILES).convert(str(into))
    model = WhisperModel(str(into), device="cpu", compute_type="float32", cpu_threads=1)
    segments, _ = model.transcribe(samples, beam_size=1, temperature=0.0, without_timestamps=True)
    return [token for segment in segments for token in segment.tokens]


def test_the_dense_layout_transcribes_in_faster_whisper(
    compact: Path, dense: Path, half_a_minute: NDArray[np.float32], tokens: list[int]
) -> None:
    """The tokens equal those of transformers with the compact folder."""
    theirs = WhisperForConditionalGeneration.from_pretrained(compact, dtype=torch.float32).eval()
    processor = WhisperProcessor.from_pretrained(dense)
    features = processor(half_a_minute, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
    expected = theirs.generate(features, do_sample=False, num_beams=1, max_new_tokens=60)[0].tolist()
    assert "Ever tried" in processor.decode(expected)
    assert tokens == expected


def test_negative_control_one_block_without_output(
    dense: Path, half_a_minute: NDArray[np.float32], tokens: list[int], tmp_path: Path
) -> None:
    """The test above fails when the output projection of one encoder block is zero."""
    damage = edit_weights(lambda t: t["model.encoder.layers.0.self_attn.out_proj.weight"].zero_())
    damage(copy_of(dense, tmp_path / "damaged"))
    assert faster_whisper(tmp_path / "damaged", tmp_path / "a", half_a_minute) != tokens
