"""Conversion of CTranslate2 Whisper folders, which faster-whisper runs, to Hugging Face folders.

`model.bin` is a list of named variables. They are located first and then read one at a time, so that the conversion
needs only the memory of the largest tensor. Sizes, vocabulary and languages are read from the files; the name of the
model is not used. Weights of int8 and int16 become float32: each is divided by the scale of its row, or of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.checkpoint.dtypes import ITEM_BYTES, TORCH_DTYPES
from pessa_cli.checkpoint.files import SINGLE_FILE
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened
from pessa_cli.sources.whisper_folder import read_vocabulary, whisper_config, write_side_files

if TYPE_CHECKING:
    import torch


MODEL_FILE = "model.bin"
BINARY_VERSION, SPEC, REVISION = 6, "WhisperSpec", 3
DTYPES = ("F32", "I8", "I16", "I32", "F16", "BF16")  # the index is the format's dtype number
FLOATS, INTEGERS = ("F32", "F16", "BF16"), ("I8", "I16")
MOST_VARIABLES, MOST_NAME = 100_000, 200  # the largest Whisper has 1,300; characters of a name in a message
SCALE = "_scale"  # the end of the name of a quantised weight's scales
# Options with the values that they have in every Whisper; with another value the model is not a Whisper.
SWITCHES = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0, "start_from_zero_embedding": 0}
# Scalars that do not affect the weights: how CTranslate2 computes, and details of ALiBi, which is off.
IGNORED = ("alignment_heads", "alignment_layer", "alibi_use_positive_positions", "scale_alibi", "keep_in_float32")
DAMAGED = "the file is damaged or incomplete: copy or download it again"
CONVERT_AGAIN = (
    "give the model that this one was converted from, or convert that one again: "
    "ct2-transformers-converter --quantization float16 --copy_files tokenizer.json"
)


@dataclass(frozen=True)
class Variable:
    """A variable of model.bin: its dtype and shape, and the offset of its first byte in the file."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True)
class CTranslate2Model:
    """The variables of a model.bin by name; an alias maps to the same variable as the name it stands for."""

    path: Path
    variables: Mapping[str, Variable]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """Return the shape of a variable with `rank` dimensions.

        Raises PessaError if the variable is missing, is empty or has another number of dimensions.
        """
        found = self.variables.get(name)
        if found is None or len(found.info.shape) != rank or 0 in found.info.shape:
            what = f"has no {name}" if found is None else f"holds {name} in shape {found.info.shape}"
            raise PessaError(f"{self.path} {what}, so it is not a Whisper model", CONVERT_AGAIN)
        return found.info.shape

    @cached_property
    def quantised(self) -> bool:
        """Whether there are weights of integers; then all tensors become float32, so that no block has two dtypes."""
        return any(found.info.dtype in INTEGERS and found.info.shape for found in self.variables.values())

    def dtype_of(self, name: str) -> str:
        """Return the dtype that a variable has after the conversion."""
        return "F32" if self.quantised else self.variables[name].info.dtype

    def scalar(self, name: str) -> int:
        """Return the first byte of a scalar variable as a signed integer."""
        self.shape(name, 0)
        return int.from_bytes(self.read(name, 0, 1), "little", signed=True)

    def read(self, name: str, part: int, parts: int) -> bytearray:
        """Read the bytes of block `part` of `parts` equal blocks of the variable's rows."""
        variable = self.variables[name]
        size = variable.info.nbytes // parts
        data = bytearray(size)
        with self.path.open("rb") as file:
            file.seek(variable.offset + part * size)
            if file.readinto(data) != size:
                raise PessaError(f"{self.path} became shorter while it was read", "run the command again")
        return data


@dataclass(frozen=True)
class Piece:
    """The location of a Hugging Face tensor in model.bin: block `part` of `parts` equal blocks of a variable's rows."""

    variable: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


def is_ctranslate2(folder: Path) -> bool:
    """Return whether a folder holds a CTranslate2 model of any kind, and no safetensors files."""
    found = (folder / MODEL_FILE).is_file() and any(folder.glob("*vocabulary*.*"))
    return found and not any(folder.glob("*.safetensors"))


def read_model(path: Path) -> CTranslate2Model:
    """Return the variables of a model.bin with their locations, without reading their data.

    Raises PessaError if the file has another version, specification or dtype, or is truncated or damaged. Every length
    in the file is checked against the file's size before that many bytes are read.
    """
    if not path.is_file():
        raise PessaError(f"{path} does not exist", "give the folder of a complete CTranslate2 model")
    size = path.stat().st_size
    variables: dict[str, Variable] = {}
    with path.open("rb") as file:

        def take(count: int) -> bytes:
            data = file.read(count)
            if len(data) != count:
                raise PessaError(f"{path} ends early, at byte {size:,}", DAMAGED)
            return data

        def number(width: int) -> int:
            return int.from_bytes(take(width), "little")

        def string() -> str:
            text = take(number(2))
            try:
                if text.endswith(b"\0"):
                    return text[:-1].decode()
            except UnicodeDecodeError:
                pass
            raise PessaError(f"{path}: expected a name at byte {file.tell() - len(text):,}", DAMAGED)

        if (version := number(4)) != BINARY_VERSION:
            raise PessaError(f"{path} has binary version {version}, but pessa reads {BINARY_VERSION}", CONVERT_AGAIN)
        if (spec := (string(), number(4))) != (SPEC, REVISION):
            raise PessaError(
                f"{path} holds a {spec[0][:MOST_NAME]}, revision {spec[1]}; pessa reads {SPEC}, revision {REVISION}",
                CONVERT_AGAIN,
            )
        count = number(4)
        if count > MOST_VARIABLES:
            raise PessaError(f"{path} claims to hold {count:,} variables, more than {MOST_VARIABLES:,}", DAMAGED)
        for _ in range(count):
            name = string()
            shape = tuple(number(4) for _ in range(number(1)))  # at most 255 dimensions
            dtype, nbytes, offset = number(1), number(4), file.tell()
            if dtype >= len(DTYPES) or math.prod(shape) * ITEM_BYTES[DTYPES[dtype]] != nbytes or name in variables:
                raise PessaError(
                    f"{path} has an invalid entry for {name[:MOST_NAME]}: dtype {dtype}, shape {shortened(shape)}, "
                    f"{nbytes:,} bytes" + (", and the name occurs twice" if name in variables else ""),
                    DAMAGED,
                )
            if offset + nbytes > size:
                raise PessaError(f"{path} ends early, in {name[:MOST_NAME]}: it has {size:,} bytes", DAMAGED)
            variables[name] = Variable(TensorInfo(DTYPES[dtype], shape), offset)
            file.seek(nbytes, 1)
        for _ in range(min(number(4), MOST_VARIABLES)):
            alias, name = string(), string()
            if name not in variables or alias in variables:
                raise PessaError(f"{path} has an invalid alias: {alias[:MOST_NAME]} for {name[:MOST_NAME]}", DAMAGED)
            variables[alias] = variables[name]
        if file.tell() != size:
            raise PessaError(f"{path} has {size - file.tell():,} bytes after its last entry", DAMAGED)
    return CTranslate2Model(path, variables)


def _linear(theirs: str, ours: list[str], rows: int, columns: int) -> Iterator[tuple[str, Piece]]:
    """Yield the tensors of the linear layers `ours`, each (rows, columns), which `theirs` stacks into one layer."""
    for part, name in enumerate(ours):
        yield f"{name}.weight", Piece(f"{theirs}/weight", (rows, columns), part, len(ours))
        yield f"{name}.bias", Piece(f"{theirs}/bias", (rows,), part, len(ours))


def _norm(theirs: str, ours: str, width: int) -> Iterator[tuple[str, Piece]]:
    yield f"{ours}.weight", Piece(f"{theirs}/gamma", (width,))
    yield f"{ours}.bias", Piece(f"{theirs}/beta", (width,))


def _plan(config: Mapping[str, Any]) -> Iterator[tuple[str, Piece]]:
    """Yield the location of every tensor of the Hugging Face model, and of the key biases that only CTranslate2 has."""
    width: int = config["d_model"]
    for name, before in (("conv1", config["num_mel_bins"]), ("conv2", width)):
        yield f"model.encoder.{name}.weight", Piece(f"encoder/{name}/weight", (width, before, 3))
        yield f"model.encoder.{name}.bias", Piece(f"encoder/{name}/bias", (width,))
    embedding = (config["vocab_size"], width)
    yield "model.decoder.embed_tokens.weight", Piece("decoder/embeddings/weight", embedding)
    if not config["tie_word_embeddings"]:
        yield "proj_out.weight", Piece("decoder/projection/weight", embedding)
    for side, positions in (("encoder", "max_source_positions"), ("decoder", "max_target_positions")):
        yield (
            f"model.{side}.embed_positions.weight",
            Piece(f"{side}/position_encodings/encodings", (config[positions], width)),
        )
        yield from _norm(f"{side}/layer_norm", f"model.{side}.layer_norm", width)
        for layer in range(config[f"{side}_layers"]):
            theirs, ours, inner = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}", config[f"{side}_ffn_dim"]
            blocks = [("self_attention", "self_attn", ["qkv", "o"])]
            blocks += [("attention", "encoder_attn", ["q", "kv", "o"])] if side == "decoder" else []
            for block, attention, stacks in blocks:
                yield from _norm(f"{theirs}/{block}/layer_norm", f"{ours}.{attention}_layer_norm", width)
                for i, stack in enumerate(stacks):
                    names = [f"{ours}.{attention}.{'out' if kind == 'o' else kind}_proj" for kind in stack]
                    yield from _linear(f"{theirs}/{block}/linear_{i}", names, width, width)
            yield from _norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm", width)
            yield from _linear(f"{theirs}/ffn/linear_0", [f"{ours}.fc1"], inner, width)
            yield from _linear(f"{theirs}/ffn/linear_1", [f"{ours}.fc2"], width, inner)


def _sizes(model: CTranslate2Model) -> dict[str, Any]:
    """Return the model's sizes under the keys of a Hugging Face config. Raises PessaError if they contradict."""
    width, mels, _ = model.shape("encoder/conv1/weight", 3)
    sizes: dict[str, Any] = {
        "d_model": width,
        "num_mel_bins": mels,
        "vocab_size": model.shape("decoder/embeddings/weight", 2)[0],
        "max_source_positions": model.shape("encoder/position_encodings/encodings", 2)[0],
        "max_target_positions": model.shape("decoder/position_encodings/encodings", 2)[0],
        "tie_word_embeddings": model.variables["decoder/embeddings/weight"]
        is model.variables.get("decoder/projection/weight"),
        "dtype": TORCH_DTYPES[model.dtype_of("decoder/embeddings/weight")],
    }
    for side in ("encoder", "decoder"):
        layers, heads = 0, model.scalar(f"{side}/num_heads")
        there = {"/".join(name.split("/", 2)[:2]) for name in model.variables}
        while f"{side}/layer_{layers}" in there:
            layers += 1
        if heads < 1 or width % heads:
            raise PessaError(
                f"{model.path} has {heads} heads, which do not divide its width of {width} evenly", CONVERT_AGAIN
            )
        sizes[f"{side}_layers"] = layers
        sizes[f"{side}_attention_heads"] = heads
        sizes[f"{side}_ffn_dim"] = model.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
    return sizes


def _check(model: CTranslate2Model, plan: Mapping[str, Piece]) -> None:
    """Check the variables against the plan.

    Raises PessaError if a planned variable is missing or has another shape, or if there is a variable that is neither
    planned nor a known scalar.
    """
    problems: dict[str, None] = {}  # an ordered set, because stacked tensors share a variable
    for piece in plan.values():
        found, wanted = model.variables.get(piece.variable), (piece.parts * piece.shape[0], *piece.shape[1:])
        if found is None:
            problems[f"{piece.variable}: missing"] = None
        elif found.info.shape != wanted:
            problems[f"{piece.variable}: shape {found.info.shape}, expected {wanted}"] = None
        elif found.info.dtype not in (*FLOATS, *INTEGERS):
            problems[f"{piece.variable}: {found.info.dtype}, expected floats, int8 or int16"] = None
        elif found.info.dtype in INTEGERS:
            scale = model.variables.get(f"{piece.variable}{SCALE}")
            if scale is None or scale.info.dtype not in FLOATS or scale.info.shape not in ((), wanted[:1]):
                problems[f"{piece.variable}{SCALE}: missing, or not one number for each of {wanted[0]} rows"] = None
    owned = {piece.variable for piece in plan.values()} | {"decoder/projection/weight"}
    owned |= {f"{name}{SCALE}" for name in owned}
    for name in model.variables.keys() - owned:
        leaf = name.rpartition("/")[2]
        if leaf in SWITCHES and model.scalar(name) != SWITCHES[leaf]:
            problems[f"{name}: {model.scalar(name)}, expected {SWITCHES[leaf]}"] = None
        elif leaf not in (*SWITCHES, *IGNORED, "num_heads"):
            problems[f"{name[:MOST_NAME]}: not part of a Whisper model"] = None
    if problems:
        raise PessaError(f"{model.path} is not a plain Whisper model\n{listed(sorted(problems))}", CONVERT_AGAIN)


def _tensor(model: CTranslate2Model, piece: Piece) -> torch.Tensor:
    """Return a tensor of the plan; integers are divided by their scales. Raises PessaError if a scale is no number."""
    values = _read(model, piece.variable, piece.part, piece.parts).reshape(piece.shape)
    info = model.variables[piece.variable].info
    if info.dtype in INTEGERS:
        name = f"{piece.variable}{SCALE}"
        single = not model.variables[name].info.shape
        scale = _read(model, name, *((0, 1) if single else (piece.part, piece.parts))).float()
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise PessaError(f"{model.path}: {name} holds something other than positive numbers", DAMAGED)
        values = values.float() / scale.reshape(-1, *(1 for _ in piece.shape[1:]))
    return values.float() if model.quantised else values


def _read(model: CTranslate2Model, name: str, part: int, parts: int) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[model.variables[name].info.dtype])
    return torch.frombuffer(model.read(name, part, parts), dtype=dtype)


def convert(folder: Path, into: Path) -> None:
    """Write the CTranslate2 Whisper model in `folder` as a complete Hugging Face folder.

    It has the same dtype, or float32 if the model is quantised. `into` is created if it does not exist; after an error
    its content is incomplete. Raises PessaError if the folder does not hold a Whisper model of binary version 6, for
    example if it has another specification, is damaged, has a key bias (Whisper has none), or has the vocabulary or
    tokenizer of another model.
    """
    model = read_model(folder / MODEL_FILE)
    sizes = _sizes(model)
    vocabulary = read_vocabulary(folder, sizes["vocab_size"])
    config = whisper_config(sizes, vocabulary)
    plan = dict(_plan(config))
    _check(model, plan)
    key_biases = [name for name in plan if name.endswith("k_proj.bias")]
    wrong = [name for name in key_biases if _tensor(model, plan[name]).count_nonzero()]
    if wrong:
        raise PessaError(
            f"{model.path} has key biases, which no Whisper model has\n{listed(wrong)}",
            "check where this model is from",
        )
    into.mkdir(parents=True, exist_ok=True)
    write_side_files(folder, into, config, vocabulary)
    names = sorted(plan.keys() - set(key_biases))
    header = {name: TensorInfo(model.dtype_of(plan[name].variable), plan[name].shape) for name in names}
    with CheckpointWriter(into, {SINGLE_FILE: header}, {"format": "pt"}) as writer:
        for name in names:
            writer.put(name, _tensor(model, plan[name]))
