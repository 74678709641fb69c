"""`pessa merge` works layer by layer and writes the same bytes as merging in memory with PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import Pessa, TinyFolder, is_refusal, snapshot
from peft import PeftModel, get_peft_model
from tuned import disturb

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.checkpoint.shards import ShardWriter
from pessa_cli.tuning.registry import build_config

CASES = [
    *((method, "llama", None) for method in ("pessa", "sorsa", "pica", "svft", "lora-xs", "milora", "lora", "dora")),
    ("pissa", "llama-biased", None),
    ("pessa", "whisper", None),
    ("lora", "whisper", ["q_proj", "fc1"]),
    ("pessa", "bert", None),
    ("lora", "bert", ["query", "dense"]),
]


def tuned(folder: Path, out: Path, method: str, targets: list[str] | None, rank: int | None = None) -> Path:
    """An adapter that changes the model, saved as by `pessa tune`."""
    torch.manual_seed(0)
    rank = 4 if rank is None and method != "pessa" else rank
    model = get_peft_model(tiny.load(folder), build_config(method, rank, targets))
    disturb(model)
    model.save_pretrained(out)
    return out


def tensors(folder: Path) -> dict[str, tuple[str, bytes]]:
    reader = CheckpointReader(folder)
    return {name: (info.dtype, b"".join(reader.chunks(name))) for name, info in reader.header.items()}


def in_memory(folder: Path, adapter: Path, out: Path) -> Path:
    """The model with the adapter merged in memory by PEFT."""
    dtype = getattr(torch, tiny.read_config(folder)["dtype"])
    model = PeftModel.from_pretrained(tiny.load(folder, dtype=dtype), str(adapter))
    model.merge_and_unload(safe_merge=True).save_pretrained(out)
    return out


@pytest.mark.slow
@pytest.mark.parametrize(("method", "name", "targets"), CASES, ids=lambda value: str(value))
def test_equals_merging_with_peft(
    method: str, name: str, targets: list[str] | None, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder, out = tiny_folder(name), tmp_path / "merged"
    adapter = tuned(folder, tmp_path / "adapter", method, targets)
    before = snapshot(folder) | snapshot(adapter)
    result = pessa("merge", folder, adapter, "-o", out, "--json")
    assert result.code == 0, result
    expected = in_memory(folder, adapter, tmp_path / "expected")
    assert tensors(out) == tensors(expected)
    assert pessa("verify", expected, out).code == 0
    assert pessa("verify", folder, out, "--level", "weights").code == 1
    assert pessa("verify", out).code == 0
    assert snapshot(folder) | snapshot(adapter) == before
    record = json.loads(result.out)
    changed = [key for key, value in tensors(folder).items() if tensors(out)[key] != value]
    assert 0 < len(changed) <= record["changed"]
    assert not tiny.close(tiny.load(folder), tiny.load(out), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits(dtype: torch.dtype, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("llama", dtype=dtype)
    adapter = tuned(folder, tmp_path / "adapter", "lora", None)
    assert pessa("merge", folder, adapter, "-o", tmp_path / "merged").code == 0
    assert tensors(tmp_path / "merged") == tensors(in_memory(folder, adapter, tmp_path / "expected"))


def test_shards(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded model is written with other shards, and a failed run is resumed."""
    folder = tiny_folder("llama", max_shard_size="20kB")
    adapter = tuned(folder, tmp_path / "adapter", "lora", None)
    assert pessa("merge", folder, adapter, "-o", tmp_path / "whole").code == 0
    line = ("merge", folder, adapter, "-o", tmp_path / "parts", "--max-shard-size", "30kB")
    put, left = ShardWriter.put, [3]

    def fail(self: ShardWriter, name: str, tensor: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device")
        put(self, name, tensor)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "put", fail)
        is_refusal(pessa(*line), "No space left", "--resume")
    assert not (tmp_path / "parts").exists()
    assert pessa(*line, "--resume").code == 0
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert tensors(tmp_path / "parts") == tensors(tmp_path / "whole")
    is_refusal(pessa(*line), "exists", "--force")


def test_a_compact_model_stays_compact(pessa: Pessa, pruned: Callable[..., Path], tmp_path: Path) -> None:
    folder = pruned("llama")
    adapter = tuned(folder, tmp_path / "adapter", "pessa", None)
    result = pessa("merge", folder, adapter, "-o", tmp_path / "merged")
    assert result.code == 0, result
    merged = tiny.load(tmp_path / "merged")
    assert tiny.close(PeftModel.from_pretrained(tiny.load(folder), str(adapter)), merged)
    assert not tiny.close(tiny.load(folder), merged, 1e-4)
    shapes = [
        {name: info.shape for name, info in CheckpointReader(f).header.items()} for f in (folder, tmp_path / "merged")
    ]
    assert shapes[0] == shapes[1]
    assert pessa("export", tmp_path / "merged", "-o", tmp_path / "dense").code == 0
    assert tiny.close(tiny.load(tmp_path / "dense"), merged)


def test_an_adapter_wider_than_a_compact_model(pessa: Pessa, pruned: Callable[..., Path], tmp_path: Path) -> None:
    """LoRA adds to dropped directions, so its adapter merges into the dense layout but not into the compact one."""
    folder = pruned("llama")
    adapter = tuned(folder, tmp_path / "adapter", "lora", None)
    is_refusal(pessa("merge", folder, adapter, "-o", tmp_path / "merged"), "--layout dense")
    assert pessa("export", folder, "-o", tmp_path / "dense").code == 0
    assert pessa("merge", tmp_path / "dense", adapter, "-o", tmp_path / "merged").code == 0
    with_adapter = PeftModel.from_pretrained(tiny.load(folder), str(adapter))
    assert tiny.close(with_adapter, tiny.load(tmp_path / "merged"))


def _rename(adapter: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"peft_type": "MAGIC"}))


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no config": (lambda adapter: (adapter / "adapter_config.json").unlink(), "adapter_config.json"),
    "no weights": (lambda adapter: (adapter / "adapter_model.safetensors").unlink(), "adapter_model.safetensors"),
    "cut off": (lambda adapter: (adapter / "adapter_model.safetensors").write_bytes(b"\1\2\3"), "adapter"),
    "unknown method": (_rename, "MAGIC"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters_are_refused(damage: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    adapter = tuned(tiny_folder("llama"), place / "adapter", "lora", None)
    change, culprit = DAMAGES[damage]
    change(adapter)
    before = snapshot(place)
    is_refusal(pessa("merge", tiny_folder("llama"), adapter, "-o", place / "out"), culprit)
    assert snapshot(place) == before


@pytest.mark.parametrize("other", ["whisper", "llama-biased"])
def test_an_adapter_of_another_model(other: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    adapter = tuned(tiny_folder("llama"), place / "adapter", "lora", None)
    before = snapshot(place)
    is_refusal(pessa("merge", tiny_folder(other), adapter, "-o", place / "out"), "adapter", "tuned on")
    assert snapshot(place) == before
