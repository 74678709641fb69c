"""A block in a file and its weights per head, row by row, for every way in which files store heads."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention import GROUPED, weights_of
from safetensors.torch import save_file
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import ROPE, AttentionSite
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.surgery.block_io import NotFiniteError, read_site, write_site
from pessa_cli.surgery.block_reader import BlockReader

BIASED = replace(GROUPED, biases=frozenset("qkvo"))
SQUARE = replace(BIASED, query_width=6)  # fused tensors have one input
SITES = {
    "separate": BIASED,
    "without biases": GROUPED,
    "transposed": replace(BIASED, spec=replace(GROUPED.spec, transposed=True)),
    "fused in blocks": replace(SQUARE, k="q", v="q", spec=replace(GROUPED.spec, fused="blocks")),
    "fused by groups": replace(SQUARE, k="q", v="q", spec=replace(GROUPED.spec, fused="grouped")),
    "fused and transposed": replace(SQUARE, k="q", v="q", spec=replace(GROUPED.spec, fused="blocks", transposed=True)),
}


def stored(site: AttentionSite, weights: HeadWeights) -> dict[str, Tensor]:
    """Return the tensors of a block at full rank, put together row by row."""
    found: dict[str, Tensor] = {}
    sides = {"q": "q", "k": "k", "v": "v"}
    rows: dict[str, list[Tensor]] = {side: [] for side in sides}
    bias_rows: dict[str, list[Tensor]] = {side: [] for side in sides}
    for g in range(site.kv_heads):
        for m in range(site.group):
            for i in range(site.head_dim):
                rows["q"].append(weights.q[g, m, i])
                if weights.q_bias is not None:
                    bias_rows["q"].append(weights.q_bias[g, m, i])
        for side in "kv":
            for i in range(site.head_dim):
                rows[side].append(getattr(weights, side)[g, i])
                if (bias := getattr(weights, f"{side}_bias")) is not None:
                    bias_rows[side].append(bias[g, i])
    for kind, parts in (("weight", rows), ("bias", bias_rows)):
        if not parts["q"]:
            continue
        if site.spec.fused == "grouped":
            m, d = site.group, site.head_dim
            together = []
            for g in range(site.kv_heads):
                together += parts["q"][g * m * d : (g + 1) * m * d]
                together += parts["k"][g * d : (g + 1) * d] + parts["v"][g * d : (g + 1) * d]
            found[f"q.{kind}"] = torch.stack(together)
        elif site.spec.fused:
            found[f"q.{kind}"] = torch.stack(parts["q"] + parts["k"] + parts["v"])
        else:
            found |= {f"{side}.{kind}": torch.stack(parts[side]) for side in sides}
    columns = [weights.o[:, g, m, i] for g in range(2) for m in range(2) for i in range(site.head_dim)]
    found["o.weight"] = torch.stack(columns, -1)
    if weights.o_bias is not None:
        found["o.bias"] = weights.o_bias
    if site.spec.transposed:
        found = {name: tensor.mT if tensor.dim() == 2 else tensor for name, tensor in found.items()}
    return {name: tensor.contiguous() for name, tensor in found.items()}


def reader_of(folder: Path, tensors: dict[str, Tensor]) -> CheckpointReader:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))
    return CheckpointReader(folder)


def same(a: HeadWeights, b: HeadWeights) -> bool:
    pairs = [(getattr(a, field.name), getattr(b, field.name)) for field in fields(HeadWeights)]
    return all((x is None and y is None) or (x is not None and torch.equal(x, y)) for x, y in pairs)


def cut_to(weights: HeadWeights, qk: tuple[int, int], vo: tuple[int, int]) -> HeadWeights:
    """Return the weights with zeros beyond these ranks."""
    new: dict[str, Any] = {
        field.name: None if (tensor := getattr(weights, field.name)) is None else tensor.clone()
        for field in fields(HeadWeights)
    }
    for g in range(2):
        for name, rank in (("q", qk[g]), ("k", qk[g]), ("v", vo[g])):
            new[name][g][..., rank:, :] = 0
            if new[f"{name}_bias"] is not None:
                new[f"{name}_bias"][g][..., rank:] = 0
        new["o"][:, g, :, vo[g] :] = 0
    return HeadWeights(**new)


@pytest.mark.parametrize("kind", SITES)
def test_the_weights_of_each_head_and_the_file_again(kind: str, tmp_path: Path) -> None:
    site = SITES[kind]
    weights = weights_of(site, dtype=torch.float32)
    tensors = stored(site, weights)
    reader = reader_of(tmp_path / "m", tensors)
    found = read_site(reader, site)
    assert same(found, weights)
    for layout in ("compact", "dense"):
        again = write_site(found, site, reader.header, layout)
        assert again.keys() == tensors.keys()
        assert all(torch.equal(again[name], tensor) and again[name].is_contiguous() for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", SITES)
def test_cut_directions_are_left_out_or_zero(kind: str, tmp_path: Path) -> None:
    site = SITES[kind]
    weights = weights_of(site, dtype=torch.float32)
    whole = stored(site, weights)
    reader = reader_of(tmp_path / "m", whole)
    qk, vo = ((1, 3), (3, 2)) if not site.spec.fused else ((2, 1), (3, 2))
    kept = replace(site, qk_ranks=qk, vo_ranks=vo)
    expected = cut_to(weights, qk, vo)
    dense = write_site(weights, kept, reader.header, "dense")
    assert all(torch.equal(dense[name], tensor) for name, tensor in stored(site, expected).items())
    compact = write_site(weights, kept, reader.header, "compact")
    assert {name: tuple(tensor.shape) for name, tensor in compact.items()} == dict(kept.tensors)
    again = reader_of(tmp_path / "compact", compact)
    assert same(read_site(again, kept), expected)
    values = sorted(float(v) for v in dense["q.weight"].flatten() if v)
    assert sorted(float(v) for v in compact["q.weight"].flatten()) == values


def test_kept_pairs_are_rows_of_both_halves(tmp_path: Path) -> None:
    pairs = ((range(0, 1), range(2, 3)), (range(1, 2),))
    site = replace(
        BIASED,
        spec=ARCHITECTURES["llama"][0],
        between=ROPE,
        head_dim=6,
        unmerged=6,
        qk_ranks=(6, 6),
        vo_ranks=(6, 6),
    )
    weights = weights_of(site, dtype=torch.float32)
    reader = reader_of(tmp_path / "m", stored(site, weights))
    kept = replace(site, pairs=pairs, qk_ranks=(4, 2))
    compact = write_site(weights, kept, reader.header, "compact")
    rows = {0: [0, 2, 3, 5], 1: [1, 4]}
    assert torch.equal(compact["k.weight"], torch.cat([weights.k[g, rows[g]] for g in range(2)]))
    assert torch.equal(compact["q.weight"], torch.cat([weights.q[g, m, rows[g]] for g in range(2) for m in range(2)]))
    assert weights.k_bias is not None
    assert torch.equal(compact["k.bias"], torch.cat([weights.k_bias[g, rows[g]] for g in range(2)]))
    assert torch.equal(compact["v.weight"], weights.v.flatten(0, 1))
    found = read_site(reader_of(tmp_path / "compact", compact), kept)
    assert torch.equal(found.k[0, rows[0]], weights.k[0, rows[0]])
    assert not found.k[0, [1, 4]].any()
    assert not found.q[1, :, [0, 2, 3, 5]].any()


def test_each_tensor_is_rounded_to_its_own_dtype(tmp_path: Path) -> None:
    tensors = stored(BIASED, weights_of(BIASED, dtype=torch.float32))
    tensors["k.weight"], tensors["o.bias"] = tensors["k.weight"].half(), tensors["o.bias"].bfloat16()
    reader = reader_of(tmp_path / "m", tensors)
    found = read_site(reader, BIASED)
    assert found.k.dtype == torch.float16
    written = write_site(found.to("cpu"), BIASED, reader.header, "compact")
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in tensors.items()}
    large = replace(found, k=1e6 * found.k.double())
    with pytest.raises(PessaError, match=r"^k\.weight would overflow: its values become too large for F16"):
        write_site(large, BIASED, reader.header, "dense")


def test_all_tensors_that_are_not_finite_are_counted(tmp_path: Path) -> None:
    tensors = stored(BIASED, weights_of(BIASED, dtype=torch.float32))
    tensors["k.weight"][0, :3], tensors["k.weight"][1, :2], tensors["o.bias"][0] = torch.nan, -torch.inf, torch.inf
    reader = reader_of(tmp_path / "m", tensors)
    with pytest.raises(NotFiniteError) as caught:
        read_site(reader, BIASED)
    assert sorted(caught.value.faults) == ["k.weight: 3 NaN, 2 infinite", "o.bias: 0 NaN, 1 infinite"]
    assert caught.value.message.startswith(f"2 tensors of {tmp_path / 'm'} are not finite\n")
    assert caught.value.hint == "the checkpoint is damaged; download it again"
    assert caught.value.reader is reader


def test_a_reader_keeps_blocks_only_when_asked(tmp_path: Path) -> None:
    reader = reader_of(tmp_path / "m", stored(BIASED, weights_of(BIASED)))
    keeping, other = BlockReader(reader, keep=True), BlockReader(reader)
    assert keeping.keeps
    assert not other.keeps
    assert keeping.reader is other.reader is reader
    assert keeping.weights(BIASED) is keeping.weights(BIASED)
    assert other.weights(BIASED) is not other.weights(BIASED)
    assert same(keeping.weights(BIASED), weights_of(BIASED))
