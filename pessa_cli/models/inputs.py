"""Encoding inputs for models: built-in samples, prompts from text files, and audio clips."""

from __future__ import annotations

import inspect
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from pessa_cli.common.errors import UsageError
from pessa_cli.models.audio import SAMPLE_RATE
from pessa_cli.models.classes import WEIGHTS_ALONE

SEED = 0
FRAMES_PER_SECOND = 100  # of log-mel features
FRAMES = 64  # of the random outputs of an encoder
TEXT_TOKENS = 512  # a longer text is truncated
PASSAGE = """The lighthouse at the end of the harbour had been dark for eleven years when the letter arrived. It was
addressed to the keeper, a post that no longer existed, and so the postmistress read it herself. "Please light the
lamp on the ninth of March," it said, "and keep it burning until you see three sails." She counted the days, bought
two litres of oil, and climbed the 143 steps with her daughter, who asked what they would do if nobody came."""
Inputs = dict[str, Any]  # of tensors; the outputs of an encoder may be a tuple of one


def positions_of(given: Inputs) -> int:
    """Return the length of an input: its tokens, or the frames of its audio."""
    return max(value.shape[-1] for value in given.values() if isinstance(value, Tensor))


def random_speech(model: Any, batch: int = 1) -> Inputs:
    """Built-in input for Whisper: random values in the range of log-mel features, one window, and random tokens.

    input_features (batch, mels, frames), decoder_input_ids (batch, tokens); the same for every model of the same shape.
    """
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    length = min(64, config.max_target_positions)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    ids[:, 0] = config.decoder_start_token_id
    return {"input_features": features.clamp(-1, 1.5), "decoder_input_ids": ids}


def built_in_speech() -> NDArray[np.float32]:
    """A few seconds of read speech, (time,), at 16 kHz; speech.md beside the file says where it is from."""
    with wave.open(str(Path(__file__).with_name("speech.wav")), "rb") as file:
        samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.uint8)
    return np.asarray((samples.astype(np.float32) - 128) / 128, dtype=np.float32)


def speech_encoder(model: Any) -> Any:
    """What encodes clips for a Whisper whose folder has no preprocessor: windows of the model's own length."""
    config = model.config
    seconds = max(1, -(-2 * config.max_source_positions // FRAMES_PER_SECOND))
    return transformers.WhisperFeatureExtractor(feature_size=config.num_mel_bins, chunk_length=seconds)


def hears(model: Any) -> bool:
    """Whether a model takes the log-mel features of Whisper; a Whisper decoder alone does not."""
    return bool(model.config.model_type == "whisper" and model.main_input_name == "input_features")


def fitted(model: Any, inputs: Inputs) -> Inputs:
    """Leave out decoder_input_ids for a model that has no decoder, such as an encoder alone."""
    takes = inspect.signature(model.forward).parameters
    return {name: tensor for name, tensor in inputs.items() if name != "decoder_input_ids" or name in takes}


def with_encoder_states(model: Any, width: int, inputs: Inputs) -> Inputs:
    """Add random outputs of an encoder, (batch, frames, width), for a decoder with cross-attention that has none.

    Returns the inputs unchanged for a model that takes no such outputs.
    """
    takes = inspect.signature(model.forward).parameters
    name = next((name for name in ("encoder_hidden_states", "encoder_outputs") if name in takes), None)
    if name is None or model.main_input_name != "input_ids" or "decoder_input_ids" in takes:
        return inputs
    states = torch.randn(len(inputs["input_ids"]), FRAMES, width, generator=torch.Generator().manual_seed(SEED))
    return inputs | {name: states if name == "encoder_hidden_states" else (states,)}


def transcript_inputs(model: Any, features: Tensor, ids: Tensor) -> Inputs:
    """The first window of a clip, with the token ids of a transcript as the decoder's input, cut to its positions."""
    return {
        "input_features": features[..., : 2 * model.config.max_source_positions],
        "decoder_input_ids": ids[:, : model.config.max_target_positions],
    }


def clip_features(processor: Any, samples: NDArray[np.float32]) -> Inputs:
    """Encode a clip for a speech model, with its processor or feature extractor: input_features (1, mels, frames).

    A clip of at most one window is padded to the window. A longer one keeps its length and gets an attention_mask
    (1, frames).
    """
    extractor = getattr(processor, "feature_extractor", processor)
    long = len(samples) > extractor.n_samples
    more = {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    return dict(extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", **more))


def transcribe_greedily(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """Transcribe clips under greedy decoding; returns token ids, (clips, tokens).

    inputs: from `clip_features`. options: passed to generate. Clips longer than one window are decoded with
    timestamps, which tell generate where the next window starts.
    """
    features = inputs["input_features"].to(model.device, model.dtype)
    if features.shape[-1] > 2 * model.config.max_source_positions:
        options |= {"return_timestamps": True, "attention_mask": inputs["attention_mask"].to(model.device)}
    tokens: Tensor = model.generate(input_features=features, do_sample=False, num_beams=1, **options)
    return tokens


def text_prompts(tokenizer: Any | None, model: Any, texts: list[tuple[str, str]]) -> list[tuple[str, Inputs]]:
    """Encode named texts for a text model, each truncated to TEXT_TOKENS; without texts, a built-in one.

    Without a tokenizer the only input is random tokens.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_target_positions", TEXT_TOKENS))
    most = min(TEXT_TOKENS, positions - 2)  # RoBERTa numbers its positions from 2
    if tokenizer is None:
        return [("random tokens", random_tokens(model, 2, min(64, most)))]
    prompts: list[tuple[str, Inputs]] = []
    for name, content in texts or [("built-in text", PASSAGE)]:
        encoded = tokenizer(content, return_tensors="pt", truncation=True, max_length=most)
        prompts.append((name, {key: encoded[key] for key in ("input_ids", "attention_mask")}))
    return prompts


def random_signal(folder: Path, model: Any, batch: int = 1) -> Inputs:
    """Built-in input for a vision or audio model: a random image or 2 seconds of random samples or features.

    Encoder-decoder models also get random tokens. Raises UsageError for a model with another main input.
    """
    generator, config = torch.Generator().manual_seed(SEED), model.config
    size = getattr(config, "image_size", 0)
    shapes = {
        "pixel_values": (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size)),
        "input_values": (2 * SAMPLE_RATE,),
        "input_features": (200, getattr(config, "input_feat_per_channel", 0)),
    }
    shape = shapes.get(model.main_input_name, (0,))
    if 0 in shape:
        raise UsageError(
            f"{folder} takes {model.main_input_name}, for which pessa has no built-in input", WEIGHTS_ALONE
        )
    inputs = {model.main_input_name: torch.randn(batch, *shape, generator=generator)}
    return with_decoder_ids(model, inputs)


def with_decoder_ids(model: Any, inputs: Inputs) -> Inputs:
    """Add decoder_input_ids for an encoder-decoder model: the encoder's token ids, or random tokens without any."""
    if not model.config.is_encoder_decoder:
        return inputs
    ids = inputs.get("input_ids")
    if ids is None:
        ids = random_tokens(model, len(next(iter(inputs.values()))), 32)["input_ids"]
    return inputs | {"decoder_input_ids": ids}


def random_tokens(model: Any, batch: int, length: int) -> Inputs:
    """Built-in input for a text model: random token ids and an attention mask of ones, (batch, length) each."""
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED)
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer.json or a tokenizer_config.json."""
    return (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
