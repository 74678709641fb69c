"""The dtypes of safetensors files: their torch names, their item sizes in bytes and their rounding errors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
FLOATS = ("F64", "F32", "F16", "BF16")  # ordered from the finest rounding to the coarsest
# Half the distance from 1 to the next larger number: the largest relative error of storing one weight.
UNIT_ROUNDOFF = {"F64": 2.0**-53, "F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
# Half the smallest positive (subnormal) number: the largest absolute error of storing a weight close to zero.
UNDERFLOW = {"F64": 0.0, "F32": 2.0**-150, "F16": 2.0**-25, "BF16": 2.0**-134}


def loaded_dtype(config: Mapping[str, Any], stored: Iterable[str]) -> str | None:
    """Return the torch name of the dtype in which transformers loads a model by default.

    That is the one in config.json, otherwise that of the first tensor of floats. stored: the dtypes of the tensors in
    their order in the file. Returns None if there are no floats.
    """
    declared = config.get("dtype", config.get("torch_dtype"))
    if isinstance(declared, str):
        return declared.removeprefix("torch.")
    return TORCH_DTYPES.get(next((dtype for dtype in stored if dtype in FLOATS), ""))
