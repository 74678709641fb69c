"""The mapping from a Hugging Face Whisper checkpoint to openai-whisper: its dims and tensor names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.alignment import alignment_heads, usual_heads
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import read_json
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened
from pessa_cli.sources.openai import tensor_names
from pessa_cli.surgery.model import Model

# The key of a Hugging Face config for each of openai-whisper's dims.
CONFIG_KEYS = {
    "n_mels": "num_mel_bins",
    "n_audio_ctx": "max_source_positions",
    "n_audio_state": "d_model",
    "n_audio_head": "encoder_attention_heads",
    "n_audio_layer": "encoder_layers",
    "n_vocab": "vocab_size",
    "n_text_ctx": "max_target_positions",
    "n_text_state": "d_model",
    "n_text_head": "decoder_attention_heads",
    "n_text_layer": "decoder_layers",
}
FIXED = {"activation_function": "gelu", "scale_embedding": False}  # fixed in openai-whisper's code
# openai-whisper chooses the tokenizer by the number of tokens; with another number it would decode wrong words.
VOCABULARIES = (51864, 51865, 51866)
EMBEDDING, PROJECTION = "decoder.embed_tokens.weight", "proj_out.weight"
FEW = "give a checkpoint with the architecture and vocabulary of OpenAI's Whisper, or load this one with transformers"


@dataclass(frozen=True)
class OpenAIForm:
    """A Whisper checkpoint with openai-whisper's dims and tensor names.

    `names` maps each tensor name of openai-whisper to the name in the file. `alignment_heads` are the (layer, head)
    indices of the cross-attention heads that follow time; empty if the generation config lists none.
    """

    model: Model
    dims: dict[str, int]
    names: dict[str, str]
    alignment_heads: list[tuple[int, int]]

    def tensor(self, ours: str) -> torch.Tensor:
        """Read a tensor outside attention, by its name in the file. Raises PessaError if it holds NaN."""
        reader = self.model.reader
        info = reader.header[ours]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        return torch.frombuffer(bytearray().join(reader.checked_chunks(ours)), dtype=dtype).reshape(info.shape)

    @cached_property
    def attention(self) -> frozenset[str]:
        """The names of all attention tensors in the file."""
        return frozenset(name for site in self.model.attention for name in site.tensors)


def openai_form(model: Model) -> OpenAIForm:
    """Return the checkpoint's dims and tensor names in openai-whisper.

    Raises PessaError if openai-whisper cannot run the model: it has another architecture, activation or vocabulary, its
    output projection is not tied to the embedding, or tensors are missing, unexpected or of another shape.
    """
    config, header, folder = model.reader.config, model.reader.header, model.reader.folder
    if config.get("model_type") != "whisper":
        raise PessaError(
            f"{folder} has model_type {shortened(config.get('model_type'))}, not 'whisper'", "give a Whisper model"
        )
    dims: dict[str, Any] = {theirs: config.get(ours) for theirs, ours in CONFIG_KEYS.items()}
    wrong = [f"{CONFIG_KEYS[name]}: {shortened(value)}" for name, value in dims.items() if type(value) is not int]
    wrong += [f"{key}: {shortened(config.get(key))}" for key, value in FIXED.items() if config.get(key, value) != value]
    if dims["n_vocab"] not in VOCABULARIES:
        wrong.append(f"vocab_size: {shortened(dims['n_vocab'])}, supported: {', '.join(map(str, VOCABULARIES))}")
    if not wrong and max(dims["n_audio_layer"], dims["n_text_layer"]) > len(header):
        # Checked before lists of that length are created.
        wrong.append(
            f"encoder_layers: {shortened(dims['n_audio_layer'])}, decoder_layers: {shortened(dims['n_text_layer'])}, "
            f"but the file has only {len(header)} tensors"
        )
    if wrong:
        raise PessaError(
            f"{folder / 'config.json'} does not describe a model that openai-whisper runs\n{listed(wrong)}", FEW
        )
    # A base model that was saved alone has no prefix.
    prefix = "model." if any(name.startswith("model.") for name in header) else ""
    plan = {theirs: (prefix + ours.removeprefix("model."), shape) for theirs, ours, shape in tensor_names(dims)}
    _check_tensors(model, dict(plan.values()), prefix + EMBEDDING)
    return OpenAIForm(model, dims, {theirs: ours for theirs, (ours, _) in plan.items()}, _alignment_heads(folder, dims))


def _check_tensors(model: Model, plan: dict[str, tuple[int, ...]], embedding: str) -> None:
    """Check the tensors of the file, in their dense shapes, against the plan.

    Raises PessaError if a planned tensor is missing or has another shape, or if there is another tensor, except for a
    copy of the embedding as output projection.
    """
    reader = model.reader
    shapes = {name: info.shape for name, info in reader.header.items() if name != PROJECTION}
    for site in model.sites:
        shapes |= site.in_full().tensors
    problems = [f"{name}: not part of OpenAI's Whisper" for name in shapes if name not in plan]
    for name, shape in plan.items():
        if name not in shapes:
            problems.append(f"{name}: missing")
        elif shapes[name] != shape:
            problems.append(f"{name}: shape {shapes[name]}, expected {shape}")
    if not problems and PROJECTION in reader.header and not torch.equal(reader.get(PROJECTION), reader.get(embedding)):
        problems.append(f"{PROJECTION}: differs from the embedding, to which OpenAI's Whisper ties it")
    if problems:
        raise PessaError(f"{reader.folder} is not a model that openai-whisper runs\n{listed(sorted(problems))}", FEW)


def _alignment_heads(folder: Path, dims: dict[str, int]) -> list[tuple[int, int]]:
    """Return the alignment heads in generation_config.json; empty if there are none. Raises PessaError if malformed."""
    path = folder / "generation_config.json"
    pairs = (read_json(path) if path.is_file() else {}).get("alignment_heads") or []
    layers, heads = dims["n_text_layer"], dims["n_text_head"]
    found = alignment_heads(pairs, layers, heads)
    if found is None:
        raise PessaError(
            f"{path}: alignment_heads is {shortened(pairs)}, not a list of pairs of a layer and a head",
            "download the file again",
        )
    return found


def alignment_mask(form: OpenAIForm) -> torch.Tensor:
    """Return which cross-attention heads follow time, (layers, heads) bool.

    If they are unknown, these are all heads of the last half of the layers, which is openai-whisper's default.
    """
    layers, heads = form.dims["n_text_layer"], form.dims["n_text_head"]
    mask = torch.zeros(layers, heads, dtype=torch.bool)
    for layer, head in form.alignment_heads or usual_heads(layers, heads):
        mask[layer, head] = True
    return mask
