"""Calibration data as inputs of a model, cut into windows of what it takes at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.models.data import DataItem
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.load import from_folder

TEXT_TOKENS = 512  # of a window of text, if the model reads so many


def item_windows(folder: Path, model: Any, item: DataItem, said: bool) -> Iterator[tuple[Inputs, int]]:
    """The inputs of an item, each with its share of the bytes."""
    windows = list(inputs_of(folder, model, item, said))
    for window in windows:
        yield window, item.nbytes // len(windows)


def inputs_of(folder: Path, model: Any, item: DataItem, said: bool = True) -> Iterator[Inputs]:
    """An item as inputs of batch 1, cut into windows of what the model takes at a time.

    A decoder of speech gets the transcript, or what the model itself hears where there is none; unless `said` it is of
    no interest, and gets next to nothing.
    """
    speech = model.config.model_type == "whisper"
    if not speech and (model.config.is_encoder_decoder or model.main_input_name != "input_ids"):
        raise UsageError(
            f"{folder}: a {model.config.model_type} cannot be calibrated: it takes more than a text",
            "go by the weights alone",
        )
    if speech != (item.audio is not None):
        what = "listens, and there is text" if speech else "reads, and there is audio"
        raise UsageError(f"{folder} {what} in the data", "give audio to speech models and text to text models")
    if item.audio is not None:
        yield from _speech(folder, model, load_audio(item.audio), item.text, said)
        return
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    length = min(TEXT_TOKENS, getattr(model.config, "max_position_embeddings", TEXT_TOKENS))
    if not tokenizer.is_fast:
        raise PessaError(f"{folder}: its tokenizer cuts no windows", "add the tokenizer.json of the original model")
    cut = tokenizer(item.text, truncation=True, max_length=length, return_overflowing_tokens=True)
    for ids in cut["input_ids"]:
        window = torch.tensor([ids])
        yield {"input_ids": window, "attention_mask": torch.ones_like(window)}


def _speech(folder: Path, model: Any, samples: NDArray[np.float32], text: str | None, said: bool) -> Iterator[Inputs]:
    processor = from_folder(transformers.AutoProcessor, folder, "preprocessor and tokenizer")
    window = processor.feature_extractor.n_samples
    for start in range(0, len(samples), window):
        part = samples[start : start + window]
        features = processor(part, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"].to(
            device_of(model)
        )
        start_token = torch.full((1, 1), model.config.decoder_start_token_id, device=device_of(model))
        if not said:
            ids = start_token
        elif text is not None and len(samples) <= window:
            ids = processor.tokenizer(text, return_tensors="pt").input_ids[:, :-1]
        else:
            ids = model.generate(input_features=features, do_sample=False, num_beams=1)
            if ids[0, 0] != start_token[0, 0]:
                ids = torch.cat([start_token, ids], dim=1)
        yield {"input_features": features, "decoder_input_ids": ids[:, : model.config.max_target_positions]}


def device_of(model: Any) -> torch.device:
    """Where inputs have to be; weights that are read from disk as they are needed say meta."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def on_device(inputs: Sequence[Inputs], device: str | torch.device) -> list[Inputs]:
    """Copies of the inputs there, which gradients may flow beside."""
    return [{name: tensor.clone().to(device) for name, tensor in given.items()} for given in inputs]
