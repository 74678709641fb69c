"""Tiny models: exact at full rank, equal in both layouts, and different when a fact or a weight is wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from harness import TinyFolder
from torch import Tensor

import pessa_cli.algebra.absorb
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.evaluation.report import Report
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.run import Run


def load(folder: Path, **options: Any) -> Any:
    kind = getattr(transformers, tiny.read_config(folder)["architectures"][0])
    return kind.from_pretrained(folder, **options).eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model(**tiny.inputs(model)).logits.detach()  # type: ignore[no-any-return]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / a.norm())


@pytest.fixture(params=tiny.NAMES)
def source(request: pytest.FixtureRequest, tiny_folder: TinyFolder) -> Path:
    return tiny_folder(request.param)


def test_full_rank_changes_nothing(source: Path, tmp_path: Path) -> None:
    model = open_model(source)
    decompose_model(model, tmp_path / "out")
    assert distance(logits(load(source)), logits(load(tmp_path / "out"))) < 1e-5
    report = verify_models(model, open_model(tmp_path / "out"))
    assert report.same
    assert report.worst.error < 1e-6
    before, after = model.reader.header, open_model(tmp_path / "out").reader.header
    assert before == after


def test_verify_finds_a_change_of_one_weight(source: Path, tmp_path: Path) -> None:
    """The negative control of the test above."""
    changed = load(source)
    site = open_model(source).attention[1]
    with torch.no_grad():
        changed.get_submodule(site.v).weight[site.head_dim + 3, 2] += 0.05
    changed.save_pretrained(tmp_path / "changed")
    report = verify_models(open_model(source), open_model(tmp_path / "changed"))
    assert not report.same
    # The second key/value head was changed, so that all query heads that share it differ, and any may differ most.
    sharing = range(site.group, 2 * site.group)
    assert report.worst.where in [f"{site.name} head {head} V-O" for head in sharing]
    off = {found.where for found in report.weights if found.error > 1e-3}
    assert off == {f"{site.name} head {head} V-O" for head in sharing}
    attention = {each.name for each in open_model(source).attention}  # the MLP behind the block differs, too
    worst = max((found for found in report.blocks if found.where in attention), key=lambda found: found.error)
    assert worst.where == site.name
    assert report.outputs is not None
    assert report.outputs.error > 1e-4


def test_a_change_outside_attention_is_found(source: Path, tmp_path: Path) -> None:
    changed = load(source)
    name, parameter = next((n, p) for n, p in changed.named_parameters() if "norm" in n.lower())
    with torch.no_grad():
        parameter[0] += 1e-6
    changed.save_pretrained(tmp_path / "changed")
    report = verify_models(open_model(source), open_model(tmp_path / "changed"), level="weights")
    assert list(report.unequal) == [name]
    assert not report.same


@pytest.mark.parametrize("rule", [Rule(ratio=0.5), Rule(rank=3), Rule(energy=0.9, round_to=4), Rule()], ids=str)
def test_compact_and_dense_are_the_same_function(source: Path, tmp_path: Path, rule: Rule) -> None:
    model = open_model(source)
    prune_model(model, tmp_path / "compact", rule)
    prune_model(model, tmp_path / "dense", rule, layout="dense")
    compact, dense = open_model(tmp_path / "compact"), open_model(tmp_path / "dense")
    assert distance(logits(load(tmp_path / "dense")), logits(load(tmp_path / "compact"))) < 1e-5
    report = verify_models(dense, compact, level="blocks")
    assert report.same
    assert report.worst.error < 1e-12
    export_model(compact, tmp_path / "padded", "dense")
    export_model(dense, tmp_path / "cut", "compact")
    assert same_weights(tmp_path / "padded", tmp_path / "dense")
    assert same_weights(tmp_path / "cut", tmp_path / "compact")


def same_weights(a: Path, b: Path) -> bool:
    return (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def test_pruning_is_the_same_directly_and_after_decompose(source: Path, tmp_path: Path) -> None:
    decompose_model(open_model(source), tmp_path / "decomposed")
    for rule in (Rule(ratio=0.3), Rule(qk_thr=2.0, vo_thr=4.0)):
        direct, sliced = tmp_path / f"direct {rule}", tmp_path / f"sliced {rule}"
        prune_model(open_model(source), direct, rule)
        prune_model(open_model(tmp_path / "decomposed"), sliced, rule)
        assert same_weights(direct, sliced)
        assert (direct / "config.json").read_bytes() == (sliced / "config.json").read_bytes()
        again = tmp_path / f"again {rule}"
        prune_model(open_model(direct), again, rule)  # a pruned model also stores factors and spectra
        assert same_weights(direct, again)


def test_pruning_a_pruned_model_again(source: Path, tmp_path: Path) -> None:
    prune_model(open_model(source), tmp_path / "five", Rule(rank=5))
    prune_model(open_model(tmp_path / "five"), tmp_path / "three", Rule(rank=3))
    prune_model(open_model(source), tmp_path / "direct", Rule(rank=3))
    assert same_weights(tmp_path / "three", tmp_path / "direct")


def test_each_head_loses_the_norm_of_its_dropped_singular_values(source: Path, tmp_path: Path) -> None:
    model = open_model(source)
    written = prune_model(model, tmp_path / "out", Rule(rank=3))
    errors = {found.where: found.error for found in compare(model, tmp_path / "out").weights}
    for site in model.attention:
        spectra = written.spectra[site.name]
        for side, spectrum in (("Q-K", spectra.seams.get("qk")), ("V-O", spectra.seams["vo"])):
            if spectrum is None:
                continue
            for group in range(site.kv_heads):
                whole = (spectrum[group] ** 2).sum()
                dropped = (spectrum[group][3:] ** 2).sum() / whole
                of_group = [f"{site.name} head {group * site.group + i} {side}" for i in range(site.group)]
                if site.group == 1:
                    assert errors[of_group[0]] ** 2 == pytest.approx(dropped, rel=1e-5)
                else:  # the spectrum gives the error of all query heads of the group together
                    assert min(errors[h] ** 2 for h in of_group) <= dropped <= max(errors[h] ** 2 for h in of_group)


def compare(model: Model, folder: Path) -> Report:
    return verify_models(model, open_model(folder), level="weights")


def test_vanilla_keeps_the_function_at_full_rank_and_loses_more_when_cut(source: Path, tmp_path: Path) -> None:
    model = open_model(source)
    prune_model(model, tmp_path / "whole", Rule(ratio=0.0), method="vanilla")
    assert verify_models(model, open_model(tmp_path / "whole"), level="blocks").same
    errors = {}
    for method in ("svd", "vanilla"):
        prune_model(model, tmp_path / method, Rule(rank=5), method=method)
        heads = [d for d in compare(model, tmp_path / method).weights if d.where[-3:] in ("Q-K", "V-O")]
        errors[method] = sum(d.error**2 for d in heads)
    assert errors["svd"] < 0.9 * errors["vanilla"]


@pytest.mark.parametrize("name", ["whisper", "bert", "llama-biased"])
def test_negative_control_a_dropped_value_bias_is_caught(
    name: str, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verify must fail if the value bias is dropped instead of moved into the output bias."""
    right = pessa_cli.algebra.absorb.absorb

    def forgetful(weights: Any, *arguments: Any) -> Any:
        absorbed = right(weights, *arguments)
        return replace(absorbed, o_bias=weights.o_bias.double())

    model = open_model(tiny_folder(name))
    monkeypatch.setattr("pessa_cli.surgery.attention_block.absorb", forgetful)
    decompose_model(model, tmp_path / "out")
    report = verify_models(model, open_model(tmp_path / "out"))
    assert not report.same
    assert report.worst.where.endswith("output bias")
    assert report.outputs is not None
    assert report.outputs.error > 1e-2


def test_negative_control_a_wrong_rope_flag_is_caught(
    tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging Q-K despite RoPE must change the outputs far beyond any tolerance."""
    source = tiny_folder("llama")
    right = ARCHITECTURES["llama"]
    monkeypatch.setitem(ARCHITECTURES, "llama", tuple(replace(spec, rope=None) for spec in right))
    decompose_model(open_model(source), tmp_path / "out")
    monkeypatch.setitem(ARCHITECTURES, "llama", right)
    (tmp_path / "out" / "spectra.safetensors").unlink()  # its Q-K spectra would be refused
    report = verify_models(open_model(source), open_model(tmp_path / "out"))
    assert not report.same
    assert report.worst.error > 0.1
    assert report.outputs is not None
    assert report.outputs.error > 0.1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_weights_keep_their_dtype_and_lose_only_rounding(source: Path, tmp_path: Path, dtype: str) -> None:
    load(source).to(getattr(torch, dtype)).save_pretrained(tmp_path / "half")
    model = open_model(tmp_path / "half")
    decompose_model(model, tmp_path / "out")
    assert open_model(tmp_path / "out").reader.header == model.reader.header
    report = compare(model, tmp_path / "out")
    assert report.same
    assert 1e-5 < report.worst.error < {"float16": 1e-3, "bfloat16": 8e-3}[dtype]


def test_shards_are_read_and_written(source: Path, tmp_path: Path) -> None:
    load(source).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shards = {path.name for path in (tmp_path / "shards").glob("*.safetensors")}
    assert len(shards) > 2
    model = open_model(tmp_path / "shards")
    assert len(model.reader.files) == len(shards)
    prune_model(model, tmp_path / "out", Rule(rank=3), run=Run(shard_bytes=20_000))
    prune_model(open_model(source), tmp_path / "single", Rule(rank=3))
    files = open_model(tmp_path / "out").reader.files
    assert len(files) > 2
    assert all((tmp_path / "out" / file).stat().st_size < 30_000 for file in files)
    assert open_model(tmp_path / "out").reader.header == open_model(tmp_path / "single").reader.header
    assert distance(logits(load(tmp_path / "single")), logits(load(tmp_path / "out"))) < 1e-6


def test_other_blocks_are_copied_byte_for_byte(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = open_model(tiny_folder("whisper"))
    chosen = [site for site in model.attention if site.spec.kind == "decoder.cross" and site.layer == 1]
    prune_model(model, tmp_path / "out", Rule(rank=3), chosen)
    after = open_model(tmp_path / "out")
    for name in model.reader.header.keys() - chosen[0].tensors.keys():
        assert b"".join(model.reader.chunks(name)) == b"".join(after.reader.chunks(name))
    assert set(after.spectra) == {"decoder.cross.1"}


def test_the_softmax_scale_is_that_of_the_original_head_dim(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    prune_model(open_model(tiny_folder("whisper")), tmp_path / "out", Rule(rank=3))
    attention = load(tmp_path / "out").model.encoder.layers[0].self_attn
    assert attention.scaling == load(tiny_folder("whisper")).model.encoder.layers[0].self_attn.scaling == 8**-0.5
