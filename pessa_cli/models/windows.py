"""Encoding calibration data as inputs of a model, cut into windows of at most the model's input length."""

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

TEXT_TOKENS = 512  # per window, unless the model has fewer positions


def windows(folder: Path, model: Any, items: Sequence[DataItem], transcribed: bool) -> Iterator[tuple[Inputs, int]]:
    """The windows of all items in turn, each with its share of the item's bytes.

    folder: that of the model, for its tokenizer or processor. transcribed: see `inputs_of`, also for what raises.
    """
    for item in items:
        check_kind(folder, model, item)
    encoder = encoder_for(folder, model)
    for item in items:
        found = list(inputs_of(model, encoder, item, transcribed))
        for window in found:
            yield window, item.nbytes // len(found)


def check_kind(folder: Path, model: Any, item: DataItem) -> None:
    """Raise UsageError when a speech model is given text, or a text model audio."""
    speech = model.config.model_type == "whisper"
    if speech != (item.audio is not None):
        what = ("a speech model", "text") if speech else ("a text model", "audio")
        raise UsageError(
            f"{folder} is {what[0]}, but the calibration data contains {what[1]}",
            "give audio to speech models and text to text models",
        )


def encoder_for(folder: Path, model: Any) -> Any:
    """The processor of a speech model, or the tokenizer of a text model.

    Raises UsageError for a model that takes something else, PessaError for a slow (pure Python) tokenizer.
    """
    if model.config.model_type == "whisper":
        return from_folder(transformers.AutoProcessor, folder, "preprocessor and tokenizer")
    if model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        raise UsageError(
            f"{folder}: a {model.config.model_type} cannot be calibrated: it is not Whisper and needs more than text",
            "leave --calibrate out: the weights then decide the ranks",
        )
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    if not tokenizer.is_fast:
        raise PessaError(
            f"{folder}: its tokenizer is a slow (pure Python) one, which cannot cut a text into windows",
            "add the tokenizer.json of the original model",
        )
    return tokenizer


def inputs_of(model: Any, encoder: Any, item: DataItem, transcribed: bool = True) -> Iterator[Inputs]:
    """Encode an item as inputs of batch size 1, cut into windows of at most the model's input length.

    encoder: from `encoder_for`. transcribed: whether the decoder of a speech model gets the transcript of each window.
    Where the data give none, the model transcribes the window. False gives the start token alone, for when no decoder
    block is calibrated. Raises UsageError when the item does not fit the model.
    """
    if item.audio is not None:
        yield from _speech(model, encoder, load_audio(item.audio), item.text, transcribed)
        return
    length = min(TEXT_TOKENS, getattr(model.config, "max_position_embeddings", TEXT_TOKENS))
    cut = encoder(item.text, truncation=True, max_length=length, return_overflowing_tokens=True)
    for ids in cut["input_ids"]:
        window = torch.tensor([ids])
        yield {"input_ids": window, "attention_mask": torch.ones_like(window)}


def _speech(
    model: Any, processor: Any, samples: NDArray[np.float32], text: str | None, transcribed: bool
) -> Iterator[Inputs]:
    window = processor.feature_extractor.n_samples
    for start in range(0, len(samples), window):
        part = samples[start : start + window]
        features = processor(part, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"].to(
            device_of(model)
        )
        start_token = torch.full((1, 1), model.config.decoder_start_token_id, device=device_of(model))
        if not transcribed:
            ids = start_token
        elif text is not None and len(samples) <= window:
            ids = processor.tokenizer(text, return_tensors="pt").input_ids[:, :-1]
        else:
            ids = model.generate(input_features=features, do_sample=False, num_beams=1)
            if ids[0, 0] != start_token[0, 0]:
                ids = torch.cat([start_token, ids], dim=1)
        yield {"input_features": features, "decoder_input_ids": ids[:, : model.config.max_target_positions]}


def device_of(model: Any) -> torch.device:
    """The device for inputs. A model whose weights are offloaded to disk reports meta, but computes on the CPU."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def on_device(inputs: Sequence[Inputs], device: str | torch.device) -> list[Inputs]:
    """Copies of the inputs on a device. Copies are no inference tensors, so autograd can use them."""
    return [{name: tensor.clone().to(device) for name, tensor in given.items()} for given in inputs]
