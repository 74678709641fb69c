"""Checkpoints whose weights are quantised: how they are recognised, and how their user gets to a float checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import shortened

OURS = "pessa"  # compact checkpoints, whose weights are floats
ORIGINAL = "give the float checkpoint that it was made from (base_model in its README.md), and quantise after pruning"
LOAD = "AutoModelForCausalLM.from_pretrained(FOLDER"
SAVE = "save_pretrained(OUT, save_original_format=False)"  # the original format of float8 would be float8 again
# What transformers dequantises, with the Python that does it; the others need the checkpoint that they were made from.
DEQUANTISE = {
    "fp8": f"{LOAD}, quantization_config=FineGrainedFP8Config(dequantize=True)).{SAVE}",
    "mxfp4": f"{LOAD}, quantization_config=Mxfp4Config(dequantize=True)).{SAVE}",
    "compressed-tensors": f"{LOAD}, quantization_config=CompressedTensorsConfig(dequantize=True)).{SAVE}",
    "bitsandbytes": f"{LOAD}).dequantize().save_pretrained(OUT)",
}
# Names that only tensors of quantised weights have.
NAMES = {
    "gptq": r"\.(qzeros|g_idx)$",
    "awq or gptq": r"\.qweight$",
    "bitsandbytes": r"\.(absmax|quant_map|nested_absmax|SCB|quant_state\.bitsandbytes__\w+)$",
    "compressed-tensors": r"\.weight_packed$",
    "hqq": r"\.W_q$",
    "fp8": r"\.weight_scale(_inv)?$",
    "mxfp4": r"_proj_(blocks|scales)$",
    "quanto": r"\.weight\._(data|scale)$",
}
FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
CAST = "weights of float8 without scales: make each tensor.to(torch.bfloat16), and save them with safetensors"


def method_of(config: Mapping[str, Any]) -> str | None:
    """Return the method by which a config says that the weights are quantised, or None; pessa's own is none."""
    parts = (config, *(config.get(f"{part}_config") for part in ("text", "thinker", "llm")))
    for part in parts:
        found = part.get("quantization_config", part.get("compression_config")) if isinstance(part, dict) else None
        if found is None:
            continue
        method = found.get("quant_method") if isinstance(found, dict) else found
        if method is None and isinstance(found, dict) and any(str(key).startswith("load_in_") for key in found):
            method = "bitsandbytes"  # as its first versions wrote it
        if method != OURS:
            return method if isinstance(method, str) and method.replace("-", "_").isidentifier() else shortened(method)
    return None


def refuse(path: Path, method: str) -> NoReturn:
    """Raise PessaError for quantised weights, with the way to float weights as its hint."""
    way = DEQUANTISE.get(method)
    hint = ORIGINAL if way is None else f"dequantise it with transformers: {way}; or {ORIGINAL}"
    raise PessaError(f"{path}: the checkpoint is quantised ({method}), so its weights are no matrices of floats", hint)


def refuse_quantised(path: Path, tensors: Mapping[str, str]) -> None:
    """Raise PessaError if the names or dtypes of a file's tensors are those of quantised weights.

    tensors: the dtype of each tensor, as safetensors names it.
    """
    for method, pattern in NAMES.items():
        if any(re.search(pattern, name) for name in tensors):
            refuse(path, method)
    for name, dtype in tensors.items():
        if dtype in FLOAT8:
            raise PessaError(f"{path}: {name} is of the dtype {dtype}, which pessa cannot compute with", CAST)
