"""Scores of Whisper models on clips: the KL divergence from the original, and intervals over clips."""

from __future__ import annotations

from pathlib import Path

import pytest
import soundfile
import tiny
import torch
from harness import Real, edit_json
from speech_scores import Sums, original, score, shown
from torch.nn.functional import kl_div
from transformers import WhisperForConditionalGeneration, WhisperProcessor

from pessa_cli.evaluation.word_errors import Clip
from pessa_cli.models.audio import SAMPLE_RATE
from pessa_cli.models.inputs import built_in_speech


def test_figures_weigh_clips_by_their_tokens() -> None:
    assert shown(Sums([1.0, 2.0, 4.0], [10, 20, 40]).figure, ".3f") == "0.100 (0.100 to 0.100)"
    assert Sums([0.0, 30.0], [10, 20]).figure.value == 1.0
    assert shown(Sums([1.0], [4]).figure, ".1%") == "25.0%"


def test_scores_of_an_altered_model(real: Real, tmp_path: Path) -> None:
    folder = tiny.whisper_with_tokenizer(real("whisper-tiny.en"), tmp_path / "tiny")
    edit_json(lambda config: config.update(max_length=20), "generation_config.json")(folder)
    clip = tmp_path / "speech.wav"
    soundfile.write(clip, built_in_speech(), SAMPLE_RATE)
    processor = WhisperProcessor.from_pretrained(folder)
    first, other = (WhisperForConditionalGeneration.from_pretrained(folder) for _ in range(2))
    said = "the original's own words do not matter here"
    of = original(first, processor, [Clip(clip, "", said), Clip(clip, "", None)])
    same = score(first, of, words=False)
    assert len(of.clips) == 1, "a clip without a text is left out"
    assert same.kl.figure.value == pytest.approx(0, abs=1e-9)
    # The same by transformers' own loss and one call of the model, without the token that ends the text.
    labels = processor.tokenizer(f" {said}", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = first(input_features=of.features[0], decoder_input_ids=labels[:, :-1]).logits[0]
        loss = torch.nn.functional.cross_entropy(logits[1:-1], labels[0, 2:-1])
        assert same.nats.figure.value == pytest.approx(loss.item(), rel=1e-4)
        other.model.encoder.layer_norm.weight.mul_(-8)
        ids = of.said[0].tokens
        ours, theirs = (
            model(input_features=of.features[0], decoder_input_ids=ids[:, :-1]).logits[0, of.said[0].prompt - 1 :]
            for model in (other, first)
        )
        expected = kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean")
    changed = score(other, of, words=False)
    assert changed.kl.figure.value == pytest.approx(expected.item(), rel=1e-4)
    assert changed.kl.figure.value > 1e-4
    assert changed.nats.figure.value != pytest.approx(same.nats.figure.value, rel=1e-4)
    assert changed.words is None
