"""Write synthetic checkpoints with the shapes of real models and chosen spectra, without holding them in memory.

The products of every head, W_Q W_K^T with its query bias (if there is no RoPE between them) and W_V W_O, have the
singular values of `spectrum`: geometric, and different between heads, so that one threshold gives many ranks. All other
tensors are pseudo-random. The same arguments give the same bytes.

    python scripts/make_synthetic.py whisper-large-v3 FOLDER
    python scripts/make_synthetic.py llama-70b FOLDER --layers 9     # 20 GB
"""

from __future__ import annotations

import argparse
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pessa_cli.blocks.discover import find_sites, specs_of
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.files import CONFIG_FILE, SINGLE_FILE, write_json
from pessa_cli.checkpoint.reader import CHUNK, TensorInfo
from pessa_cli.checkpoint.shards import ShardWriter, write_index

SHARD = 5 * 10**9  # bytes
NOISE = 0.02  # the scale of what is not attention
WHISPER_LARGE_V3: dict[str, Any] = {
    "_name_or_path": "openai/whisper-large-v3",
    "activation_dropout": 0.0,
    "activation_function": "gelu",
    "apply_spec_augment": False,
    "architectures": ["WhisperForConditionalGeneration"],
    "attention_dropout": 0.0,
    "begin_suppress_tokens": [220, 50257],
    "bos_token_id": 50257,
    "classifier_proj_size": 256,
    "d_model": 1280,
    "decoder_attention_heads": 20,
    "decoder_ffn_dim": 5120,
    "decoder_layerdrop": 0.0,
    "decoder_layers": 32,
    "decoder_start_token_id": 50258,
    "dropout": 0.0,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layerdrop": 0.0,
    "encoder_layers": 32,
    "eos_token_id": 50257,
    "init_std": 0.02,
    "is_encoder_decoder": True,
    "mask_feature_length": 10,
    "mask_feature_min_masks": 0,
    "mask_feature_prob": 0.0,
    "mask_time_length": 10,
    "mask_time_min_masks": 2,
    "mask_time_prob": 0.05,
    "max_length": 448,
    "max_source_positions": 1500,
    "max_target_positions": 448,
    "median_filter_width": 7,
    "model_type": "whisper",
    "num_hidden_layers": 32,
    "num_mel_bins": 128,
    "pad_token_id": 50256,
    "scale_embedding": False,
    "torch_dtype": "float16",
    "use_cache": True,
    "use_weighted_layer_sum": False,
    "vocab_size": 51866,
}
LLAMA_70B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 8192,
    "initializer_range": 0.02,
    "intermediate_size": 28672,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 128256,
}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """The parameters of the heads' singular values, and the seed of all random numbers."""

    top: float = 0.1
    decay: float | None = None
    spread: float = 0.5
    seed: int = 0


def spectrum(recipe: Recipe, head_dim: int, block: int, head: int) -> Tensor:
    """Return the singular values of one head of one product, (head_dim,): geometric, beginning with `top`.

    The ratio of a middle head is `decay`, by default such that the first half of its values is above top / 20. The
    ratios of all heads are powers of it with exponents that cover 1 - spread to 1 + spread evenly.
    """
    decay = 0.05 ** (2 / head_dim) if recipe.decay is None else recipe.decay
    place = ((block * 64 + head) * 0.6180339887498949) % 1
    power = 1 - recipe.spread + 2 * recipe.spread * place
    values: Tensor = recipe.top * (decay**power) ** torch.arange(head_dim, dtype=torch.float64)
    return values


def whisper_shapes(config: Mapping[str, Any]) -> Shapes:
    width, mels = config["d_model"], config["num_mel_bins"]

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> Shapes:
        return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})

    def norm(name: str) -> Shapes:
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    shapes: Shapes = {
        "model.encoder.conv1.weight": (width, mels, 3),
        "model.encoder.conv1.bias": (width,),
        "model.encoder.conv2.weight": (width, width, 3),
        "model.encoder.conv2.bias": (width,),
        "model.encoder.embed_positions.weight": (config["max_source_positions"], width),
        "model.decoder.embed_positions.weight": (config["max_target_positions"], width),
        "model.decoder.embed_tokens.weight": (config["vocab_size"], width),
    }
    for side, attentions in (("encoder", ("self_attn",)), ("decoder", ("self_attn", "encoder_attn"))):
        for layer in range(config[f"{side}_layers"]):
            prefix = f"model.{side}.layers.{layer}"
            for attention in attentions:
                for letter in "qkv":
                    shapes |= linear(f"{prefix}.{attention}.{letter}_proj", width, width, bias=letter != "k")
                shapes |= linear(f"{prefix}.{attention}.out_proj", width, width) | norm(
                    f"{prefix}.{attention}_layer_norm"
                )
            shapes |= linear(f"{prefix}.fc1", config[f"{side}_ffn_dim"], width)
            shapes |= linear(f"{prefix}.fc2", width, config[f"{side}_ffn_dim"]) | norm(f"{prefix}.final_layer_norm")
        shapes |= norm(f"model.{side}.layer_norm")
    return dict(sorted(shapes.items()))  # as save_pretrained leaves them


def llama_shapes(config: Mapping[str, Any]) -> Shapes:
    width, inner, head_dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (config["vocab_size"], width)}
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (width,),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.post_attention_layernorm.weight": (width,),
            f"{prefix}.self_attn.k_proj.weight": (keys, width),
            f"{prefix}.self_attn.o_proj.weight": (width, queries),
            f"{prefix}.self_attn.q_proj.weight": (queries, width),
            f"{prefix}.self_attn.v_proj.weight": (keys, width),
        }
    return shapes | {"model.norm.weight": (width,), "lm_head.weight": (config["vocab_size"], width)}


MODELS: dict[str, tuple[dict[str, Any], str, Callable[[Mapping[str, Any]], Shapes]]] = {
    "whisper-large-v3": (WHISPER_LARGE_V3, "F16", whisper_shapes),
    "llama-70b": (LLAMA_70B, "BF16", llama_shapes),
}


def product(generator: torch.Generator, left: int, right: int, spectra: Tensor) -> tuple[Tensor, Tensor]:
    """Return float32 factors (left, d) and (right, d) whose product has these singular values, with columns alike."""
    mix = torch.linalg.qr(torch.randn(len(spectra), len(spectra), generator=generator)).Q
    root = spectra.sqrt().float().unsqueeze(1) * mix

    def side(length: int) -> Tensor:
        factor = torch.randn(length, len(spectra), generator=generator)
        basis = torch.linalg.cholesky((factor.mT @ factor).double()).mT  # R, well-conditioned for a tall Gaussian
        shaped: Tensor = factor @ torch.linalg.solve_triangular(basis, root.double(), upper=True).float()
        return shaped

    return side(left), side(right)


def attention(site: AttentionSite, recipe: Recipe, block: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of a block that determine its products; the other tensors are noise."""
    generator = torch.Generator().manual_seed((recipe.seed << 20) + block)
    shapes = site.tensors
    found: dict[str, Tensor] = {}

    def empty(letter: str, part: str = "weight") -> Tensor:
        name = f"{site.module(letter)}.{part}"
        found[name] = torch.empty(shapes[name], dtype=dtype)
        return found[name]

    d, m = site.head_dim, site.group
    v, o = empty("v"), empty("o")
    for head in range(site.kv_heads):
        values = spectrum(recipe, d, 2 * block + 1, head)
        left, right = product(generator, site.key_width, m * site.output_width, values)
        v[head * d : (head + 1) * d] = left.mT
        o[:, head * m * d : (head + 1) * m * d] = right.reshape(m, -1, d).transpose(0, 1).reshape(-1, m * d)
    if site.merges_qk:
        q, k = empty("q"), empty("k")
        bias = empty("q", "bias").view(-1, d) if "q" in site.biases else None
        rows = site.query_width + (bias is not None)
        for head in range(site.kv_heads):
            left, right = product(generator, m * rows, site.key_width, spectrum(recipe, d, 2 * block, head))
            stacked = left.reshape(m, rows, d)
            q[head * m * d : (head + 1) * m * d] = stacked[:, : site.query_width].mT.reshape(m * d, -1)
            if bias is not None:
                bias[head * m : (head + 1) * m] = stacked[:, -1]
            k[head * d : (head + 1) * d] = right.mT
    return found


class Noise:
    """Pseudo-random tensors at the speed of a copy: slices of one buffer, at offsets drawn from the tensor's name."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self._seed = seed
        self._item = dtype.itemsize
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.randn(2 * CHUNK // self._item, generator=generator).mul_(NOISE).to(dtype)
        self._bytes = numbers.view(torch.uint8).numpy().data

    def chunks(self, name: str, info: TensorInfo) -> Iterator[memoryview]:
        state = zlib.crc32(f"{self._seed} {name}".encode())
        for done in range(0, info.nbytes, CHUNK):
            start = state % (CHUNK // self._item) * self._item
            yield self._bytes[start : start + min(CHUNK, info.nbytes - done)]
            state = (state * 1664525 + 1013904223) % 2**32


def shards(header: Mapping[str, TensorInfo], limit: int) -> dict[str, dict[str, TensorInfo]]:
    """Distribute the tensors in order over files of at most `limit` bytes, unless a single tensor is larger."""
    parts: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in header.items():
        if parts[-1] and size + info.nbytes > limit:
            parts.append({})
            size = 0
        parts[-1][name] = info
        size += info.nbytes
    if len(parts) == 1:
        return {SINGLE_FILE: parts[0]}
    return {f"model-{i:05}-of-{len(parts):05}.safetensors": part for i, part in enumerate(parts, 1)}


def make(
    model: str, folder: Path, recipe: Recipe, layers: int | None = None, dtype: str | None = None, shard: int = SHARD
) -> int:
    """Write the checkpoint into a new folder and return its size in bytes.

    `layers` is the number of layers of each stack, and `dtype` is F16, BF16 or F32; the defaults are those of the real
    model.
    """
    known, usual, shapes_of = MODELS[model]
    config = dict(known)
    if layers is not None:
        counts = ("num_hidden_layers", "encoder_layers", "decoder_layers")
        config |= {key: layers for key in counts if key in config}
    dtype = dtype or usual
    config["torch_dtype"] = TORCH_DTYPES[dtype]
    header = {name: TensorInfo(dtype, shape) for name, shape in shapes_of(config).items()}
    sites = find_sites(specs_of(config, header), config, header)
    number: torch.dtype = getattr(torch, TORCH_DTYPES[dtype])
    noise = Noise(number, recipe.seed)
    folder.mkdir(parents=True)
    write_json(folder / CONFIG_FILE, config)
    plan = shards(header, shard)
    blocks = {name: block for block, site in enumerate(sites) for name in site.tensors}
    made: dict[str, Tensor] = {}  # of blocks that are being written
    done: set[int] = set()
    for file, tensors in plan.items():
        with ShardWriter(folder / file, tensors, {"format": "pt"}) as writer:
            for name, info in tensors.items():
                block = blocks.get(name)
                if block is not None and block not in done:
                    made |= attention(sites[block], recipe, block, number)
                    done.add(block)
                if name in made:
                    writer.put(name, made.pop(name))
                elif "norm.weight" in name:
                    writer.put(name, torch.ones(info.shape, dtype=number))
                else:
                    writer.write(name, noise.chunks(name, info))
    if len(plan) > 1:
        write_index(folder, plan)
    return sum(info.nbytes for info in header.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path, help="where to write it")
    parser.add_argument("--layers", type=int, help="layers of each stack (default: those of the real model)")
    parser.add_argument("--dtype", choices=("F16", "BF16", "F32"), help="default: that of the real model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--top", type=float, default=Recipe.top, help="the largest singular value of every head")
    parser.add_argument("--decay", type=float, help="the ratio of successive singular values in a middle head")
    parser.add_argument("--spread", type=float, default=Recipe.spread, help="how much the heads differ, from 0 to 1")
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")
    args = parser.parse_args()
    if args.force and args.folder.exists():
        shutil.rmtree(args.folder)
    start = time.perf_counter()
    recipe = Recipe(args.top, args.decay, args.spread, args.seed)
    size = make(args.model, args.folder, recipe, args.layers, args.dtype)
    print(f"{args.folder}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
