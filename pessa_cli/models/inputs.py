"""Inputs for models: built-in samples, prompts from text files, and clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

from pessa_cli.common.errors import UsageError
from pessa_cli.common.text import read_text
from pessa_cli.models.audio import SAMPLE_RATE
from pessa_cli.models.load import WEIGHTS_ALONE, from_folder

SEED = 0
TEXT_TOKENS = 512  # of a text, for its logits
PASSAGE = """The lighthouse at the end of the harbour had been dark for eleven years when the letter arrived. It was
addressed to the keeper, a post that no longer existed, and so the postmistress read it herself. "Please light the
lamp on the ninth of March," it said, "and keep it burning until you see three sails." She counted the days, bought
two litres of oil, and climbed the 143 steps with her daughter, who asked what they would do if nobody came."""
Inputs = dict[str, Tensor]


def noise(model: Any, batch: int = 1) -> Inputs:
    """Built-in input for a speech model: one window of noise in the range of log-mel features, random tokens."""
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    length = min(64, config.max_target_positions)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    ids[:, 0] = config.decoder_start_token_id
    return {"input_features": features.clamp(-1, 1.5), "decoder_input_ids": ids}


def transcript_inputs(model: Any, features: Tensor, ids: Tensor) -> Inputs:
    """The first window of a clip with the reference's own transcript as the decoder's input."""
    return {
        "input_features": features[..., : 2 * model.config.max_source_positions],
        "decoder_input_ids": ids[:, : model.config.max_target_positions],
    }


def listen(processor: Any, samples: NDArray[np.float32]) -> Inputs:
    """A clip as a speech model hears it: input_features (1, mels, frames), one window of them, or the whole clip.

    One that is longer than the window has an attention_mask (1, frames).
    """
    long = len(samples) > processor.feature_extractor.n_samples
    more = {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    return dict(processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", **more))


def write_down(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """The tokens that a speech model writes under greedy decoding, (clips, tokens).

    Options as for generate. Through clips that are longer than its window it finds its way by its timestamps.
    """
    features = inputs["input_features"].to(model.device, model.dtype)
    if features.shape[-1] > 2 * model.config.max_source_positions:
        options |= {"return_timestamps": True, "attention_mask": inputs["attention_mask"].to(model.device)}
    tokens: Tensor = model.generate(input_features=features, do_sample=False, num_beams=1, **options)
    return tokens


def text_prompts(folder: Path, model: Any, paths: list[Path]) -> list[tuple[str, Inputs]]:
    """Token inputs for a text model: the given files', or a built-in passage, or random tokens for no tokenizer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", TEXT_TOKENS)
    most = min(TEXT_TOKENS, positions - 2)  # RoBERTa counts from 2
    if not paths and not has_tokenizer(folder):
        return [("random tokens", random_tokens(model, 2, min(64, most)))]
    contents = [(path.name, read_text(path)) for path in paths] or [("built-in text", PASSAGE)]
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    prompts: list[tuple[str, Inputs]] = []
    for name, content in contents:
        encoded = tokenizer(content, return_tensors="pt", truncation=True, max_length=most)
        prompts.append((name, {key: encoded[key] for key in ("input_ids", "attention_mask")}))
    return prompts


def signal(folder: Path, model: Any, batch: int = 1) -> Inputs:
    """Built-in input for a model that sees or hears: an image or two seconds of noise, and random tokens to answer.

    Raises UsageError for a model that takes something else.
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
        raise UsageError(f"{folder} takes {model.main_input_name}, of which there are no samples", WEIGHTS_ALONE)
    inputs = {model.main_input_name: torch.randn(batch, *shape, generator=generator)}
    return with_answer(model, inputs)


def with_answer(model: Any, inputs: Inputs) -> Inputs:
    """With something for the decoder, where there is an encoder, too: what it reads, or random tokens."""
    if not model.config.is_encoder_decoder:
        return inputs
    answer = inputs.get("input_ids")
    return inputs | {
        "decoder_input_ids": random_tokens(model, len(next(iter(inputs.values()))), 32)["input_ids"]
        if answer is None
        else answer
    }


def random_tokens(model: Any, batch: int, length: int) -> Inputs:
    """Built-in input for a text model without a tokenizer."""
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED)
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()
