"""A Hugging Face Whisper checkpoint as openai-whisper sees it: its dims and the names of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pessa_cli.blocks.site import in_full
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import read_json
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened
from pessa_cli.sources.openai import tensor_names
from pessa_cli.surgery.model import Model

# openai-whisper's dims under the names of a Hugging Face config.
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
FIXED = {"activation_function": "gelu", "scale_embedding": False}  # what openai-whisper's code does to every model
# By its number of tokens openai-whisper chooses a tokenizer; with any other number it would read wrong words.
VOCABULARIES = (51864, 51865, 51866)
EMBEDDING, PROJECTION = "decoder.embed_tokens.weight", "proj_out.weight"
FEW = "give a checkpoint of the size of one of OpenAI's, or load it with transformers"


@dataclass(frozen=True)
class OpenAIForm:
    """A Whisper checkpoint as openai-whisper sees it.

    `names` maps each of openai-whisper's tensors to the file's. `alignment_heads` are (layer, head) of the
    cross-attention heads that follow time; empty where the generation config lists none.
    """

    model: Model
    dims: dict[str, int]
    names: dict[str, str]
    alignment_heads: list[tuple[int, int]]

    def tensor(self, ours: str) -> torch.Tensor:
        """A tensor that is not attention, by its name in the file. Raises PessaError when it holds NaN."""
        reader = self.model.reader
        info = reader.header[ours]
        dtype: torch.dtype = getattr(torch, TORCH_DTYPES[info.dtype])
        return torch.frombuffer(bytearray().join(reader.checked_chunks(ours)), dtype=dtype).reshape(info.shape)

    @cached_property
    def attention(self) -> frozenset[str]:
        """The file's names of all attention tensors."""
        return frozenset(name for site in self.model.sites for name in site.tensors)


def openai_form(model: Model) -> OpenAIForm:
    """The checkpoint's dims and names in openai-whisper. Raises PessaError for what openai-whisper would not compute:

    another architecture or activation, an untied output, tensors missing, too many or of an unusual shape.
    """
    config, header, folder = model.reader.config, model.reader.header, model.reader.folder
    if config.get("model_type") != "whisper":
        raise PessaError(f"{folder} is a {shortened(config.get('model_type'))}, no Whisper", "give a Whisper")
    dims: dict[str, Any] = {theirs: config.get(ours) for theirs, ours in CONFIG_KEYS.items()}
    wrong = [f"{CONFIG_KEYS[name]}: {shortened(value)}" for name, value in dims.items() if type(value) is not int]
    wrong += [f"{key}: {shortened(config.get(key))}" for key, value in FIXED.items() if config.get(key, value) != value]
    if dims["n_vocab"] not in VOCABULARIES:
        wrong.append(f"vocab_size: {shortened(dims['n_vocab'])}, known are {', '.join(map(str, VOCABULARIES))}")
    if not wrong and max(dims["n_audio_layer"], dims["n_text_layer"]) > len(header):
        wrong.append("more layers than tensors")  # seen before any list of that length is made
    if wrong:
        raise PessaError(f"{folder / 'config.json'} is of no model that openai-whisper runs\n{listed(wrong)}", FEW)
    # A base model saved alone has no prefix.
    prefix = "model." if any(name.startswith("model.") for name in header) else ""
    plan = {theirs: (prefix + ours.removeprefix("model."), shape) for theirs, ours, shape in tensor_names(dims)}
    _check_tensors(model, dict(plan.values()), prefix + EMBEDDING)
    return OpenAIForm(model, dims, {theirs: ours for theirs, (ours, _) in plan.items()}, _alignment_heads(folder, dims))


def _check_tensors(model: Model, plan: dict[str, tuple[int, ...]], embedding: str) -> None:
    """Every planned tensor is there in its dense shape, and nothing else but a copy of the tied embedding."""
    reader = model.reader
    shapes = {name: info.shape for name, info in reader.header.items() if name != PROJECTION}
    for site in model.sites:
        shapes |= in_full(site).tensors
    problems = [f"{name}: not part of OpenAI's Whisper" for name in shapes if name not in plan]
    for name, shape in plan.items():
        if name not in shapes:
            problems.append(f"{name}: missing")
        elif shapes[name] != shape:
            problems.append(f"{name}: shape {shapes[name]}, expected {shape}")
    if not problems and PROJECTION in reader.header and not torch.equal(reader.get(PROJECTION), reader.get(embedding)):
        problems.append(f"{PROJECTION}: not the embedding, as it always is in OpenAI's Whisper")
    if problems:
        raise PessaError(f"{reader.folder} is no model that openai-whisper runs\n{listed(sorted(problems))}", FEW)


def _alignment_heads(folder: Path, dims: dict[str, int]) -> list[tuple[int, int]]:
    """What generation_config.json says of the heads that follow time."""
    path = folder / "generation_config.json"
    pairs = (read_json(path) if path.is_file() else {}).get("alignment_heads") or []
    layers, heads = range(dims["n_text_layer"]), range(dims["n_text_head"])
    listing = pairs if isinstance(pairs, list) else []
    known = [(layer, head) for layer in layers for head in heads if [layer, head] in listing]
    if len(known) != len(listing) or (pairs and not known):
        raise PessaError(f"{path}: alignment_heads are not pairs of a layer and a head", "download the file again")
    return known


def alignment_mask(form: OpenAIForm) -> torch.Tensor:
    """Which cross-attention heads follow time, (layers, heads); openai-whisper's guess, the last half, if unknown."""
    layers, heads = form.dims["n_text_layer"], form.dims["n_text_head"]
    mask = torch.zeros(layers, heads, dtype=torch.bool)
    for layer, head in form.alignment_heads:
        mask[layer, head] = True
    if not form.alignment_heads:
        mask[layers // 2 :] = True
    return mask
