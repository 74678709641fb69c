"""CTranslate2's Whisper folders (the format faster-whisper runs), turned into Hugging Face folders at the door.

`model.bin` is a list of named variables. They are located first and read one at a time, so that a model of any
size passes in the memory of its largest tensor. Sizes, vocabulary and languages are taken from the files; nothing
is looked up by a model's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.checkpoint.dtypes import ITEM_BYTES, TORCH_DTYPES
from pessa_cli.checkpoint.files import SINGLE_FILE
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.sources.whisper_folder import read_vocabulary, whisper_config, write_side_files

if TYPE_CHECKING:
    import torch


MODEL_FILE = "model.bin"
BINARY_VERSION, SPEC, REVISION = 6, "WhisperSpec", 3
DTYPES = ("F32", "I8", "I16", "I32", "F16", "BF16")  # by the format's dtype number
FLOATS = ("F32", "F16", "BF16")
# Switches that Whisper leaves at these values; any other value is a model that Whisper's layers do not describe.
SWITCHES = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0, "start_from_zero_embedding": 0}
# Scalars that say nothing about the weights: how CTranslate2 computes, and switches of a switch that is off.
IGNORED = ("alignment_heads", "alignment_layer", "alibi_use_positive_positions", "scale_alibi", "keep_in_float32")
DAMAGED = "the file is damaged or incomplete: copy or download it again"
CONVERT_AGAIN = (
    "give the model that this was converted from, or convert that one again: "
    "ct2-transformers-converter --quantization float16 --copy_files tokenizer.json"
)


@dataclass(frozen=True)
class Variable:
    """A variable of model.bin: dtype, shape, and where its bytes start."""

    info: TensorInfo
    offset: int


@dataclass(frozen=True)
class CTranslate2Model:
    """The directory of a model.bin; an alias stands as the variable that it names."""

    path: Path
    variables: Mapping[str, Variable]

    def shape(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of a variable that must be there. Raises PessaError when it is not, or of another rank."""
        found = self.variables.get(name)
        if found is None or len(found.info.shape) != rank or 0 in found.info.shape:
            what = f"has no {name}" if found is None else f"holds {name} in shape {found.info.shape}"
            raise PessaError(f"{self.path} {what}, so it is no Whisper", CONVERT_AGAIN)
        return found.info.shape

    def scalar(self, name: str) -> int:
        self.shape(name, 0)
        return int.from_bytes(self.read(name, 0, 1), "little", signed=True)

    def read(self, name: str, part: int, parts: int) -> bytearray:
        """The bytes of one of `parts` equal blocks of the variable's rows."""
        variable = self.variables[name]
        size = variable.info.nbytes // parts
        data = bytearray(size)
        with self.path.open("rb") as file:
            file.seek(variable.offset + part * size)
            if file.readinto(data) != size:
                raise PessaError(f"{self.path} became shorter while it was read", "run again")
        return data


@dataclass(frozen=True)
class Piece:
    """Where a tensor of the model stands: block `part` of `parts` equal blocks of a variable's rows."""

    variable: str
    shape: tuple[int, ...]
    part: int = 0
    parts: int = 1


def is_ctranslate2(folder: Path) -> bool:
    """Whether a folder holds a CTranslate2 model, of whatever kind, and no safetensors."""
    found = (folder / MODEL_FILE).is_file() and any(folder.glob("*vocabulary*.*"))
    return found and not any(folder.glob("*.safetensors"))


def read_model(path: Path) -> CTranslate2Model:
    """The variables of a model.bin, located but not read.

    Raises PessaError for another version, specification or dtype, and for a file that is truncated or garbage:
    every length is checked against the file's size before anything of that length is read.
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
            raise PessaError(f"{path} holds no name at byte {file.tell() - len(text):,}", DAMAGED)

        if (version := number(4)) != BINARY_VERSION:
            raise PessaError(f"{path} is of binary version {version}, not {BINARY_VERSION}", CONVERT_AGAIN)
        if (spec := (string(), number(4))) != (SPEC, REVISION):
            raise PessaError(f"{path} holds a {spec[0]} {spec[1]}, not a {SPEC} {REVISION}", CONVERT_AGAIN)
        for _ in range(number(4)):
            name = string()
            shape = tuple(number(4) for _ in range(number(1)))
            dtype, nbytes, offset = number(1), number(4), file.tell()
            if dtype >= len(DTYPES) or math.prod(shape) * ITEM_BYTES[DTYPES[dtype]] != nbytes or name in variables:
                raise PessaError(
                    f"{path} describes {name} as dtype {dtype}, shape {shape}, {nbytes:,} bytes"
                    + (", a second time" if name in variables else ""),
                    DAMAGED,
                )
            if offset + nbytes > size:
                raise PessaError(f"{path} ends early, in {name}: it has {size:,} bytes", DAMAGED)
            variables[name] = Variable(TensorInfo(DTYPES[dtype], shape), offset)
            file.seek(nbytes, 1)
        for _ in range(number(4)):
            alias, name = string(), string()
            if name not in variables or alias in variables:
                raise PessaError(f"{path} says that {alias} is {name}, which cannot be", DAMAGED)
            variables[alias] = variables[name]
        if file.tell() != size:
            raise PessaError(f"{path} goes on for {size - file.tell():,} bytes after its end", DAMAGED)
    return CTranslate2Model(path, variables)


def _linear(theirs: str, ours: list[str], rows: int, columns: int) -> Iterator[tuple[str, Piece]]:
    """One or more linears stacked in one, each (rows, columns)."""
    for part, name in enumerate(ours):
        yield f"{name}.weight", Piece(f"{theirs}/weight", (rows, columns), part, len(ours))
        yield f"{name}.bias", Piece(f"{theirs}/bias", (rows,), part, len(ours))


def _norm(theirs: str, ours: str, width: int) -> Iterator[tuple[str, Piece]]:
    yield f"{ours}.weight", Piece(f"{theirs}/gamma", (width,))
    yield f"{ours}.bias", Piece(f"{theirs}/beta", (width,))


def _plan(config: Mapping[str, Any]) -> Iterator[tuple[str, Piece]]:
    """Every tensor of the Hugging Face model, the key biases that it does not have included."""
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
    """The file's sizes under the names of a Hugging Face config."""
    width, mels, _ = model.shape("encoder/conv1/weight", 3)
    sizes: dict[str, Any] = {
        "d_model": width,
        "num_mel_bins": mels,
        "vocab_size": model.shape("decoder/embeddings/weight", 2)[0],
        "max_source_positions": model.shape("encoder/position_encodings/encodings", 2)[0],
        "max_target_positions": model.shape("decoder/position_encodings/encodings", 2)[0],
        "tie_word_embeddings": model.variables["decoder/embeddings/weight"]
        is model.variables.get("decoder/projection/weight"),
        "dtype": TORCH_DTYPES[model.variables["decoder/embeddings/weight"].info.dtype],
    }
    for side in ("encoder", "decoder"):
        layers, heads = 0, model.scalar(f"{side}/num_heads")
        while any(name.startswith(f"{side}/layer_{layers}/") for name in model.variables):
            layers += 1
        if heads < 1 or width % heads:
            raise PessaError(f"{model.path} has {heads} heads for a width of {width}", CONVERT_AGAIN)
        sizes[f"{side}_layers"] = layers
        sizes[f"{side}_attention_heads"] = heads
        sizes[f"{side}_ffn_dim"] = model.shape(f"{side}/layer_0/ffn/linear_0/weight", 2)[0]
    return sizes


def _check(model: CTranslate2Model, plan: Mapping[str, Piece]) -> None:
    """Every planned variable is there in its shape, and every variable there is planned or a known scalar."""
    problems: dict[str, None] = {}  # in order and without repetition: stacked tensors share a variable
    for piece in plan.values():
        found, wanted = model.variables.get(piece.variable), (piece.parts * piece.shape[0], *piece.shape[1:])
        if found is None:
            problems[f"{piece.variable}: missing"] = None
        elif found.info.shape != wanted:
            problems[f"{piece.variable}: shape {found.info.shape}, expected {wanted}"] = None
    owned = {piece.variable for piece in plan.values()} | {"decoder/projection/weight"}
    for name in model.variables.keys() - owned:
        leaf = name.rpartition("/")[2]
        if leaf in SWITCHES and model.scalar(name) != SWITCHES[leaf]:
            problems[f"{name}: {model.scalar(name)}, expected {SWITCHES[leaf]}"] = None
        elif leaf not in (*SWITCHES, *IGNORED, "num_heads"):
            problems[f"{name}: not part of a Whisper"] = None
    if problems:
        raise PessaError(f"{model.path} is not a plain Whisper\n{listed(sorted(problems))}", CONVERT_AGAIN)


def _tensor(model: CTranslate2Model, piece: Piece) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[model.variables[piece.variable].info.dtype])
    return torch.frombuffer(model.read(piece.variable, piece.part, piece.parts), dtype=dtype).reshape(piece.shape)


def convert(folder: Path, into: Path) -> None:
    """Write the CTranslate2 Whisper in `folder` as a complete Hugging Face folder, in the same dtype.

    `into` is made when it does not exist; when this raises, what is in it is no model. Raises PessaError for
    anything but a float Whisper of binary version 6: other specifications, quantised or damaged files, a key bias
    (Whisper has none), a vocabulary or tokenizer of another model.
    """
    model = read_model(folder / MODEL_FILE)
    integers = [name for name, found in model.variables.items() if found.info.shape and found.info.dtype not in FLOATS]
    if integers:
        dtype = model.variables[integers[0]].info.dtype.replace("I", "int")
        raise PessaError(f"{model.path} is quantised: {integers[0]} is {dtype}", CONVERT_AGAIN)
    sizes = _sizes(model)
    vocabulary = read_vocabulary(folder, sizes["vocab_size"])
    config = whisper_config(sizes, vocabulary)
    plan = dict(_plan(config))
    _check(model, plan)
    key_biases = [name for name in plan if name.endswith("k_proj.bias")]
    wrong = [name for name in key_biases if _tensor(model, plan[name]).count_nonzero()]
    if wrong:
        raise PessaError(
            f"{model.path} has key biases, which no Whisper has\n{listed(wrong)}", "check where this model is from"
        )
    into.mkdir(parents=True, exist_ok=True)
    write_side_files(folder, into, config, vocabulary)
    names = sorted(plan.keys() - set(key_biases))
    header = {name: TensorInfo(model.variables[plan[name].variable].info.dtype, plan[name].shape) for name in names}
    with CheckpointWriter(into, {SINGLE_FILE: header}, {"format": "pt"}) as writer:
        for name in names:
            writer.put(name, _tensor(model, plan[name]))
