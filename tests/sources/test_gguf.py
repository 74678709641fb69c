"""GGUF files: every supported architecture equals the original, all else is refused by name, lies at once."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
from gguf import GGUFWriter
from harness import Pessa, is_refusal
from hostile import bounded
from tiny_gguf import Type
from transformers import AutoModelForCausalLM, PreTrainedModel

from pessa_cli.common.errors import PessaError
from pessa_cli.sources import gguf
from pessa_cli.sources.open import open_source

CASES = [(case, Type.F32) for case in tiny_gguf.MODELS]
CASES += [("llama", kind) for kind in (Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q5_1)]
CASES += [("qwen3", Type.Q8_0), ("gemma3", Type.Q8_0), ("llama wide", Type.Q4_K), ("llama wide", Type.Q6_K)]
RULE = ("--ratio", "0.3")


def logits(model: PreTrainedModel) -> torch.Tensor:
    ids = torch.randint(3, 100, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(ids).logits
    return found


@pytest.mark.parametrize(("case", "kind"), CASES, ids=lambda value: value if isinstance(value, str) else value.name)
def test_the_converted_model_equals_the_original(case: str, kind: Any, place: Path) -> None:
    reference = tiny_gguf.write(place / "m.gguf", case, kind)
    with open_source(str(place / "m.gguf")) as folder:
        found = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.allclose(logits(found), logits(reference), rtol=1e-5, atol=1e-5)
    # The control: a rotation that is not the file's, and weights that were not dequantised rightly, are noticed.
    base = found.config.rope_parameters
    for part in base.values() if "full_attention" in base else [base]:
        part["rope_theta"] *= 1.5
    other = type(found)(found.config).eval()
    other.load_state_dict(found.state_dict())
    assert (logits(other) - logits(reference)).abs().max() > 1e-3


def test_a_quantised_file_is_pruned(pessa: Pessa, place: Path) -> None:
    tiny_gguf.write(place / "m.gguf", "llama", Type.Q8_0)
    assert pessa("prune", place / "m.gguf", *RULE, "-o", place / "out").code == 0
    assert (place / "out" / "tokenizer.json").exists()
    assert list((place / "tmp").iterdir()) == []


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "a mixture of experts": ({"expert_count": 8}, "the key 'expert_count'"),
    "yarn": ({"rope.scaling.type": "yarn"}, "rope.scaling.type 'yarn'"),
    "partial rotation": ({"rope.dimension_count": 8}, "rotates 8 of 16"),
    "an unknown scale": ({"attention.scale": 0.5}, "the key 'attention.scale'"),
    "endless layers": ({"block_count": 10**9}, "block_count is 1000000000"),
    "endless heads": ({"attention.head_count_kv": 10**9}, "attention.head_count_kv is 1000000000"),
    "a wide head": ({"attention.key_length": 10**9}, "attention.key_length is 1000000000"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_what_would_be_converted_wrongly_is_refused(
    case: str, pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers passes over these keys, so that the model would be another."""
    more, says = UNSUPPORTED[case]
    for key, method in (("block_count", "add_block_count"), ("attention.head_count_kv", "add_head_count_kv")):
        if key in more:
            monkeypatch.setattr(GGUFWriter, method, lambda *_: None)
    tiny_gguf.write(place / "m.gguf", "llama", more=more)
    is_refusal(pessa("inspect", place / "m.gguf"), str(place / "m.gguf"), says)


@pytest.mark.parametrize("architecture", ["mamba", "bert", "phi2", "mllama"])
def test_an_architecture_that_is_not_converted_is_named(architecture: str, pessa: Pessa, place: Path) -> None:
    tiny_gguf.write(place / "m.gguf")
    content = (place / "m.gguf").read_bytes()
    name = struct.pack("<Q", 5) + b"llama"
    assert content.count(name) == 1
    renamed = content.replace(name, struct.pack("<Q", len(architecture)) + architecture.encode())
    (place / "m.gguf").write_bytes(renamed + bytes(32))
    is_refusal(pessa("inspect", place / "m.gguf"), f"the GGUF architecture '{architecture}'; supported: llama, qwen2")


def test_divisors_of_another_formula_are_refused(pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tiny_gguf._divisors
    monkeypatch.setattr(tiny_gguf, "_divisors", lambda *arguments: kept(*arguments) * 1.01)
    tiny_gguf.write(place / "m.gguf", "llama 3.1")
    is_refusal(pessa("inspect", place / "m.gguf"), "the divisors in rope_freqs.weight")


def test_every_weight_is_one_of_the_model(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of LLaMA with biases, as InternLM has, would lose them; without a weight the model would be random."""
    tiny_gguf.write(place / "m.gguf")
    content = (place / "m.gguf").read_bytes()
    assert content.count(b"blk.0.attn_q.weight") == 1
    (place / "m.gguf").write_bytes(content.replace(b"blk.0.attn_q.weight", b"blk.0.attn_x.weight"))
    with pytest.raises(PessaError, match=r"not a plain llama model\n.*q_proj.weight: not in the file"):
        gguf.convert(place / "m.gguf", place / "into")
    kept = tiny_gguf._add_tokenizer
    bias = torch.ones(64).numpy()
    monkeypatch.setattr(
        tiny_gguf,
        "_add_tokenizer",
        lambda writer, size: (kept(writer, size), writer.add_tensor("blk.0.attn_q.bias", bias)),
    )
    tiny_gguf.write(place / "m.gguf")
    with pytest.raises(PessaError, match=r"not a plain llama model\n.* weights, and a LlamaForCausalLM"):
        gguf.convert(place / "m.gguf", place / "into")


def test_a_model_that_does_not_fit_into_memory_is_refused_at_once(
    pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_gguf.write(place / "m.gguf")
    monkeypatch.setattr(gguf, "free_memory", lambda: 100_000)
    is_refusal(pessa("inspect", place / "m.gguf"), "needs 0.0 GB of memory", "only 0.0 GB are free")


def test_the_free_memory_is_that_of_this_machine() -> None:
    free = gguf.free_memory()
    assert free is None or 2**20 < free < 2**50


KEY = struct.pack("<Q", 1) + b"a"
HEAD = b"GGUF" + struct.pack("<I", 3)
LIES = {
    "an array of 2^40 items": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 0, 2**40),
    "an array of 2^62 texts": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 8, 2**62),
    "an array of arrays": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 9, 2**20) + bytes(100),
    "an array whose size overflows": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IIQ", 9, 12, 2**64 - 1),
    "2^60 tensors": HEAD + struct.pack("<QQ", 2**60, 0),
    "2^60 keys": HEAD + struct.pack("<QQ", 0, 2**60),
    "a key of 2^63 bytes": HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2**63),
    "a text of 2^40 bytes": HEAD + struct.pack("<QQ", 0, 1) + KEY + struct.pack("<IQ", 8, 2**40),
    "a tensor of 2^120 items": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQQIQ", 2, 2**60, 2**60, 0, 0),
    "a tensor of 2^32 dimensions": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<I", 2**32 - 1),
    "an unknown type": HEAD + struct.pack("<QQ", 1, 0) + KEY + struct.pack("<IQIQ", 1, 1, 999, 0),
    "a key twice": HEAD + struct.pack("<QQ", 0, 2) + (KEY + struct.pack("<IB", 0, 1)) * 2,
    "another byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "only its magic": b"GGUF",
    "a key that is no text": HEAD + struct.pack("<QQ", 0, 1) + struct.pack("<Q", 2) + b"\xff\xfe",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_file_that_lies_is_refused_at_once(lie: str, pessa: Pessa, place: Path) -> None:
    (place / "evil.gguf").write_bytes(LIES[lie])
    with bounded(), pytest.raises(PessaError, match="is not a readable GGUF file") as error:
        gguf.convert(place / "evil.gguf", place / "into")
    assert len(error.value.message) < 500
    assert not (place / "into").exists()
    is_refusal(pessa("inspect", place / "evil.gguf"), str(place / "evil.gguf"))


def test_damaged_files_and_a_missing_package(pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_gguf.write(place / "m.gguf")
    content = (place / "m.gguf").read_bytes()
    for size in (4, 30, 2000, len(content) - 1000):
        (place / "m.gguf").write_bytes(content[:size])
        is_refusal(pessa("inspect", place / "m.gguf"), f"{place / 'm.gguf'} is not a readable GGUF file", "download")
    (place / "m.gguf").write_bytes(content)
    monkeypatch.setitem(sys.modules, "gguf", None)
    is_refusal(pessa("inspect", place / "m.gguf"), "needs gguf, which is not installed", "pip install 'pessa[gguf]'")
    (place / "notes.txt").write_text("hello")
    is_refusal(pessa("inspect", place / "notes.txt"), f"{place / 'notes.txt'} is a file, not a folder")


def test_parts_of_a_model_are_to_be_joined(pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = tiny_gguf._add_tokenizer
    monkeypatch.setattr(
        tiny_gguf, "_add_tokenizer", lambda writer, size: (kept(writer, size), writer.add_uint16("split.count", 3))
    )
    tiny_gguf.write(place / "m.gguf")
    is_refusal(pessa("inspect", place / "m.gguf"), "one of 3 parts", "llama-gguf-split --merge")
