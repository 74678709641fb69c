"""Numerical edge cases: all dtypes and mixtures of them, degenerate heads, odd shapes, and the range of 16-bit numbers.

Each case is decomposed and losslessly pruned, both from the original and from the decomposed model, and compared with
the original head by head in float64.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pessa_cli.algebra.absorb import Factors, Pair
from pessa_cli.algebra.compare import relative_difference
from pessa_cli.algebra.decompose import decompose
from pessa_cli.checkpoint.dtypes import UNIT_ROUNDOFF
from pessa_cli.common.errors import PessaError
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.run import Run

Tensors = dict[str, Tensor]
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
RUN = Run(jobs=1)
CHANNELS = 5  # of the MLP
FLOOR = 1e-12  # the error of the float64 algebra, which does not depend on the dtype of storage


def bert(width: int = 24, heads: int = 3, head_dim: int = 8) -> tuple[Tensors, dict[str, object]]:
    """Return the tensors and config of one layer of BERT, with all biases."""
    generator = torch.Generator().manual_seed(0)
    names, rows = {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"}, heads * head_dim
    tensors: Tensors = {}
    for side, name in names.items():
        shape = (width, rows) if side == "o" else (rows, width)
        tensors[f"encoder.layer.0.attention.{name}.weight"] = torch.randn(shape, generator=generator) * 0.4
        tensors[f"encoder.layer.0.attention.{name}.bias"] = torch.randn(shape[0], generator=generator) * 0.4
    for name, shape in {"intermediate": (CHANNELS, width), "output": (width, CHANNELS)}.items():
        tensors[f"encoder.layer.0.{name}.dense.weight"] = torch.randn(shape, generator=generator) * 0.4
        tensors[f"encoder.layer.0.{name}.dense.bias"] = torch.randn(shape[0], generator=generator) * 0.4
    config = {"num_attention_heads": heads, "num_hidden_layers": 1, "intermediate_size": CHANNELS}
    return tensors, {"model_type": "bert", "hidden_size": width} | config


def llama(heads: int, kv_heads: int, width: int = 24, head_dim: int = 8) -> tuple[Tensors, dict[str, object]]:
    """Return the tensors and config of one layer of LLaMA, without biases."""
    generator = torch.Generator().manual_seed(0)
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim, "o": width}
    tensors = {
        f"model.layers.0.self_attn.{side}_proj.weight": torch.randn(
            count, heads * head_dim if side == "o" else width, generator=generator
        )
        for side, count in rows.items()
    }
    for name, shape in {"gate": (CHANNELS, width), "up": (CHANNELS, width), "down": (width, CHANNELS)}.items():
        tensors[f"model.layers.0.mlp.{name}_proj.weight"] = torch.randn(shape, generator=generator)
    config = {"model_type": "llama", "num_attention_heads": heads, "num_key_value_heads": kv_heads}
    sizes = {"hidden_size": width, "head_dim": head_dim, "intermediate_size": CHANNELS, "num_hidden_layers": 1}
    return tensors, config | sizes


def saved(folder: Path, tensors: Tensors, config: dict[str, object]) -> Path:
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def error_after(folder: Path, place: Path) -> float:
    """Return the worst relative error of a head after decompose, prune, and prune from the decomposed model."""
    original = open_model(folder)
    decompose_model(original, place / "decomposed", run=RUN)
    prune_model(original, place / "pruned", Rule(), run=RUN)
    prune_model(open_model(place / "decomposed"), place / "sliced", Rule(), run=RUN)
    reports = [
        verify_models(original, open_model(place / out), "weights") for out in ("decomposed", "pruned", "sliced")
    ]
    assert all(report.same for report in reports), [report.failures for report in reports]
    assert (place / "pruned/model.safetensors").read_bytes() == (place / "sliced/model.safetensors").read_bytes()
    return max(report.worst.error for report in reports)


def rows_of(tensors: Tensors, side: str, head: int) -> Tensor:
    """Return the rows of one head, (8, D), as a view that can be changed in place."""
    return tensors[f"encoder.layer.0.attention.self.{side}.weight"][8 * head : 8 * head + 8]


def zero_head(tensors: Tensors) -> None:
    for side in ("query", "key", "value"):
        rows_of(tensors, side, 1).zero_()


def all_zero(tensors: Tensors) -> None:
    rows_of(tensors, "query", 0).zero_()
    rows_of(tensors, "query", 1).zero_()
    rows_of(tensors, "key", 2)[3:].zero_()


def rank_deficient(tensors: Tensors) -> None:
    for side in ("query", "value"):
        rows = rows_of(tensors, side, 1)
        rows[4:] = rows[:4]


def scaled(**scales: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for side, scale in scales.items():
            rows_of(tensors, side, 1).mul_(scale)

    return change


def many_scales(tensors: Tensors) -> None:
    """Scale one head by 1e4 to 1e-8: W_Q by directions, W_V by entries."""
    rows_of(tensors, "query", 1).mul_(torch.logspace(4, -8, 8).unsqueeze(1))
    rows_of(tensors, "value", 1).mul_(torch.logspace(4, -8, 24))


def huge_biases(tensors: Tensors) -> None:
    for side in ("query", "key", "value"):
        tensors[f"encoder.layer.0.attention.self.{side}.bias"].mul_(3000)


def nothing(_tensors: Tensors) -> None:
    pass


DAMAGES: dict[str, Callable[[Tensors], None]] = {
    "ordinary": nothing,
    "a zero head": zero_head,
    "mostly zero": all_zero,
    "rank-deficient": rank_deficient,
    "entries of 1e4": scaled(query=1e4, key=1e4, value=1e4),
    "entries of 1e4 and 1e-3": scaled(query=1e4, key=1e-3),
    "entries of 1e-8": scaled(query=1e-8, key=1e-8, value=1e-8),
    "1e4 and 1e-8 in one head": many_scales,
    "huge biases": huge_biases,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("edge", DAMAGES)
def test_lossless_errors_are_rounding_errors_of_the_dtype(edge: str, dtype: str, tmp_path: Path) -> None:
    tensors, config = bert()
    DAMAGES[edge](tensors)
    stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    error = error_after(saved(tmp_path / "model", stored, config), tmp_path)
    assert error <= 2 * UNIT_ROUNDOFF[dtype] + FLOOR


SHAPES = {
    "head_dim larger than the input": llama(2, 2, width=6, head_dim=16),
    "one head": bert(width=8, heads=1, head_dim=8),
    "a width of one": llama(2, 2, width=1, head_dim=2),
    "a head_dim of one": bert(width=8, heads=8, head_dim=1),
    "groups of one": llama(4, 4),
    "all query heads in one group": llama(4, 1),
    "one query head": llama(1, 1),
    "heads wider than the input in one group": llama(4, 1, width=4, head_dim=16),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str, dtype: str, tmp_path: Path) -> None:
    tensors, config = SHAPES[shape]
    stored = {name: tensor.to(DTYPES[dtype]) for name, tensor in tensors.items()}
    error = error_after(saved(tmp_path / "model", stored, config), tmp_path)
    assert error <= 2 * UNIT_ROUNDOFF[dtype] + FLOOR


@pytest.mark.parametrize("coarse", ["weight", "bias", "embedding"])
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_the_dtype_of_a_block_is_its_coarsest(coarse: str, dtype: str, tmp_path: Path) -> None:
    tensors, config = bert()
    tensors["embedding"] = torch.randn(3, 24)
    part = {"weight": "self.key.weight", "bias": "self.query.bias", "embedding": "embedding"}[coarse]
    others = {"value.weight": torch.float64}
    for name in tensors:
        kinds = [kind for end, kind in others.items() if name.endswith(end)]
        tensors[name] = tensors[name].to(DTYPES[dtype] if name.endswith(part) else kinds[0] if kinds else torch.float32)
    folder = saved(tmp_path / "model", tensors, config)
    expected = "F32" if coarse == "embedding" else dtype
    assert [site.dtype for site in open_model(folder).attention] == [expected]
    assert error_after(folder, tmp_path) <= 2 * UNIT_ROUNDOFF[expected] + FLOOR


def stored_error(pair: Pair, dtype: torch.dtype, shift: float = 1.0) -> float:
    """Return the relative error of a head's product if its factors are stored in a dtype, unbalanced by `shift`."""
    factors = decompose(pair)
    left, right = (factors.left * shift).to(dtype).double(), (factors.right / shift).to(dtype).double()
    return float(relative_difference(pair, Pair(left, right)).max())


def head(scale: float, width: int = 64, head_dim: int = 8) -> Pair:
    """Return a random head with factors of equal scale, whose product has the given Frobenius norm."""
    generator = torch.Generator().manual_seed(0)
    left, right = torch.randn(2, 1, width, head_dim, generator=generator, dtype=torch.float64)
    root = (scale / float(torch.linalg.matrix_norm(left @ right.mT))) ** 0.5
    return Pair(left * root, right * root)


@pytest.mark.parametrize("exponent", range(-6, 7))
@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_products_from_1e_6_to_1e6_keep_their_digits_in_16_bits(dtype: str, exponent: int) -> None:
    assert stored_error(head(10.0**exponent), DTYPES[dtype]) <= 2 * UNIT_ROUNDOFF[dtype]


@pytest.mark.parametrize("exponent", range(-12, -5))
@pytest.mark.parametrize("width", [64, 1280])
def test_smaller_products_in_float16_lose_only_what_subnormals_lose(width: int, exponent: int) -> None:
    """Entries below 6e-5 are subnormal, which are multiples of 2^-24.

    A rounding error of 2^-25 for each entry changes the product by at most 2^-25 sqrt(D) (||A|| + ||B||). Among all
    factors of a product, balanced ones have the smallest ||A||^2 + ||B||^2, so that no other factors, including the
    original ones, have a smaller bound.
    """
    pair = head(10.0**exponent, width)
    norms = sum(float(torch.linalg.matrix_norm(factor)) for factor in (pair.left, pair.right))
    own = 2.0**-25 * width**0.5 * norms / 10.0**exponent
    error = stored_error(pair, torch.float16)
    assert error <= 2 * UNIT_ROUNDOFF["F16"] + own
    assert stored_error(pair, torch.bfloat16) <= 2 * UNIT_ROUNDOFF["BF16"]  # bfloat16 has the range of float32
    for shift in (1 / 16, 16):
        assert error < 0.2 * stored_error(pair, torch.float16, shift) or error > 0.1  # or all are lost in rounding


def test_float16_subnormals_are_not_taken_for_changed_weights(tmp_path: Path) -> None:
    """The norms of their directions have large rounding errors, which the check of stored spectra must allow."""
    tensors, config = bert(width=96, heads=12)
    for side in ("query", "key"):
        rows_of(tensors, side, 1).mul_(1e-6)
    tensors["encoder.layer.0.attention.self.query.bias"][8:16].mul_(1e-6)
    folder = saved(tmp_path / "model", {name: tensor.half() for name, tensor in tensors.items()}, config)
    decompose_model(open_model(folder), tmp_path / "decomposed", run=RUN)
    prune_model(open_model(tmp_path / "decomposed"), tmp_path / "pruned", Rule(), run=RUN)


@pytest.mark.parametrize("where", ["query", "value"])
def test_factors_that_overflow_in_16_bits_are_an_error(where: str, tmp_path: Path) -> None:
    """All directions of a head are equal and near the largest float16; their one factor is larger by sqrt(8)."""
    tensors, config = bert()
    name, other = (f"encoder.layer.0.attention.{n}.weight" for n in (f"self.{where}", "self.key"))
    for each in (name, other if where == "query" else "encoder.layer.0.attention.output.dense.weight"):
        tensors[each].zero_()
        rows = tensors[each].T if "output" in each else tensors[each]
        rows[:8, 0] = 60000
    folder = saved(tmp_path / "model", {n: tensor.half() for n, tensor in tensors.items()}, config)
    with pytest.raises(PessaError, match="overflow"):
        decompose_model(open_model(folder), tmp_path / "out", run=RUN)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scale", [1e60, 1e100, 1e200, 1e300])
def test_products_beyond_float64_are_an_error(scale: float, tmp_path: Path) -> None:
    tensors, config = bert()
    stored = {name: tensor.double() for name, tensor in tensors.items()}
    for side in ("query", "key"):
        rows_of(stored, side, 1).mul_(scale)
    folder = saved(tmp_path / "model", stored, config)
    if scale == 1e60:
        assert error_after(folder, tmp_path) <= FLOOR
        return
    with pytest.raises(PessaError, match="float64"):
        prune_model(open_model(folder), tmp_path / "out", Rule(), run=RUN)
    assert not (tmp_path / "out").exists()


def test_balanced_factors_come_from_the_spectrum() -> None:
    """The control for the tests above: unbalanced factors overflow in float16."""
    pair = head(1e6)
    factors: Factors = decompose(pair)
    lopsided = Pair(factors.left * 1e-5, factors.right * factors.spectrum.unsqueeze(-2) * 1e5)
    rounded = Pair(lopsided.left.half().double(), lopsided.right.half().double())
    assert not rounded.right.isfinite().all()
