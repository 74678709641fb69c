"""Conversion of GGUF files, which llama.cpp runs: transformers dequantises them into a float32 Hugging Face folder.

transformers passes over keys and tensors that it does not know, so that a model with another rotation or scale would be
loaded without a word. Here each key of the architecture is either given to the config or known not to matter, and every
weight of the file must be one of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened
from pessa_cli.sources.gguf_header import DAMAGED, MAGIC, GgufHeader, read_header

ROPE_FREQUENCIES = "rope_freqs.weight"  # one divisor of the frequency of each pair, as Llama 3.1 has
ORIGINAL = "give the Hugging Face folder that it was made from"
# Keys with the attribute of the config that has the value. transformers takes most of them by itself, not all.
DECODER = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "vocab_size": "vocab_size",
}
RMS = DECODER | {"attention.layer_norm_rms_epsilon": "rms_norm_eps"}
HEAD_DIM = {"attention.key_length": "head_dim", "attention.value_length": "head_dim"}
SOFTCAPS = {f"{which}_logit_softcapping": f"{which}_logit_softcapping" for which in ("attn", "final")}
WINDOW = {"attention.sliding_window": "sliding_window"}
# Keys that this module gives to the config in another form, and keys that state what is true of every such model.
ROTATION = ("rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor")
UNUSED = ("rope.scaling.finetuned", "rope.scaling.original_context_length", "tensor_data_layout")
GEMMA_27B = (46, 62)  # the layers of the models whose scale is not that of head_dim, as in llama.cpp


@dataclass(frozen=True)
class GgufRow:
    """An architecture: its keys with the attributes of the config, keys that do not matter, and what is special.

    gemma: its scale of the scores is a number of the config. partial: only the first rope.dimension_count directions
    are rotated.
    """

    keys: Mapping[str, str]
    unused: tuple[str, ...] = ()
    gemma: bool = False
    partial: bool = False


ROWS = {  # a test runs each of them
    # llama.cpp does not use the window of the first Mistral, which has this architecture.
    "llama": GgufRow(RMS | HEAD_DIM, ("attention.sliding_window",)),
    "qwen2": GgufRow(RMS),
    "qwen3": GgufRow(RMS | HEAD_DIM),
    "gemma2": GgufRow(RMS | HEAD_DIM | SOFTCAPS | WINDOW, gemma=True),
    "gemma3": GgufRow(RMS | HEAD_DIM | SOFTCAPS | WINDOW, ("rope.freq_base_swa",), gemma=True),
    "phi3": GgufRow(RMS | WINDOW, partial=True),
    "starcoder2": GgufRow(DECODER | {"attention.layer_norm_epsilon": "norm_epsilon"}),
    "stablelm": GgufRow(
        DECODER | {"attention.layer_norm_epsilon": "layer_norm_eps"}, ("use_parallel_residual",), partial=True
    ),
}


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that begins with GGUF's magic bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _checked_header(path: Path) -> tuple[GgufHeader, GgufRow]:
    """Read the header. Raises PessaError if the file is unreadable or unsupported, or if a package is missing."""
    for package in ("gguf", "accelerate"):  # transformers needs both; accelerate is slow to import
        if find_spec(package) is None:
            what = f"{path} is a GGUF file, and reading it needs {package}, which is not installed"
            raise PessaError(what, "pip install 'pessa[gguf]'")
    from gguf import GGML_QUANT_SIZES

    header = read_header(path, {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()})
    row = ROWS.get(header.architecture)
    if row is None:
        raise PessaError(
            f"{path} has the GGUF architecture {shortened(header.architecture)}; supported: {', '.join(ROWS)}", ORIGINAL
        )
    parts = header.values.get("split.count", 1)
    if parts not in (0, 1):
        raise PessaError(
            f"{path} is one of {shortened(parts)} parts of a model", "join them: llama-gguf-split --merge FIRST WHOLE"
        )
    known = {*row.keys, *row.unused, *ROTATION, *UNUSED}
    problems = [f"the key {shortened(key)}" for key in header.keys if key not in known]
    problems += [f"the tensor {name}" for name in header.tensors if name.startswith("rope_factors")]
    scaling = header.values.get(f"{header.architecture}.rope.scaling.type", "none")
    problems += [f"rope.scaling.type {shortened(scaling)}"] if scaling not in ("none", "linear") else []
    if problems:
        raise PessaError(f"{path} has what pessa cannot convert\n{listed(problems)}", ORIGINAL)
    _check_sizes(path, header)
    return header, row


def _check_sizes(path: Path, header: GgufHeader) -> None:
    """Raise PessaError if a size in the keys is not that of the tensors: transformers would build such a model."""
    dimensions = {size for tensor in header.tensors.values() for size in tensor.shape}
    most = max(dimensions, default=0)
    limits = {
        **{"block_count": len(header.tensors), "context_length": 2**31, "attention.sliding_window": 2**31},
        **{"embedding_length": most, "feed_forward_length": 2 * most, "vocab_size": most},
        **dict.fromkeys(("attention.head_count", "attention.head_count_kv", "rope.dimension_count"), most),
        **dict.fromkeys(("attention.key_length", "attention.value_length"), most),
    }
    for key, limit in limits.items():
        value = header.number(key)
        needed = key in ("block_count", "embedding_length", "attention.head_count")
        if (value is None and needed) or (value is not None and not (type(value) is int and 0 < value <= limit)):
            raise PessaError(
                f"{path} is not a readable GGUF file: {key} is {shortened(value)}; its tensors allow 1 to {limit:,}",
                DAMAGED,
            )


def _check_memory(path: Path, header: GgufHeader) -> None:
    """Raise PessaError if the model in float32 does not fit into what memory is free."""
    counts = [math.prod(tensor.shape) for tensor in header.tensors.values()]
    needed = 4 * (sum(counts) + max(counts, default=0))  # a tensor exists twice while it is dequantised
    free = free_memory()
    if free is not None and needed > free:
        raise PessaError(
            f"{path} needs {needed / 1e9:,.1f} GB of memory as float32, but only {free / 1e9:,.1f} GB are free",
            "free some memory, use a machine with more, or give the Hugging Face folder that it was made from",
        )


def free_memory() -> int | None:
    """Return the bytes of memory that can be used without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        return None


def _complete(config: Any, path: Path, header: GgufHeader, row: GgufRow) -> None:
    """Give the config what the keys state and transformers leaves at its defaults."""
    for key, attribute in row.keys.items():
        if (value := header.number(key)) is not None:
            setattr(config, attribute, value)
    head_dim = header.number("attention.key_length") or config.hidden_size // config.num_attention_heads
    if "attention.key_length" in row.keys:
        config.head_dim = head_dim
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": header.number("rope.freq_base") or 10000.0}
    local = parameters
    if (factor := header.number("rope.scaling.factor")) and "linear" in header.values.values():
        parameters = parameters | {"rope_type": "linear", "factor": factor}
    if ROPE_FREQUENCIES in header.tensors:
        parameters = parameters | _llama3(path, header, parameters["rope_theta"])
    rotated = header.number("rope.dimension_count") or head_dim
    if row.partial:
        config.partial_rotary_factor = parameters["partial_rotary_factor"] = rotated / head_dim
    elif rotated != head_dim:
        raise PessaError(
            f"{path} rotates {rotated} of {head_dim} directions of a head, which pessa cannot convert", ORIGINAL
        )
    if (config.pad_token_id or 0) >= config.vocab_size:  # Phi 3's default, which is not in every vocabulary
        config.pad_token_id = None
    if row.gemma:
        whole = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = whole if config.num_hidden_layers in GEMMA_27B else head_dim
    if header.architecture == "gemma3":
        config.rope_parameters = {
            "full_attention": parameters,
            "sliding_attention": local | {"rope_theta": header.number("rope.freq_base_swa") or 10000.0},
        }
    else:
        config.rope_parameters = parameters


def _llama3(path: Path, header: GgufHeader, theta: float) -> dict[str, Any]:
    """Return the rotation of Llama 3.1 for the divisors of the frequencies in the file.

    Raises PessaError if they are others than that formula gives. Source: transformers.modeling_rope_utils.
    """
    import numpy as np

    tensor = header.tensors[ROPE_FREQUENCIES]
    stored = np.fromfile(path, "<f4", math.prod(tensor.shape), offset=tensor.offset).astype(float)
    low, high, context = 1.0, 4.0, 8192
    factor = float(stored.max(initial=1.0))
    turns = context * theta ** (-np.arange(len(stored)) / max(len(stored), 1)) / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    if tensor.type or not np.allclose(stored, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        raise PessaError(f"{path} has what pessa cannot convert\n  the divisors in {ROPE_FREQUENCIES}", ORIGINAL)
    return {
        **{"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high},
        "original_max_position_embeddings": context,
    }


def _check_complete(path: Path, header: GgufHeader, model: Any, info: Mapping[str, Any]) -> None:
    """Raise PessaError if the model lacks weights, or the file has weights that the model does not have."""
    problems = [f"{name}: not in the file" for name in sorted(info["missing_keys"])]
    problems += [f"{name}: of another shape" for name in sorted(map(str, info["mismatched_keys"]))]
    tensors = {name: tensor for name, tensor in header.tensors.items() if name != ROPE_FREQUENCIES}
    stored = sum(math.prod(tensor.shape) for tensor in tensors.values())
    built = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if not problems and stored != built:
        problems = [f"the file has {stored:,} weights, and a {type(model).__name__} of its sizes {built:,}"]
    if problems:
        raise PessaError(f"{path} is not a plain {header.architecture} model\n{listed(problems)}", ORIGINAL)


def convert(path: Path, into: Path) -> None:
    """Write the model in a GGUF file as a complete Hugging Face folder, in float32 so that no weight is rounded.

    The whole model is held in memory. Raises PessaError if it does not fit there, if the file has an unsupported
    architecture, key or tensor, or is damaged, or if the gguf or accelerate package is missing.
    """
    header, row = _checked_header(path)
    _check_memory(path, header)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        config = AutoConfig.from_pretrained(path.parent, **options)
        _complete(config, path, header, row)
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            output_loading_info=True,
            **options,
        )
    except PessaError:
        raise
    except Exception as error:  # the gguf package validates little, so a damaged file can raise any exception
        reason = shortened(str(error).strip() or type(error).__name__)
        raise PessaError(f"{path} does not load: {type(error).__name__}: {reason}", DAMAGED) from error
    _check_complete(path, header, model, info)
    into.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(into)
    model.save_pretrained(into)
