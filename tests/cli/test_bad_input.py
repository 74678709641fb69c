"""Damaged, foreign and incomplete models: each command reports one error with a hint, and changes no file.

Every fault is tested with every command that reads a model, and must be found before anything is written.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from harness import (
    INDEX,
    WEIGHTS,
    Pessa,
    Tensors,
    TinyFolder,
    copy_of,
    edit_header,
    edit_json,
    edit_weights,
    is_refusal,
    snapshot,
)
from safetensors.torch import load_file, save_file

Q0 = "model.encoder.layers.0.self_attn.q_proj.weight"
K1 = "model.decoder.layers.1.encoder_attn.k_proj.weight"
O1 = "model.decoder.layers.1.self_attn.out_proj.bias"

COMMANDS = {
    "inspect": "inspect {model}",
    "prune": "prune {model} -o {place}/out",
    "decompose": "decompose {model} -o {place}/out",
    "verify-reference": "verify {model} {good} --level weights",
    "verify-candidate": "verify {good} {model} --level weights",
    "run": "run {place}/recipe.toml {model} -o {place}/out",
}

# Every fault goes through all of them; in `make check` through one that reads and one that writes.
BY_TIER = [name if name in ("inspect", "prune") else pytest.param(name, marks=pytest.mark.slow) for name in COMMANDS]


class Fault(NamedTuple):
    """A damage to a tiny model, the parts that the error must contain, and the model; "*" stands for a sharded one."""

    damage: Callable[[Path], object]
    says: tuple[str, ...]
    model: str = "whisper"


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("not a folder")


def only(**files: str) -> Callable[[Path], None]:
    """Replace all files of the folder by these."""

    def damage(folder: Path) -> None:
        for path in folder.iterdir():
            path.unlink()
        for name, content in files.items():
            (folder / name.replace("__", ".")).write_text(content)

    return damage


def write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def remove(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).unlink()


def weights_a_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def cut(size: Callable[[int], int]) -> Callable[[Path], object]:
    """Truncate the weights to a size that depends on their size in bytes."""

    def damage(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (folder / WEIGHTS).write_bytes(content[: size(len(content))])

    return damage


def start_with(start: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / WEIGHTS).write_bytes(start + (folder / WEIGHTS).read_bytes()[len(start) :])


def config(**values: Any) -> Callable[[Path], object]:
    return edit_json(lambda content: content.update(values))


def entry(name: str, **values: Any) -> Callable[[Path], object]:
    return edit_header(lambda header: header[name].update(values))


def tensor(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return edit_weights(lambda tensors: tensors.update({name: change(tensors[name])}))


def also(name: str, *shape: int) -> Callable[[Path], object]:
    return edit_weights(lambda tensors: tensors.update({name: torch.ones(shape)}))


def not_finite(tensors: Tensors) -> None:
    tensors[Q0][3, 4] = math.nan
    tensors[K1][0, :2] = math.inf
    tensors[O1][1] = -math.inf


def rename(old: str, new: str) -> Callable[[Path], object]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return edit_weights(change)


def twice(tensors: Tensors) -> None:
    tensors.update({f"student.{name}": tensor.clone() for name, tensor in tensors.items()})


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def without_shards(*places: int) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in [shards(folder)[place] for place in places]:
            path.unlink()

    return damage


def in_two_shards(folder: Path) -> None:
    first, second = shards(folder)[:2]
    save_file(load_file(first) | load_file(second), second, {"format": "pt"})


LOST = "model.encoder.layers.1.fc3.weight"


def points_at(file: str) -> Callable[[Path], object]:
    return edit_json(lambda content: content["weight_map"].update({"model.encoder.conv1.weight": file}), INDEX)


def claims(**modules: str) -> Callable[[Path], object]:
    """Write a quantization_config of pessa for projections of the first layer."""
    names = {f"model.encoder.layers.0.self_attn.{side}_proj": text for side, text in modules.items()}
    return config(quantization_config={"quant_method": "pessa", "modules": names})


FAULTS = {
    # Folders and files that are not models.
    "gone": Fault(gone, ("model does not exist",)),
    "a file": Fault(a_file, ("model is a file",)),
    "empty folder": Fault(only(), ("model is not a model", WEIGHTS)),
    "a readme only": Fault(only(README__md="hello"), ("model is not a model", WEIGHTS)),
    "pickle": Fault(only(config__json="{}", pytorch_model__bin="x"), ("pytorch_model.bin", "pickle", "convert")),
    "pickle shards": Fault(only(config__json="{}", a__pt="x", b__pt="y"), ("a.pt", "pickle")),
    # config.json
    "no config": Fault(remove("config.json"), ("config.json does not exist",)),
    "config not JSON": Fault(write("config.json", b"{not json"), ("config.json is not readable JSON",)),
    "config not text": Fault(write("config.json", b"\xff\xfe\x00"), ("config.json is not readable JSON",)),
    "config a list": Fault(write("config.json", b"[1, 2]"), ("config.json holds a list",)),
    "config too deep": Fault(write("config.json", b"[" * 100_000), ("config.json is not readable JSON",)),
    "no model_type": Fault(edit_json(lambda c: c.pop("model_type")), ("names no model_type", "pessa architectures")),
    "model_type null": Fault(config(model_type=None), ("names no model_type",)),
    "model_type a list": Fault(config(model_type=["whisper"]), ("model_type", "['whisper']")),
    "unknown, named as llama": Fault(config(model_type="mystery"), ("'mystery'", "try --as llama"), "llama"),
    "another's model_type": Fault(config(model_type="bert"), ("bert", "--as")),
    "heads as text": Fault(config(encoder_attention_heads="4"), ("encoder_attention_heads is '4'",)),
    "heads missing": Fault(edit_json(lambda c: c.pop("decoder_attention_heads")), ("32 rows, but 6 heads",)),
    "heads zero": Fault(config(encoder_attention_heads=0), ("encoder_attention_heads is 0",)),
    "heads true": Fault(config(encoder_attention_heads=True), ("encoder_attention_heads is True",)),
    "heads that do not divide": Fault(config(encoder_attention_heads=5), (Q0, "5 heads", "32 rows")),
    "groups that do not divide": Fault(config(num_key_value_heads=3), ("4 heads", "3 key/value heads"), "llama"),
    "groups of another size": Fault(config(num_key_value_heads=4), ("k_proj.weight", "(16, 32)"), "llama"),
    # Shards and their index.
    "no second shard": Fault(without_shards(1), ("shards", "model-00002-of-"), "whisper*"),
    "no shards": Fault(without_shards(0, 1), ("shards", "model-00001-of-", "model-00002-of-"), "bert*"),
    "index not JSON": Fault(write(INDEX, b"{"), (INDEX, "not readable JSON"), "whisper*"),
    "index without map": Fault(write(INDEX, b"{}"), (INDEX, "weight_map"), "whisper*"),
    "index of nothing": Fault(write(INDEX, b'{"weight_map": {}}'), (INDEX,), "whisper*"),
    "index of numbers": Fault(write(INDEX, b'{"weight_map": {"a": 1}}'), (INDEX, "weight_map"), "whisper*"),
    "index points up": Fault(points_at("../other.safetensors"), ("outside", "../other.safetensors"), "whisper*"),
    "index points to root": Fault(points_at("/etc/passwd"), ("outside", "/etc/passwd"), "whisper*"),
    "index points at config": Fault(points_at("config.json"), ("config.json", "safetensors"), "whisper*"),
    "index lists a lost weight": Fault(
        edit_json(lambda c: c["weight_map"].update({LOST: next(iter(c["weight_map"].values()))}), INDEX),
        ("index", LOST),
        "whisper*",
    ),
    "tensor in two shards": Fault(in_two_shards, ("two shards", "model-00001-of-", "model-00002-of-"), "whisper*"),
    # The weight file.
    **{
        f"truncated to {what}": Fault(cut(size), (WEIGHTS, "not a complete safetensors file"))
        for what, size in {
            "nothing": lambda _: 0,
            "4 bytes": lambda _: 4,
            "8 bytes": lambda _: 8,
            "part of its header": lambda _: 100,
            "half": lambda n: n // 2,
            "all but a byte": lambda n: n - 1,
        }.items()
    },
    **{
        what: Fault(start_with(start), (WEIGHTS, "not a complete safetensors file"))
        for what, start in {
            "header endless": b"\xff" * 8,
            "header of nothing": bytes(8),
            "header past the end": (10**7).to_bytes(8, "little"),
            "header too short": (50).to_bytes(8, "little"),
            "header not JSON": (4).to_bytes(8, "little") + b"\x00\x01\x02\x03",
            "a page of HTML": b"<!DOCTYPE html><html>Not found</html>",
            "an LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
        }.items()
    },
    "a byte too many": Fault(
        lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes() + b"\0"), (WEIGHTS,)
    ),
    "weights are a folder": Fault(weights_a_folder, (WEIGHTS,)),
    "negative shape": Fault(entry(Q0, shape=[-32, -32]), (WEIGHTS, "not a complete safetensors file")),
    "shape beyond its bytes": Fault(entry(Q0, shape=[64, 32]), (WEIGHTS, "not a complete safetensors file")),
    "offsets beyond the file": Fault(entry(Q0, data_offsets=[0, 10**12]), (WEIGHTS, "not a complete")),
    "unknown dtype": Fault(entry(Q0, dtype="F42"), (WEIGHTS, "F42")),
    "dtype of eight bits": Fault(entry(Q0, dtype="F8_E4M3", shape=[64, 64]), (Q0, "F8_E4M3", "bfloat16")),
    # The tensors.
    "not finite": Fault(
        edit_weights(not_finite),
        ("3 tensors of", f"{Q0}: 1 NaN, 0 infinite", f"{K1}: 0 NaN, 2 infinite", f"{O1}: 0 NaN, 1 infinite"),
    ),
    "wrong shape": Fault(tensor(K1, lambda t: t[:24]), (K1, "(24, 32)", "(32, 32)")),
    "wrong width": Fault(tensor(Q0, lambda t: t[:, :24]), ("model.encoder.layers.0.self_attn", "24")),
    "a vector": Fault(tensor(Q0, lambda t: t[0]), (Q0, "(32,)")),
    "a cube": Fault(tensor(Q0, lambda t: t[None]), (Q0, "(1, 32, 32)")),
    "bias of wrong shape": Fault(tensor(O1, lambda t: t[:5]), (O1, "(5,)")),
    "integer weights": Fault(tensor(Q0, lambda t: t.to(torch.int8)), (Q0, "I8")),
    "integer bias": Fault(tensor(O1, lambda t: t.to(torch.int32)), (O1, "I32")),
    "k_proj missing": Fault(edit_weights(lambda t: t.pop(K1)), (K1,)),
    "o_proj missing": Fault(edit_weights(lambda t: t.pop("model.layers.0.self_attn.o_proj.weight")),
                            ("model.layers.0.self_attn.o_proj",), "llama"),
    "a block missing": Fault(
        edit_weights(lambda t: [t.pop(name) for name in list(t) if "decoder.layers.1.encoder_attn." in name]),
        ("model.decoder.layers.1: this layer has no decoder.cross attention",),
    ),
    "no attention": Fault(
        edit_weights(lambda t: [t.pop(name) for name in list(t) if "attn." in name]), ("no attention block", "whisper")
    ),
    "attention sinks": Fault(also("model.layers.1.self_attn.sinks", 4), ("model.layers.1.self_attn.sinks",), "llama"),
    "an adapter inside": Fault(
        also("bert.encoder.layer.0.attention.output.lora_A.weight", 4, 32), ("attention.output.lora_A",), "bert"
    ),
    "two models in one": Fault(edit_weights(twice), ("twice", "student.model.encoder.layers.0.self_attn")),
    # Quantized and pruned models, and config.json that only claims it.
    "quantised by others": Fault(config(quantization_config={"quant_method": "gptq", "bits": 4}), ("gptq",)),
    "quantised as text": Fault(config(quantization_config="awq"), ("awq",)),
    "pessa without modules": Fault(config(quantization_config={"quant_method": "pessa"}), ("lists no modules",)),
    "pessa with garbage": Fault(claims(q="64 rows"), ("'64 rows'", "layers.0.self_attn.q_proj")),
    "rank beyond head": Fault(claims(q="rows 8: 9 8 8 8"), ("9 of 8", "layers.0.self_attn.q_proj")),
    "ranks of other weights": Fault(claims(q="rows 8: 4 4 4 4", k="rows 8: 4 4 4 4"), (Q0, "(32, 32)", "(16, 32)")),
    "ranks of q alone": Fault(claims(q="rows 8: 4 4 4 4"), ("model.encoder.layers.0.self_attn.q_proj",)),
    "ranks of three heads": Fault(
        claims(q="rows 8: 8 8 8", k="rows 8: 8 8 8"), ("model.encoder.layers.0.self_attn.q_proj",)
    ),
    "head of size zero": Fault(claims(q="rows 0: 0 0 0 0", k="rows 0: 0 0 0 0"), ("layers.0.self_attn",)),
    "spectra not safetensors": Fault(write("spectra.safetensors", b"x"), ("spectra.safetensors",)),
    "spectra of other heads": Fault(
        lambda f: save_file({"encoder.self.0.vo": torch.ones(3, 3)}, f / "spectra.safetensors"),
        ("spectra.safetensors", "encoder.self.0"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("command", BY_TIER)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_model_is_refused(fault: str, command: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    damage, says, name = FAULTS[fault]
    base = name.removesuffix("*")
    good = tiny_folder(base)
    model = copy_of(tiny_folder(base, max_shard_size="50KB") if name != base else good, place / "model")
    damage(model)
    (place / "recipe.toml").write_text("")
    before = snapshot(place), snapshot(good)
    arguments = COMMANDS[command].format(model=model, good=good, place=place).split()
    is_refusal(pessa(*arguments), *says, str(model))
    assert (snapshot(place), snapshot(good)) == before


@pytest.mark.parametrize("command", COMMANDS)
def test_the_same_models_undamaged_pass(command: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    """The control: the models in the test above are refused only because of their damage."""
    for name in ("whisper", "whisper*", "bert*", "bert", "llama"):
        base = name.removesuffix("*")
        model = tiny_folder(base, max_shard_size="50KB") if name != base else tiny_folder(base)
        (place / "recipe.toml").write_text("")
        arguments = COMMANDS[command].format(model=model, good=tiny_folder(base), place=place).split()
        assert pessa(*arguments).code == 0
        shutil.rmtree(place / "out", ignore_errors=True)


@pytest.mark.parametrize("command", ["prune", "decompose"])
def test_values_that_overflow_their_dtype_are_not_written(
    command: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path
) -> None:
    """The value bias times W_O is added to the output bias, which then overflows in 16 bits."""
    model = copy_of(tiny_folder("whisper", dtype=torch.float16), place / "model")
    name = "model.decoder.layers.1.self_attn.{}_proj.bias"
    edit_weights(lambda tensors: tensors[name.format("v")].fill_(60000))(model)
    before = snapshot(place)
    is_refusal(pessa(command, model, "-o", place / "out"), name.format("out"), "F16")
    assert snapshot(place) == before
