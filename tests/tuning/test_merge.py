"""`pessa merge` works layer by layer and writes the same bytes as merging in memory with PEFT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import Pessa, TinyFolder, copy_of, edit_json, edit_weights, is_refusal, snapshot
from peft import PeftModel, get_peft_model
from tiny_models import build
from tuned import disturb

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.checkpoint.shards import ShardWriter
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
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


# One projection of each product; the cut directions of the other one are zero.
ONE_SIDED = [
    ("llama", ["q_proj", "v_proj"]),
    ("llama", ["k_proj", "o_proj", "up_proj"]),
    ("llama pairs", ["q_proj", "o_proj"]),
    ("llama pairs", ["k_proj"]),
    ("whisper", ["q_proj", "v_proj", "fc1"]),
    ("whisper", ["k_proj", "out_proj"]),
    ("bert", ["query", "value"]),
    ("gpt2", ["attn.c_proj"]),
]


def compact_gpt2(place: Path) -> Path:
    """A model whose weights are stored transposed, and whose W_Q, W_K and W_V are one tensor."""
    build("gpt2").save_pretrained(place / "gpt2")
    prune_model(open_model(place / "gpt2"), place / "compact", Rule(ratio=0.45))
    return place / "compact"


def without_pairs(folder: Path, out: Path) -> Path:
    """Cut half of the frequency pairs of each head, too."""
    prune_model(open_model(folder), out, Rule(rope_ratio=0.5))
    return out


@pytest.mark.parametrize(("name", "targets"), ONE_SIDED, ids=lambda value: str(value))
def test_lora_on_one_side_of_a_compact_model(
    name: str, targets: list[str], pessa: Pessa, pruned: Callable[..., Path], tmp_path: Path
) -> None:
    """The matrices that LoRA adds are full, but what they add to cut directions has no effect."""
    folder = compact_gpt2(tmp_path) if name == "gpt2" else pruned(name.removesuffix(" pairs"))
    if name.endswith(" pairs"):
        folder = without_pairs(folder, tmp_path / "pairs")
    adapter = tuned(folder, tmp_path / "adapter", "lora", targets)
    result = pessa("merge", folder, adapter, "-o", tmp_path / "merged")
    assert result.code == 0, result
    shapes, found = (
        {key: info.shape for key, info in CheckpointReader(f).header.items()} for f in (folder, tmp_path / "merged")
    )
    assert shapes == found
    merged = tiny.load(tmp_path / "merged")
    assert tiny.close(PeftModel.from_pretrained(tiny.load(folder), str(adapter)), merged)
    # Negative control: the adapter matters, and so does each half of what was merged.
    assert not tiny.close(tiny.load(folder), merged, 1e-4)
    key = next(key for key, value in tensors(folder).items() if tensors(tmp_path / "merged")[key] != value)
    edit_weights(lambda values: values[key].copy_(CheckpointReader(folder).get(key)))(tmp_path / "merged")
    assert not tiny.close(tiny.load(tmp_path / "merged"), merged)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj"], ["v_proj", "o_proj"], ["k_proj", "v_proj", "o_proj"]])
def test_lora_on_both_sides_of_a_compact_model(
    targets: list[str], pessa: Pessa, pruned: Callable[..., Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gives cut directions an effect again: refused at once, with commands that work."""
    folder = pruned("llama") if "v_proj" in targets else without_pairs(pruned("llama"), place / "pairs")
    adapter = tuned(folder, place / "adapter", "lora", targets)
    before = snapshot(place)
    result = pessa("merge", folder, adapter, "-o", place / "merged")
    is_refusal(result, str(adapter), str(folder), "layers.0.self_attn", "--layout dense")
    assert snapshot(place) == before
    monkeypatch.chdir(place)
    for command in result.err.partition("hint: ")[2].strip().split(": pessa ")[1:]:
        words = command.partition(";")[0].split()
        assert pessa(*words).code == 0
    with_adapter = PeftModel.from_pretrained(tiny.load(folder), str(adapter))
    assert tiny.close(with_adapter, tiny.load(place / "merged"))


def test_peft_cannot_merge_into_a_compact_model_in_memory(
    pessa: Pessa, pruned: Callable[..., Path], tmp_path: Path
) -> None:
    """What it would add has the full shape. The error comes before any change, and only where something was cut."""
    folder = pruned("llama")
    adapter = tuned(folder, tmp_path / "adapter", "lora", ["q_proj", "v_proj", "up_proj"])
    model = PeftModel.from_pretrained(tiny.load(folder), str(adapter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(PessaError) as raised:
            merge()
        assert "layers.0.self_attn.v_proj" in raised.value.message
        assert all(name not in raised.value.message for name in ("q_proj", "up_proj"))  # these are complete
        assert f"pessa merge {folder} ADAPTER" in str(raised.value.hint)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    words = str(raised.value.hint).partition(": pessa ")[2].replace("ADAPTER", str(adapter)).split()
    assert pessa(*words[:-1], tmp_path / "merged").code == 0
    assert tiny.close(model, tiny.load(tmp_path / "merged"))
    other = tuned(folder, tmp_path / "other", "lora", ["up_proj"])
    merged = PeftModel.from_pretrained(tiny.load(folder), str(other))
    expected = merged(**tiny.inputs(merged)).logits
    torch.testing.assert_close(merged.merge_and_unload()(**tiny.inputs(merged)).logits, expected, rtol=1e-4, atol=1e-5)


def test_lora_on_fused_projections_of_a_compact_model(pessa: Pessa, place: Path) -> None:
    folder = compact_gpt2(place)
    adapter = tuned(folder, place / "adapter", "lora", ["c_attn"])
    is_refusal(pessa("merge", folder, adapter, "-o", place / "merged"), "h.0.attn.c_attn", "--layout dense")


def test_dora_of_a_compact_model_is_refused_at_once(pessa: Pessa, pruned: Callable[..., Path], place: Path) -> None:
    """What it adds depends on the whole weight."""
    adapter = tuned(pruned("llama", "dense"), place / "adapter", "dora", ["v_proj"])
    before = snapshot(place)
    is_refusal(pessa("merge", pruned("llama"), adapter, "-o", place / "merged"), "v_proj", "--layout dense")
    assert snapshot(place) == before


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


BAD_KEYS: dict[str, dict[str, Any]] = {
    "no target_modules": {"target_modules": None},
    "target_modules, no names": {"target_modules": 3},
    "target_modules, no pattern": {"target_modules": "("},
    "exclude_modules, no pattern": {"exclude_modules": "("},
    "layers_pattern, no pattern": {"layers_to_transform": [0], "layers_pattern": "("},
    "layers_to_transform, no number": {"layers_to_transform": "x"},
    "rank_pattern, no pattern": {"rank_pattern": {"(": 3}},
    "rank_pattern, endless": {"rank_pattern": {"([a-z0-9_.]+)*!?+": 3}},
    "rank_pattern, choices": {"rank_pattern": {"(.|.)" * 40 + "!": 3}},
    "rank_pattern, huge": {"rank_pattern": {"q_proj": 100_000_000}},
    "alpha_pattern, no object": {"alpha_pattern": [3]},
    "r, huge": {"r": 100_000_000},
}


@pytest.mark.parametrize("bad", BAD_KEYS)
def test_unusable_keys_of_a_configuration(bad: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    """PEFT would fail with another error, or take endless time or memory."""
    adapter = tuned(tiny_folder("llama"), place / "adapter", "lora", None)
    edit_json(lambda found: found.update(BAD_KEYS[bad]), "adapter_config.json")(adapter)
    before = snapshot(place)
    key = bad.removeprefix("no ").partition(",")[0]
    result = pessa("merge", tiny_folder("llama"), adapter, "-o", place / "out")
    is_refusal(result, "cannot be read", "adapter_config.json", key)
    assert snapshot(place) == before


@pytest.mark.parametrize(
    "keys",
    [
        {"target_modules": "([a-z0-9_.]+)*!"},  # PEFT would match it for longer than anyone waits
        {"target_modules": r".*\.(q_proj|v_proj)"},
        {"rank_pattern": {r".*layers\.\d+\.self_attn\.q_proj": 4}},
    ],
    ids=["endless", "pattern", "ranks"],
)
def test_the_names_of_tensors_tell_the_adapted_modules(
    keys: dict[str, Any], pessa: Pessa, tiny_folder: TinyFolder, place: Path
) -> None:
    adapter = tuned(tiny_folder("llama"), place / "adapter", "lora", ["q_proj", "v_proj"])
    expected = in_memory(tiny_folder("llama"), adapter, place / "expected")
    edit_json(lambda found: found.update(keys), "adapter_config.json")(adapter)
    assert pessa("merge", tiny_folder("llama"), adapter, "-o", place / "out").code == 0
    assert tensors(place / "out") == tensors(expected)


@pytest.mark.parametrize("other", ["whisper", "llama-biased"])
def test_an_adapter_of_another_model(other: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    adapter = tuned(tiny_folder("llama"), place / "adapter", "lora", None)
    before = snapshot(place)
    is_refusal(pessa("merge", tiny_folder(other), adapter, "-o", place / "out"), "adapter", "tuned on")
    assert snapshot(place) == before


def test_heads_of_a_teacher_are_replaced_with_a_note(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """A distilled Whisper lists alignment heads in layers of its teacher, with which timestamps of words fail."""
    folder = copy_of(tiny_folder("whisper"), tmp_path / "student")
    edit_json(lambda found: found.update(alignment_heads=[[1, 0], [31, 2]]), "generation_config.json")(folder)
    adapter = tuned(folder, tmp_path / "adapter", "lora", ["q_proj"])
    done = pessa("merge", folder, adapter, "-o", tmp_path / "merged")
    assert done.code == 0
    assert "teacher" in done.err
    heads, notes = (
        json.loads((tmp_path / "merged" / name).read_text())[key]
        for name, key in (("generation_config.json", "alignment_heads"), ("pessa.json", "notes"))
    )
    assert heads == [[1, 0], [1, 1], [1, 2], [1, 3]]  # all of the second of two layers
    assert "generation_config.json" in notes[0]
    assert pessa("verify", tmp_path / "merged").code == 0
