"""Encoding calibration data as inputs of a model, cut into windows of at most the model's input length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.audio import SAMPLE_RATE
from pessa_cli.models.data import DataItem
from pessa_cli.models.inputs import Inputs
from pessa_cli.models.load import from_folder

TEXT_TOKENS = 512  # per window, unless the model has fewer positions
TASK = "transcribe"  # of Whisper's tasks, the one that calibration data are for


def windows(
    folder: Path, model: Any, items: Sequence[DataItem], transcribed: Callable[[int], bool] = lambda _number: True
) -> Iterator[tuple[Inputs, int]]:
    """The windows of all items in turn, each with its share of the item's bytes.

    folder: that of the model, for its tokenizer or processor. transcribed: whether the window with this number, counted
    over all items, is transcribed; see `inputs_of`, also for what raises.
    """
    for item in items:
        check_kind(folder, model, item)
    encoder = encoder_for(folder, model)
    before = 0
    for item in items:

        def of_item(number: int, before: int = before) -> bool:
            return transcribed(before + number)

        found = list(inputs_of(model, encoder, item, of_item))
        before += len(found)
        for number, window in enumerate(found):
            start, end = (item.nbytes * place // len(found) for place in (number, number + 1))
            yield window, end - start


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
    if model.main_input_name != "input_ids":
        raise UsageError(
            f"{folder}: a {model.config.model_type} takes {model.main_input_name}, but calibration data are text, or "
            "audio for Whisper",
            "leave --calibrate out: the weights then decide what is kept",
        )
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    if not tokenizer.is_fast:
        raise PessaError(
            f"{folder}: its tokenizer is a slow (pure Python) one, which cannot cut a text into windows",
            "add the tokenizer.json of the original model",
        )
    return tokenizer


def inputs_of(
    model: Any, encoder: Any, item: DataItem, transcribed: Callable[[int], bool] = lambda _number: True
) -> Iterator[Inputs]:
    """Encode an item as inputs of batch size 1, cut into windows of at most the model's input length.

    encoder: from `encoder_for`. transcribed: whether the decoder of an encoder-decoder model gets a text with the
    window of this number: the transcript of each window of speech, or what the model itself makes of a window where
    the data give no transcript. False gives the start token alone, for when no decoder block is calibrated. Raises
    UsageError when the item does not fit the model.
    """
    if item.audio is not None:
        yield from _speech(model, encoder, item, transcribed)
        return
    cut = encoder(item.text, truncation=True, max_length=text_positions(model), return_overflowing_tokens=True)
    for number, ids in enumerate(cut["input_ids"]):
        window = torch.tensor([ids], device=device_of(model))
        given = {"input_ids": window, "attention_mask": torch.ones_like(window)}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = _written(model, given) if transcribed(number) else _start(model)
        yield given


def text_positions(model: Any) -> int:
    """The number of tokens that a text model can read at once, at most TEXT_TOKENS.

    Models after RoBERTa number their positions from the one after that of padding, so that not all are for tokens.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or TEXT_TOKENS
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limit = module.num_embeddings - module.padding_idx - 1
    return min(TEXT_TOKENS, limit)


def _start(model: Any) -> Tensor:
    """The token that the decoder of a model starts with, (1, 1); its encoder does not depend on it."""
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    known = (getattr(model.config, name, None) for name in names)
    return torch.full((1, 1), next((token for token in known if token is not None), 0), device=device_of(model))


def _written(model: Any, given: Inputs) -> Tensor:
    """What an encoder-decoder model for text writes for an input, under greedy decoding, (1, tokens).

    Raises UsageError for a model without a language model head, which writes nothing, and PessaError for one that does
    not say which token it starts with.
    """
    if not model.can_generate():
        raise UsageError(
            f"{type(model).__name__} writes no text, so there is nothing for its decoder to read",
            "calibrate its encoder: --sites encoder.self",
        )
    if all(getattr(model.generation_config, name, None) is None for name in ("decoder_start_token_id", "bos_token_id")):
        raise PessaError(
            f"{model.name_or_path}: config.json has no decoder_start_token_id, so its decoder cannot begin to write",
            "add it to config.json, or calibrate the encoder: --sites encoder.self",
        )
    most = given["input_ids"].shape[1] - 1  # about as long as what it reads, and never more than its positions
    written: Tensor = model.generate(**given, do_sample=False, num_beams=1, max_new_tokens=max(1, most))
    return written[:, :-1] if written.shape[1] > 1 else written  # the last token is never an input


def _speech(model: Any, processor: Any, item: DataItem, transcribed: Callable[[int], bool]) -> Iterator[Inputs]:
    samples, window = item.samples, processor.feature_extractor.n_samples
    language = _language(model, item)
    for number, start in enumerate(range(0, len(samples), window)):
        part = samples[start : start + window]
        features = processor(part, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"].to(
            device_of(model)
        )
        ids = _start(model)
        if transcribed(number):
            if language is None and _languages(model):
                detected = int(model.detect_language(input_features=features)[0])
                language = next(name for name, number in _languages(model).items() if number == detected)
            if item.text is not None and len(samples) <= window:
                text = processor.tokenizer(item.text, add_special_tokens=False, return_tensors="pt").input_ids
            else:
                asked = {} if language is None else {"language": language.strip("<|>"), "task": TASK}
                ids = model.generate(input_features=features, do_sample=False, num_beams=1, **asked)
                text = ids[:, (ids < model.config.eos_token_id)[0]]  # numbers above are those of special tokens
            prompt = torch.tensor([_prompt(model, processor, language)])
            ids = torch.cat([prompt, text.cpu()], 1).to(features.device)
        yield {"input_features": features, "decoder_input_ids": ids[:, : model.config.max_target_positions]}


def _languages(model: Any) -> dict[str, int]:
    """The token ids of the languages of a multilingual Whisper, by tokens such as "<|en|>"; empty if English only."""
    return getattr(model.generation_config, "lang_to_id", None) or {}


def _language(model: Any, item: DataItem) -> str | None:
    """The token of the language that the data give for a clip. Raises UsageError when the model does not know it."""
    known = _languages(model) or {"<|en|>": 0}
    token = None if item.language is None else f"<|{item.language.lower()}|>"
    if token is not None and token not in known:
        raise UsageError(
            f"{item.audio}: the language of this clip is {item.language!r}, which this model does not know",
            'give its code, such as "en", or leave it out'
            if _languages(model)
            else "this model is English only; leave the language out, or use a multilingual model",
        )
    return token if _languages(model) else None


def _prompt(model: Any, processor: Any, language: str | None) -> list[int]:
    """The tokens before a transcript without timestamps, as Whisper was trained (arXiv:2212.04356, figure 1).

    language: its token; None for a model that is English only, which is given neither language nor task.
    """
    start = int(model.config.decoder_start_token_id)
    (plain,) = processor.tokenizer.convert_tokens_to_ids(["<|notimestamps|>"])
    if language is None:
        return [start, plain]
    return [start, _languages(model)[language], model.generation_config.task_to_id[TASK], plain]


def device_of(model: Any) -> torch.device:
    """The device for inputs. A model whose weights are offloaded to disk reports meta, but computes on the CPU."""
    device: torch.device = model.device
    return torch.device("cpu") if device.type == "meta" else device


def on_device(inputs: Sequence[Inputs], device: str | torch.device) -> list[Inputs]:
    """Copies of the inputs on a device. Copies are no inference tensors, so autograd can use them."""

    def moved(value: Any) -> Any:
        # Outputs of an encoder are given to a decoder as a tuple of tensors.
        return tuple(map(moved, value)) if isinstance(value, tuple) else value.clone().to(device)

    return [{name: moved(value) for name, value in given.items()} for given in inputs]
