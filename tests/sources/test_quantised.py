"""Quantised safetensors are recognised by config, names or dtypes, and refused with the way to float weights."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny_gguf
import torch
import transformers
from harness import WEIGHTS, Pessa, TinyFolder, copy_of, is_refusal
from safetensors.torch import load_file, save_file

from pessa_cli.checkpoint.quantized import DEQUANTISE, FLOAT8, NAMES, ORIGINAL

METHODS = ("fp8", "mxfp4", "compressed-tensors", "bitsandbytes", "gptq", "awq", "hqq", "aqlm", "torchao", "quanto")
EXAMPLES = {
    "gptq": "q_proj.qzeros",
    "awq or gptq": "q_proj.qweight",
    "bitsandbytes": "q_proj.weight.quant_state.bitsandbytes__nf4",
    "compressed-tensors": "q_proj.weight_packed",
    "hqq": "q_proj.W_q",
    "fp8": "q_proj.weight_scale_inv",
    "mxfp4": "mlp.experts.gate_up_proj_blocks",
    "quanto": "q_proj.weight._data",
}


@pytest.mark.parametrize("where", ["", "text_config"])
@pytest.mark.parametrize("method", METHODS)
def test_a_config_that_names_its_method(
    method: str, where: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path
) -> None:
    model = copy_of(tiny_folder("llama"), place / "model")
    config = json.loads((model / "config.json").read_text())
    (config.setdefault(where, {}) if where else config)["quantization_config"] = {"quant_method": method}
    (model / "config.json").write_text(json.dumps(config))
    says = DEQUANTISE.get(method, ORIGINAL)
    is_refusal(pessa("prune", model, "-o", place / "out"), f"{model}: the checkpoint is quantised ({method})", says)


def test_the_first_configs_of_bitsandbytes(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    model = copy_of(tiny_folder("llama"), place / "model")
    config = json.loads((model / "config.json").read_text()) | {"quantization_config": {"load_in_8bit": True}}
    (model / "config.json").write_text(json.dumps(config))
    is_refusal(pessa("inspect", model), "is quantised (bitsandbytes)", ".dequantize()")


@pytest.mark.parametrize("method", NAMES)
def test_tensors_that_only_quantised_weights_have(
    method: str, pessa: Pessa, tiny_folder: TinyFolder, place: Path
) -> None:
    model = copy_of(tiny_folder("llama"), place / "model")
    more = {f"model.layers.0.self_attn.{EXAMPLES[method]}": torch.zeros(4, dtype=torch.uint8)}
    save_file(load_file(model / WEIGHTS) | more, model / WEIGHTS)
    is_refusal(pessa("inspect", model), f"{model / WEIGHTS}: the checkpoint is quantised ({method})")


def test_float8_without_scales(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    model = copy_of(tiny_folder("llama"), place / "model")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in load_file(model / WEIGHTS).items()}
    save_file(tensors, model / WEIGHTS)
    is_refusal(pessa("inspect", model), "of the dtype F8_E4M3", "tensor.to(torch.bfloat16)")
    assert "F8_E4M3" in FLOAT8


def test_no_architecture_has_such_names() -> None:
    """The control: the patterns match no tensor of the tiny models of all architectures."""
    from tiny_models import TINIES, build

    for case in list(TINIES)[::6]:
        for name in build(case).state_dict():
            assert not any(re.search(pattern, name) for pattern in NAMES.values()), name


def test_the_way_to_float_weights_leads_there(pessa: Pessa, place: Path) -> None:
    """The hint for float8 is run as it is written, on weights in blocks of 128 x 128 with scales."""
    model = tiny_gguf.build("llama wide")
    model.save_pretrained(place / "FOLDER")
    stored: dict[str, torch.Tensor] = {}
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(place / "FOLDER" / WEIGHTS).items():
        stored[name] = expected[name] = tensor.bfloat16()
        if "_proj" in name:
            rows, columns = tensor.shape
            scale = tensor.reshape(rows // 128, 128, columns // 128, 128).abs().amax((1, 3)) / 448
            whole = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            stored[name], stored[f"{name}_scale_inv"] = (tensor / whole).to(torch.float8_e4m3fn), scale
            expected[name] = stored[name].float() * whole
    save_file(stored, place / "FOLDER" / WEIGHTS, {"format": "pt"})
    config = json.loads((place / "FOLDER" / "config.json").read_text())
    method = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
    (place / "FOLDER" / "config.json").write_text(json.dumps(config | {"quantization_config": method}))
    is_refusal(pessa("inspect", place / "FOLDER"), "is quantised (fp8)", DEQUANTISE["fp8"])
    names: dict[str, Any] = {"FOLDER": str(place / "FOLDER"), "OUT": str(place / "OUT")}
    classes = [name for name in re.findall(r"[A-Z]\w+", DEQUANTISE["fp8"]) if hasattr(transformers, name)]
    eval(DEQUANTISE["fp8"], {name: getattr(transformers, name) for name in classes} | names)
    found = load_file(place / "OUT" / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name].float(), expected[name].float(), atol=1e-6) for name in found)
    assert pessa("inspect", place / "OUT").code == 0
