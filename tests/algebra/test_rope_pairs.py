"""Pruning of Q-K by frequency pairs under RoPE: the choice of pairs, and the written models."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrating import files_of_inputs
from harness import Pessa, Real, TinyFolder, copy_of, edit_json, edit_weights, is_refusal, raw_tensors
from peft import get_peft_model
from sites import ranks_by
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from tuned import disturb

import pessa_cli
from pessa_cli.algebra.heads import live
from pessa_cli.blocks.compact_format import Ragged, pair_ranks, pairs_text, parse_pairs
from pessa_cli.calibration.collect import collect
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.plan import RankPlan, plan_ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra, largest_pairs
from pessa_cli.statistics.file import SavedStatistics
from pessa_cli.surgery.block_io import read_site, write_site
from pessa_cli.surgery.decomposition import measure
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.tuning.registry import build_config

NAMES = ("llama", "llama-biased")
CUT = Rule(rope_ratio=0.5, ratio=0.3)


def test_pairs_text_round_trips() -> None:
    pairs = largest_pairs(np.array([[9.0, 1, 8, 7], [1, 1, 1, 1], [0, 0, 0, 5]]), np.array([3, 2, 0]))
    assert pairs == ((range(0, 1), range(2, 4)), (range(0, 2),), ())
    assert pairs_text(pairs) == "0,2-3 0-1 none"
    assert parse_pairs("0,2-3 0-1 none") == pairs
    assert pair_ranks(pairs) == (6, 4, 0)
    ragged = Ragged.parse("q", "pairs 8: 0,2-3 0-1 none")
    assert str(ragged) == "pairs 8: 0,2-3 0-1 none"
    assert live(ragged.ranks, 8, pairs=ragged.pairs).tolist() == [0, 2, 3, 4, 6, 7, 8, 9, 12, 13]


@pytest.mark.parametrize(
    "text",
    ["", "0-3,", ",0", "3-1", "0-1,1", "0-1,2", "2,0", "0-0", "00", "0 ", " 0", "0  1", "none,0", "-1", "0-99999", "a"],
)
def test_malformed_pairs_are_refused(text: str) -> None:
    with pytest.raises(PessaError, match=r"config\.json"):
        Ragged.parse("q", f"pairs 8: {text}")


def test_malformed_entries_are_refused() -> None:
    for text in ("pairs 7: 0", "pairs 0: 0", "pairs 8:0", "pairs 8: 4", "pairs 99999999: 0", "pairs 8"):
        with pytest.raises(PessaError, match=r"config\.json"):
            Ragged.parse("q", text)
    huge = Ragged.parse(
        "q", "pairs 99998: " + " ".join(["0-49998"] * 1000)
    )  # the parsed value is no larger than its text
    assert huge.ranks[0] == 99998


def test_the_smallest_pairs_of_all_blocks_are_dropped(tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("llama"))
    spectra = measure(model, model.attention)

    def kept(**rule: Any) -> RankPlan:
        return plan_ranks(model.attention, spectra, Rule(**rule))

    plan = kept(rope_ratio=0.4)
    worth = np.stack(
        [s for site in model.attention if (s := spectra[site.name].pairs) is not None]
    )  # (layers, G, pairs)
    worth = worth / worth.sum(-1, keepdims=True)
    threshold = np.sort(worth.ravel())[6]
    for layer, site in enumerate(model.attention):
        for head, runs in enumerate(plan.kept(site).pairs or ()):
            assert [p for run in runs for p in run] == np.flatnonzero(worth[layer, head] >= threshold).tolist()
    assert sum(sum(ranks) for ranks in ranks_by(plan, "qk").values()) == 20
    assert kept(rope_ratio=0.05).pairs == kept(rank=3).pairs == {}
    assert min(rank for ranks in ranks_by(kept(rope_ratio=0.9, min_rank=3), "qk").values() for rank in ranks) == 4
    assert {rank % 4 for ranks in ranks_by(kept(rope_ratio=0.4, round_to=4), "qk").values() for rank in ranks} == {0}
    nothing = {name: replace(known, pairs=np.zeros((2, 4))) for name, known in spectra.items()}
    assert plan_ranks(model.attention, nothing, Rule(rope_ratio=0.0)).ranks["decoder.self.0"]["qk"] == (0, 0)


def test_without_rope_there_are_no_pairs(tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("bert"))
    with pytest.raises(UsageError, match="--rope-ratio"):
        plan_ranks(model.attention, measure(model, model.attention), Rule(rope_ratio=0.5))
    assert isinstance(measure(model, model.attention)[model.attention[0].name], Spectra)


def zeroed(tensors: dict[str, Tensor]) -> None:
    """Set pairs 1 and 2 of every head to zero, in queries and keys."""
    for name, tensor in tensors.items():
        if "q_proj" in name or "k_proj" in name:
            rows = tensor.view(-1, 2, len(tensor) // (4 if "q_proj" in name else 2) // 2, *tensor.shape[1:])
            rows[:, :, 1:3] = 0


@pytest.mark.parametrize("name", NAMES)
def test_zero_pairs_are_dropped_exactly(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder(name), tmp_path / "zero")
    edit_weights(zeroed)(folder)
    written = prune_model(open_model(folder), tmp_path / "out", Rule(rope_ratio=0.0))
    half = written.sites[0].seam("qk").width // 2
    assert set(ranks_by(written.ranks, "qk").values()) == {(2 * half - 4, 2 * half - 4)}
    assert tiny.close(tiny.load(folder), tiny.load(tmp_path / "out"), 1e-6)
    assert verify_models(open_model(folder), open_model(tmp_path / "out")).failures == []


@pytest.mark.parametrize("name", NAMES)
def test_compact_equals_dense_and_other_pairs_do_not(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = open_model(tiny_folder(name))
    written = prune_model(model, tmp_path / "compact", CUT)
    prune_model(model, tmp_path / "dense", CUT, layout="dense")
    compact, dense = tiny.load(tmp_path / "compact"), tiny.load(tmp_path / "dense")
    assert tiny.close(compact, dense)
    assert not tiny.close(compact, tiny.load(tiny_folder(name)))
    report = verify_models(open_model(tmp_path / "dense"), open_model(tmp_path / "compact"))
    assert report.failures == []
    # The negative control: the same weights at other frequencies are a valid file but another model.
    half = written.sites[0].seam("qk").width // 2

    def mirrored(content: dict[str, Any]) -> None:
        modules = content["quantization_config"]["modules"]
        for module in modules:
            entry = Ragged.parse(module, modules[module])
            if entry.pairs is not None:
                pairs = tuple(tuple(range(half - r.stop, half - r.start) for r in runs[::-1]) for runs in entry.pairs)
                modules[module] = str(Ragged.of_pairs(2 * half, pairs))

    wrong = copy_of(tmp_path / "compact", tmp_path / "wrong")
    edit_json(mirrored)(wrong)
    assert not tiny.close(tiny.load(wrong), dense, 1e-2)
    assert not verify_models(open_model(tmp_path / "dense"), open_model(wrong), "weights").same


@pytest.mark.parametrize("name", NAMES)
def test_both_layouts_convert_into_each_other(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = open_model(tiny_folder(name))
    prune_model(model, tmp_path / "compact", CUT)
    prune_model(model, tmp_path / "dense", CUT, layout="dense")
    export_model(open_model(tmp_path / "compact"), tmp_path / "to-dense", "dense")
    export_model(open_model(tmp_path / "dense"), tmp_path / "to-compact", "compact")
    for made, original in (("to-dense", "dense"), ("to-compact", "compact")):
        assert raw_tensors(tmp_path / made) == raw_tensors(tmp_path / original)
        assert json.loads((tmp_path / made / "config.json").read_text()) == json.loads(
            (tmp_path / original / "config.json").read_text()
        )
    compact = open_model(tmp_path / "compact")
    for site in compact.attention:  # bit for bit the weights that were read
        read = read_site(compact.reader, site)
        for tensor, stored in write_site(read, site, compact.reader.header, "compact").items():
            assert torch.equal(stored, compact.reader.get(tensor))


@pytest.mark.parametrize("layout", ["compact", "dense"])
def test_pruned_again(layout: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Dropped pairs stay dropped, more can be dropped, and without --rope-ratio all stored pairs are kept."""
    first = prune_model(open_model(tiny_folder("llama")), tmp_path / "first", CUT, layout=layout)  # type: ignore[arg-type]
    model = open_model(tmp_path / "first")
    same = prune_model(model, tmp_path / "same", Rule(rope_ratio=0.25))
    assert same.ranks.pairs == first.ranks.pairs
    assert tiny.close(tiny.load(tmp_path / "same"), tiny.load(tmp_path / "first"))
    less = prune_model(model, tmp_path / "less", Rule(rope_ratio=0.75))
    assert sum(sum(ranks) for ranks in ranks_by(less.ranks, "qk").values()) == 8
    for name, pairs in less.ranks.pairs.items():
        for now, before in zip(pairs, first.ranks.pairs[name], strict=True):
            assert {p for run in now for p in run} <= {p for run in before for p in run}
    as_it_is = prune_model(model, tmp_path / "as-it-is", Rule(rank=4))
    assert as_it_is.ranks.pairs == (first.ranks.pairs if layout == "compact" else {})
    decompose_model(model, tmp_path / "full")
    assert tiny.close(tiny.load(tmp_path / "full"), tiny.load(tmp_path / "first"))
    sliced = prune_model(open_model(tmp_path / "full"), tmp_path / "sliced", Rule(rope_ratio=0.75))
    assert sliced.ranks.pairs == less.ranks.pairs


def test_saved_loaded_and_generating(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    assert pessa_cli
    prune_model(open_model(tiny_folder("llama")), tmp_path / "compact", CUT)
    prune_model(open_model(tiny_folder("llama")), tmp_path / "dense", CUT, layout="dense")
    compact, dense = tiny.load(tmp_path / "compact"), tiny.load(tmp_path / "dense")
    compact.save_pretrained(tmp_path / "again")
    again = tiny.load(tmp_path / "again")
    ids = tiny.inputs(dense)["input_ids"][:1]
    for other in (compact, again):
        for cache in (True, False):
            options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "use_cache": cache}
            assert torch.equal(other.generate(ids, **options), dense.generate(ids, **options))
    export_model(open_model(tmp_path / "again"), tmp_path / "back", "dense")
    assert raw_tensors(tmp_path / "back") == raw_tensors(tmp_path / "dense")


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("q_proj", "pairs 8: 0-1 0-1 0-1 0-1"),  # differs from the entry of the keys
        ("q_proj", "rows 8: 4 4 4 4"),
        ("k_proj", "pairs 8: 0-1"),
        ("k_proj", "pairs 8: 0-7 0-1"),
        ("k_proj", "pairs 8: 1,0 0-1"),
        ("v_proj", "pairs 8: 0-1 0-1"),
    ],
)
def test_contradictory_pairs_in_config_are_refused(
    module: str, text: str, tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa
) -> None:
    prune_model(open_model(tiny_folder("llama")), tmp_path / "out", Rule(rope_ratio=0.5, rank=4))
    name = f"model.layers.1.self_attn.{module}"

    def change(content: dict[str, Any]) -> None:
        modules = content["quantization_config"]["modules"]
        assert modules[name] != text
        modules[name] = text

    edit_json(change)(tmp_path / "out")
    is_refusal(pessa("inspect", tmp_path / "out"), "layers.1.self_attn")


def test_ranks_of_rotated_heads_and_pairs_of_others_are_refused(
    tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa
) -> None:
    prune_model(open_model(tiny_folder("llama")), tmp_path / "llama", Rule(rope_ratio=0.5))
    edit_json(lambda c: _replace(c, "rows 8:", " 4"))(tmp_path / "llama")
    is_refusal(pessa("inspect", tmp_path / "llama"), "heads with RoPE need frequency pairs")
    prune_model(open_model(tiny_folder("bert")), tmp_path / "bert", Rule(rank=4))
    edit_json(lambda c: _replace(c, "pairs 8:", " 0-1"))(tmp_path / "bert")
    is_refusal(pessa("inspect", tmp_path / "bert"), "only heads with RoPE have")


def _replace(content: dict[str, Any], start: str, head: str) -> None:
    modules = content["quantization_config"]["modules"]
    for name in modules:
        if name.endswith(("q_proj", "k_proj", "query", "key")):
            modules[name] = start + head * (2 if name.endswith("k_proj") else 4)


@pytest.mark.parametrize("pairs", ["0-1", "0-1 0-9", "x", 3, "0 0"])
def test_a_manifest_with_other_pairs_is_refused(
    pairs: object, tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa
) -> None:
    prune_model(open_model(tiny_folder("llama")), tmp_path / "out", CUT, layout="dense")
    edit_json(lambda c: c["ranks"]["decoder.self.0"].update(pairs=pairs), "pessa.json")(tmp_path / "out")
    is_refusal(pessa("export", tmp_path / "out", "-o", tmp_path / "x", "--layout", "compact"), "pessa.json")


def tokens(seed: int) -> Tensor:
    return torch.randint(5, 90, (1, 40), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return files that stand for eight inputs, since the tiny model has no tokenizer."""

    def encode(_model: Any, seed: int) -> Inputs:
        return {"input_ids": tokens(seed), "attention_mask": torch.ones(1, 40, dtype=torch.long)}

    return files_of_inputs(tmp_path, monkeypatch, encode, 8)


def first_block(folder: Path) -> Tensor:
    """Return the outputs of the first attention block for the calibration data."""
    model, found = tiny.load(folder), []
    model.model.layers[0].self_attn.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
    with torch.no_grad():
        for seed in range(8):
            model(input_ids=tokens(seed))
    return torch.cat(found)


@pytest.mark.parametrize("name", NAMES)
def test_calibrated_pairs_reduce_the_error(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    model = open_model(folder)
    collect(model, model.attention, data, tmp_path / "s")
    found = SavedStatistics(tmp_path / "s")
    rule = Rule(rope_ratio=0.25)
    prune_model(model, tmp_path / "plain", rule, model.attention)
    written = prune_model(model, tmp_path / "calibrated", rule, model.attention, statistics=found)
    prune_model(model, tmp_path / "dense", rule, model.attention, statistics=found, layout="dense")
    assert written.method == "calibrated"
    calibrated, plain, original = (first_block(f) for f in (tmp_path / "calibrated", tmp_path / "plain", folder))
    assert (calibrated - original).norm() < (plain - original).norm()
    assert tiny.close(tiny.load(tmp_path / "calibrated"), tiny.load(tmp_path / "dense"))
    export_model(open_model(tmp_path / "calibrated"), tmp_path / "back", "dense")
    assert raw_tensors(tmp_path / "back") == raw_tensors(tmp_path / "dense")
    collect(model, model.attention, data, tmp_path / "s2", Rule(rope_ratio=0.5, rank=4))  # calibrated with --sequential
    assert SavedStatistics(tmp_path / "s2").of(model.attention[1]).pairs.isfinite().all()


def test_on_the_command_line(tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa) -> None:
    folder, out = tiny_folder("llama"), tmp_path / "out"
    shown = pessa("inspect", folder, "--rope-ratio", "0.5")
    assert "Q-K pairs" in shown.out
    assert "rope_ratio 0.5" in shown.out
    document = json.loads(pessa("inspect", folder, "--rope-ratio", "0.5", "--json").out)
    assert document["totals"]["qk_pruned"] == 0.5
    assert np.array(document["blocks"][0]["seams"]["qk"]["pairs"]).shape == (2, 4)
    assert pessa("prune", folder, "-o", out, "--rope-ratio", "0.5", "--rank", "4").code == 0
    manifest = json.loads((out / "pessa.json").read_text())
    assert sum(int(rank) for ranks in manifest["ranks"].values() for rank in ranks["qk"].split()) == 16
    assert parse_pairs(manifest["ranks"]["decoder.self.0"]["pairs"]) is not None
    assert "50.00% of Q-K" in (out / "README.md").read_text()
    assert pessa("verify", out, out, "--level", "blocks").code == 0
    assert pessa("verify", folder, out, "--level", "weights").code == 1
    is_refusal(pessa("prune", folder, "-o", out, "--rope-ratio", "1", "--force"), "--rope-ratio", code=2)
    is_refusal(pessa("inspect", tiny_folder("bert"), "--rope-ratio", "0.5"), "--rope-ratio", code=2)
    recipe = tmp_path / "r.toml"
    recipe.write_text("[prune]\nrope_ratio = 0.5\nrank = 4\n")
    assert pessa("run", recipe, folder, "-o", tmp_path / "run").code == 0
    assert raw_tensors(tmp_path / "run") == raw_tensors(out)


@pytest.mark.parametrize(
    ("method", "targets"), [("sorsa", None), ("pessa", ["v_proj"]), ("svft", ["q_proj", "k_proj"])]
)
def test_tuned_and_merged(
    method: str, targets: list[str] | None, tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa
) -> None:
    """An adapter rotates only kept pairs, and merging it into a compact model gives a compact model."""
    prune_model(open_model(tiny_folder("llama")), tmp_path / "out", CUT)
    torch.manual_seed(0)
    model = get_peft_model(tiny.load(tmp_path / "out"), build_config(method, None if method == "pessa" else 4, targets))
    disturb(model)
    model.save_pretrained(tmp_path / "adapter")
    assert pessa("merge", tmp_path / "out", tmp_path / "adapter", "-o", tmp_path / "merged").code == 0
    merged = tiny.load(tmp_path / "merged")
    assert tiny.close(model.eval(), merged)
    assert not tiny.close(tiny.load(tmp_path / "out"), merged, 1e-4)
    export_model(open_model(tmp_path / "merged"), tmp_path / "dense", "dense")
    assert tiny.close(tiny.load(tmp_path / "dense"), merged)


def test_pessa_does_not_tune_queries_and_keys_pruned_by_pairs(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    prune_model(open_model(tiny_folder("llama")), tmp_path / "out", CUT)
    with pytest.raises(ValueError, match="target only v_proj"):
        get_peft_model(tiny.load(tmp_path / "out"), build_config("pessa", None, None))


def test_export_formats_of_other_programs_are_refused(tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa) -> None:
    prune_model(open_model(tiny_folder("llama")), tmp_path / "out", CUT)
    for to, name in (("onnx", "x"), ("openai-whisper", "x.pt")):
        is_refusal(pessa("export", tmp_path / "out", "-o", tmp_path / name, "--to", to), "llama")


@pytest.mark.skipif(not os.environ.get("PESSA_DATA"), reason="PESSA_DATA names no folder with text/wikitext2-valid.txt")
def test_smollm2_loses_little_without_a_tenth_of_its_pairs(real: Real, tmp_path: Path) -> None:
    source = real("smollm2-135m")
    text = (Path(os.environ["PESSA_DATA"]) / "text" / "wikitext2-valid.txt").read_text()
    (tmp_path / "last.txt").write_text(text[-6_000:])
    model = open_model(source)
    collect(model, model.attention, [tmp_path / "last.txt"], tmp_path / "s")
    rule, found = Rule(rope_ratio=0.1), SavedStatistics(tmp_path / "s")
    prune_model(model, tmp_path / "plain", rule, model.attention)
    prune_model(model, tmp_path / "calibrated", rule, model.attention, statistics=found)
    ids = AutoTokenizer.from_pretrained(source)(text[:6_000], return_tensors="pt").input_ids[:, :512]

    def loss(folder: Path) -> float:
        loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.inference_mode():
            return float(loaded(input_ids=ids, labels=ids).loss)

    losses = [loss(folder) for folder in (source, tmp_path / "calibrated", tmp_path / "plain")]
    assert losses[1] < losses[0] + 0.05
    assert losses[1] < losses[2]
