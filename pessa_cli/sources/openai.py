"""Conversion of openai-whisper checkpoints, such as `tiny.en.pt` and models fine-tuned in that format, to Hugging Face
folders.

Tensors are renamed and copied bit for bit; the tokenizer and its tables come from the installed openai-whisper.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import CONFIG_FILE, SINGLE_FILE, write_json
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened
from pessa_cli.sources.openai_tokenizer import get_encoding, suppressed, tokens_and_tokenizer
from pessa_cli.sources.pickled import header_of, load_pickle
from pessa_cli.sources.whisper_folder import TOKENIZER_FILE, Vocabulary, whisper_config, write_side_files

DIMENSIONS = (
    *("n_mels", "n_vocab"),
    *(f"n_{side}_{what}" for side in ("audio", "text") for what in ("ctx", "state", "head", "layer")),
)
SUFFIXES = (".pt", ".pth")
NOT_WHISPER = "give a file that openai-whisper loads, or a folder of another format"
# openai-whisper's models: (name, vocabulary size) -> (decoder layers, width, encoder layers). large-v1 and large-v2
# differ only in the weights, so they cannot be told apart and their alignment heads are left unknown.
KNOWN = {
    ("tiny", 51865): (4, 384, 4),
    ("tiny.en", 51864): (4, 384, 4),
    ("base", 51865): (6, 512, 6),
    ("base.en", 51864): (6, 512, 6),
    ("small", 51865): (12, 768, 12),
    ("small.en", 51864): (12, 768, 12),
    ("medium", 51865): (24, 1024, 24),
    ("medium.en", 51864): (24, 1024, 24),
    ("large-v3", 51866): (32, 1280, 32),
    ("large-v3-turbo", 51866): (4, 1280, 32),
}
ATTENTION = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "out_proj"}


def is_openai_file(path: Path) -> bool:
    """Return whether a file has a suffix of torch.save; `convert` checks its content."""
    return path.is_file() and path.suffix in SUFFIXES


def tensor_names(dims: Mapping[str, int]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield every tensor of a Whisper model of these dims as (openai-whisper's name, Hugging Face's name, shape)."""

    def with_bias(theirs: str, ours: str, *shape: int) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        yield f"{theirs}.weight", f"{ours}.weight", shape
        if not theirs.endswith(".key"):
            yield f"{theirs}.bias", f"{ours}.bias", shape[:1]

    for side, kind in (("encoder", "audio"), ("decoder", "text")):
        width, context = dims[f"n_{kind}_state"], dims[f"n_{kind}_ctx"]
        ours = f"model.{side}"
        yield f"{side}.positional_embedding", f"{ours}.embed_positions.weight", (context, width)
        if side == "encoder":
            yield from with_bias(f"{side}.conv1", f"{ours}.conv1", width, dims["n_mels"], 3)
            yield from with_bias(f"{side}.conv2", f"{ours}.conv2", width, width, 3)
            yield from with_bias(f"{side}.ln_post", f"{ours}.layer_norm", width)
        else:
            yield f"{side}.token_embedding.weight", f"{ours}.embed_tokens.weight", (dims["n_vocab"], width)
            yield from with_bias(f"{side}.ln", f"{ours}.layer_norm", width)
        for i in range(dims[f"n_{kind}_layer"]):
            block, layer = f"{side}.blocks.{i}", f"{ours}.layers.{i}"
            attentions = [("attn", "self_attn")] + [("cross_attn", "encoder_attn")] * (side == "decoder")
            for short, long in attentions:
                for theirs, projection in ATTENTION.items():
                    yield from with_bias(f"{block}.{short}.{theirs}", f"{layer}.{long}.{projection}", width, width)
                yield from with_bias(f"{block}.{short}_ln", f"{layer}.{long}_layer_norm", width)
            yield from with_bias(f"{block}.mlp.0", f"{layer}.fc1", 4 * width, width)
            yield from with_bias(f"{block}.mlp.2", f"{layer}.fc2", width, 4 * width)
            yield from with_bias(f"{block}.mlp_ln", f"{layer}.final_layer_norm", width)


def _dimensions(path: Path, checkpoint: Mapping[Any, Any]) -> dict[str, int]:
    """Return the checkpoint's dims. Raises PessaError if they are missing, invalid or contradictory."""
    dims, state = checkpoint.get("dims"), checkpoint.get("model_state_dict")
    if not isinstance(dims, dict) or not isinstance(state, dict):
        raise PessaError(
            f"{path} is not an openai-whisper checkpoint: it has no dims and model_state_dict", NOT_WHISPER
        )
    wrong = [
        f"{name}: {shortened(dims.get(name))}"
        for name in DIMENSIONS
        if type(dims.get(name)) is not int or dims[name] < 1
    ]
    if not wrong and dims["n_audio_state"] != dims["n_text_state"]:
        wrong = ["n_audio_state and n_text_state: encoder and decoder differ in width"]
    for kind in () if wrong else ("audio", "text"):
        # Compare the number of layers with the number of tensors before creating lists of that length.
        if dims[f"n_{kind}_layer"] > len(state) or dims[f"n_{kind}_state"] % dims[f"n_{kind}_head"]:
            wrong.append(
                f"{dims[f'n_{kind}_layer']} {kind} layers of {dims[f'n_{kind}_head']} heads: more layers than the "
                f"{len(state)} tensors, or heads that do not divide n_{kind}_state evenly"
            )
    if wrong:
        raise PessaError(f"{path} has invalid dims for a Whisper model\n{listed(wrong)}", NOT_WHISPER)
    return {name: dims[name] for name in DIMENSIONS}


def _alignment_heads(dims: Mapping[str, int]) -> list[list[int]]:
    """Return the alignment heads as [layer, head], from openai-whisper's table; empty for a model of another size.

    Alignment heads are the cross-attention heads whose weights follow time, which give word timestamps.
    """
    import base64
    import gzip

    import numpy as np

    from pessa_cli.compat.for_whisper import alignment_heads

    sizes = dims["n_text_layer"], dims["n_text_state"], dims["n_audio_layer"]
    names = [name for (name, tokens), known in KNOWN.items() if tokens == dims["n_vocab"] and known == sizes]
    shape = dims["n_text_layer"], dims["n_text_head"]
    heads = alignment_heads()
    for dump in [heads[name] for name in names if name in heads]:
        chosen = np.frombuffer(gzip.decompress(base64.b85decode(dump)), dtype=bool)
        if chosen.size == shape[0] * shape[1]:
            return [[int(layer), int(head)] for layer, head in np.argwhere(chosen.reshape(shape))]
    return []


def _write_side_files(path: Path, into: Path, dims: Mapping[str, int], dtype: str) -> None:
    """Write config, generation config, tokenizer and preprocessor with the code for CTranslate2 folders."""
    encoding = get_encoding(path, dims["n_vocab"])
    tokens, tokenizer = tokens_and_tokenizer(encoding)
    vocabulary = Vocabulary(path, tokens, {token: index for index, token in enumerate(tokens)})
    sizes: dict[str, Any] = {
        "d_model": dims["n_text_state"],
        "num_mel_bins": dims["n_mels"],
        "vocab_size": dims["n_vocab"],
        "max_source_positions": dims["n_audio_ctx"],
        "max_target_positions": dims["n_text_ctx"],
        "tie_word_embeddings": True,
        "dtype": dtype,
    }
    for side, kind in (("encoder", "audio"), ("decoder", "text")):
        sizes[f"{side}_layers"] = dims[f"n_{kind}_layer"]
        sizes[f"{side}_attention_heads"] = dims[f"n_{kind}_head"]
        sizes[f"{side}_ffn_dim"] = 4 * dims[f"n_{kind}_state"]
    config = whisper_config(sizes, vocabulary)
    with tempfile.TemporaryDirectory(prefix="pessa-") as source:
        write_json(Path(source) / TOKENIZER_FILE, tokenizer)
        write_json(
            Path(source) / CONFIG_FILE, suppressed(encoding, vocabulary) | {"alignment_heads": _alignment_heads(dims)}
        )
        write_side_files(Path(source), into, config, vocabulary)


def convert(path: Path, into: Path) -> None:
    """Write the openai-whisper checkpoint `path` as a complete Hugging Face folder, with values and dtypes unchanged.

    Raises PessaError if the file would run code or is not such a checkpoint, if tensors are missing, unexpected or of
    another shape than the file's dims require, or if openai-whisper is not installed.
    """
    checkpoint = load_pickle(path)
    dims = _dimensions(path, checkpoint.value)
    state: dict[str, Any] = checkpoint.value["model_state_dict"]
    header = header_of(path, state)
    plan = {theirs: (ours, shape) for theirs, ours, shape in tensor_names(dims)}
    problems = [f"{name}: not part of a Whisper model" for name in header if name not in plan]
    for name, (_, shape) in plan.items():
        if name not in header:
            problems.append(f"{name}: missing")
        elif header[name].shape != shape:
            problems.append(f"{name}: shape {header[name].shape}, expected {shape}")
    if problems:
        raise PessaError(
            f"{path} is not the Whisper model that its dims describe\n{listed(sorted(problems))}", NOT_WHISPER
        )
    into.mkdir(parents=True, exist_ok=True)
    _write_side_files(path, into, dims, TORCH_DTYPES[header["decoder.token_embedding.weight"].dtype])
    ours: dict[str, TensorInfo] = {name: header[theirs] for theirs, (name, _) in plan.items()}
    with CheckpointWriter(into, {SINGLE_FILE: ours}, {"format": "pt"}) as writer:
        for theirs, (name, _) in plan.items():
            writer.put(name, checkpoint.read(state[theirs]))
