"""Every row of the architecture table, tested on a tiny model of transformers' own class."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import tiny_models
import torch
import transformers
from harness import Pessa, edit_json, edit_weights, is_refusal

from pessa_cli.blocks.discover import KNOWN, specs_of
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.block_io import read_site, write_site
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model

EXACT = 1e-5


# Of each way in which attention is built one; the others are for `make test`.
FEW = ("whisper", "bert", "llama", "gemma2", "phi3 partial", "gpt2", "t5", "vit")
BY_TIER = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in tiny_models.TINIES]


@pytest.fixture(scope="module", params=BY_TIER)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    tiny_models.build(name).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def said(name: str, source: Path) -> torch.Tensor:
    return tiny_models.outputs(name, tiny.load(source))


def off(name: str, said: torch.Tensor, model: Any) -> float:
    """Return the largest difference between the outputs of a model and of the source."""
    return float((tiny_models.outputs(name, model) - said).norm() / said.norm())


def test_the_table_and_the_tiny_models_are_of_the_same_types() -> None:
    assert {name.partition(" ")[0] for name in tiny_models.TINIES} == set(KNOWN)
    assert set(FEW) <= set(tiny_models.TINIES)


def test_every_name_exists_and_every_tensor_round_trips_bit_for_bit(source: Path) -> None:
    model = open_model(source)
    specs = specs_of(model.reader.config, model.reader.header)
    assert {site.spec.kind for site in model.attention} == {spec.kind for spec in specs}
    for site in model.attention:
        written = write_site(read_site(model.reader, site), site, model.reader.header, "dense")
        assert written.keys() == site.tensors.keys()
        for tensor, value in written.items():
            assert torch.equal(value, model.reader.get(tensor)), tensor


def test_full_rank_changes_nothing(name: str, source: Path, said: torch.Tensor, tmp_path: Path) -> None:
    model = open_model(source)
    decompose_model(model, tmp_path / "out")
    assert changes(model, open_model(tmp_path / "out"))
    assert off(name, said, tiny.load(tmp_path / "out")) < EXACT
    level: Literal["weights", "blocks"] = "blocks"
    unfit = {"clip": "does not run on built-in", "siglip": "does not run on built-in", "wavlm": "weights of its output"}
    if name in unfit:  # the first two take an image and a text
        with pytest.raises(PessaError, match=unfit[name]):
            verify_models(model, open_model(tmp_path / "out"), level=level)
        level = "weights"
    report = verify_models(model, open_model(tmp_path / "out"), level=level, tolerance=1e-4)
    assert report.same, report.failures


def changes(model: Model, other: Model) -> bool:
    """Return whether the weights of every block have changed, without which equal outputs would prove nothing."""
    return all(
        any(not torch.equal(model.reader.get(tensor), other.reader.get(tensor)) for tensor in site.tensors)
        for site in model.attention
    )


def test_half_pruned_compact_and_dense_compute_the_same(
    name: str, source: Path, said: torch.Tensor, tmp_path: Path
) -> None:
    model = open_model(source)
    prune_model(model, tmp_path / "dense", Rule(ratio=0.5), layout="dense")
    dense = tiny_models.outputs(name, tiny.load(tmp_path / "dense"))
    assert float((dense - said).norm() / said.norm()) > EXACT  # directions were dropped
    if not all(site.spec.compact for site in model.attention):
        with pytest.raises(UsageError, match="reads its weight tensors directly"):
            prune_model(model, tmp_path / "compact", Rule(ratio=0.5))
        return
    prune_model(model, tmp_path / "compact", Rule(ratio=0.5))
    export_model(open_model(tmp_path / "compact"), tmp_path / "padded", "dense")
    padded, written = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("padded", "dense"))
    assert padded == written
    compact = tiny.load(tmp_path / "compact")
    assert off(name, dense, compact) < EXACT
    assert open_model(tmp_path / "compact").parameters < model.parameters
    compact.save_pretrained(tmp_path / "again")
    again = tiny.load(tmp_path / "again")
    assert off(name, dense, again) < EXACT
    assert verify_models(open_model(tmp_path / "dense"), open_model(tmp_path / "again"), level="weights").same
    if again.can_generate():
        given = {key: value for key, value in tiny_models.inputs(name).items() if not key.startswith("decoder")}
        options: dict[str, Any] = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 1}
        options["suppress_tokens"] = [*range(90, 100)]  # of images, which are not there
        cached, anew = (again.generate(**given, **options, use_cache=use) for use in (True, False))
        assert torch.equal(cached, anew)


def test_negative_control_half_as_many_heads(name: str, source: Path, said: torch.Tensor, tmp_path: Path) -> None:
    """With half as many heads, twice as wide, directions of two heads are mixed: the outputs must differ."""
    model = open_model(source)
    specs = specs_of(model.reader.config, model.reader.header)
    places = {(spec.config, key) for spec in specs for key in spec.heads}

    def halve(config: dict[str, Any]) -> None:
        for inner, key in places:
            part = config[inner] if inner else config
            if key in part:
                part[key] //= 2
            if part.get("num_key_value_heads"):
                part["num_key_value_heads"] = max(1, part["num_key_value_heads"] // 2)

    damaged = tmp_path / "damaged"
    tiny_models.build(name).save_pretrained(damaged)
    whole = (damaged / "config.json").read_bytes()
    edit_json(halve)(damaged)
    try:
        wrong = open_model(damaged)
    except PessaError:  # the shapes reveal the error
        return
    decompose_model(wrong, tmp_path / "out")
    (tmp_path / "out" / "config.json").write_bytes(whole)
    assert off(name, said, tiny.load(tmp_path / "out")) > 1e-3


def test_negative_control_a_wrong_flag(
    name: str, source: Path, said: torch.Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changing any flag of a row that matters for the model must change the outputs."""
    model = open_model(source)
    right = specs_of(model.reader.config, model.reader.header)

    def matters(field: str) -> bool:
        return field != "rope" or any(site.unmerged for site in model.attention)

    for field, wrong in (("rope", None), ("key_bias_stays", False), ("sums_to_one", True)):
        facts: dict[str, Any] = {"norms": (), "normed": False, "beside": ("*",), field: wrong}
        changed = tuple(replace(spec, **facts) for spec in right)
        if all(getattr(spec, field) == wrong for spec in right) or not matters(field):
            continue
        monkeypatch.setattr("pessa_cli.surgery.model.specs_of", lambda *_, changed=changed: changed)
        decompose_model(open_model(source), tmp_path / field)
        assert off(name, said, tiny.load(tmp_path / field)) > 1e-3, field


def test_the_command_lists_every_row(pessa: Pessa) -> None:
    table = pessa("architectures", "--markdown").out
    assert all(f"`{name}`" in table for name in KNOWN)
    rows = json.loads(pessa("architectures", "--json").out)
    assert [row["model_type"] for row in rows] == list(KNOWN)
    assert all(row["merges"] and row["mlps"] and row["checked"] and row["since"] for row in rows)
    assert {row["model_type"]: row["mlps"] for row in rows}["t5"]["encoder.mlp"] == "plain or gated"
    assert {line.count(" | ") for line in table.splitlines()} == {2, 0}  # 0 between heading and rows
    shown = pessa("architectures").out
    assert all(f"\n{name} " in shown for name in KNOWN)
    assert next(row for row in rows if row["model_type"] == "wavlm")["layouts"] == ["dense"]


HUB = {
    "llava": [("vision_tower.", "vision_tower.vision_model.")],
    "gemma3": [("vision_tower.", "vision_tower.vision_model."), ("language_model.model.", "model.language_model.")],
    "clip_vision_model": [("encoder.", "vision_model.encoder.")],
    "qwen2_vl": [("model.layers.", "model.language_model.layers.")],
    "gpt2": [("transformer.", "")],
    "vit": [("vit.", "")],
}


@pytest.mark.parametrize("name", HUB)
def test_files_with_other_prefixes_are_the_same_model(name: str, tmp_path: Path) -> None:
    tiny_models.build(name).save_pretrained(tmp_path / "ours")
    tiny_models.build(name).save_pretrained(tmp_path / "hub")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for old, new in HUB[name]:
            for key in [key for key in tensors if key.startswith(old)]:
                tensors[new + key.removeprefix(old)] = tensors.pop(key)

    edit_weights(rename)(tmp_path / "hub")
    ours, theirs = (open_model(tmp_path / folder) for folder in ("ours", "hub"))
    assert ours.reader.header.keys() != theirs.reader.header.keys()
    assert [site.name for site in ours.sites] == [site.name for site in theirs.sites]
    prune_model(theirs, tmp_path / "out", Rule(ratio=0.5))
    prune_model(ours, tmp_path / "same", Rule(ratio=0.5))
    said = tiny_models.outputs(name, tiny.load(tmp_path / "same"))
    assert off(name, said, tiny.load(tmp_path / "out")) < EXACT


def test_missing_keys_of_a_submodel_config_have_the_default_of_their_class(tmp_path: Path) -> None:
    """LLaVA's text_config does not give the number of heads; the default of LLaMA's config class applies."""
    tiny_models.build("llava").save_pretrained(tmp_path / "model")
    usual = {"hidden_size": 128, "num_key_value_heads": 32, "intermediate_size": 48, "num_attention_heads": 32}
    shape = tiny_models.TINIES["llava"][1]["text_config"] | usual
    kind = transformers.LlavaForConditionalGeneration
    config = tiny_models.TINIES["llava"][1] | {"text_config": shape}
    kind(kind.config_class(**config)).save_pretrained(tmp_path / "model")

    def silent(config: dict[str, Any]) -> None:
        del config["text_config"]["num_attention_heads"], config["text_config"]["num_key_value_heads"]

    edit_json(silent)(tmp_path / "model")
    assert {site.heads for site in open_model(tmp_path / "model").attention} == {32, 4}


def test_sites_choose_a_tower(tmp_path: Path, pessa: Pessa) -> None:
    tiny_models.build("llava").save_pretrained(tmp_path / "model")
    done = pessa("prune", tmp_path / "model", "-o", tmp_path / "out", "--sites", "vision.self", "--rank", "3", "--json")
    assert done.code == 0, done.err
    model, out = open_model(tmp_path / "model"), open_model(tmp_path / "out")
    for site, cut in zip(model.attention, out.attention, strict=True):
        assert (cut.qk_ranks == (3,) * 4) == (site.spec.kind == "vision.self")
    refused = pessa("prune", tmp_path / "model", "-o", tmp_path / "no", "--sites", "encoder.self", "--rank", "3")
    is_refusal(refused, "encoder.self", "text.self, vision.self", code=2)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("qwen3", "V-O (q_norm)"),
        ("deberta-v2 apart", "V-O (pos_key_proj)"),
        ("gptj", "Q-K but 4 of 8 (RoPE), V-O"),
        ("smollm3", "V-O (RoPE) | Q-K, V-O"),
        ("gpt2", "Q-K, V-O"),
    ],
)
def test_inspect_shows_what_merges(name: str, said: str, tmp_path: Path, pessa: Pessa) -> None:
    tiny_models.build(name).save_pretrained(tmp_path)
    shown = pessa("inspect", tmp_path)
    assert shown.code == 0, shown.err
    assert said in " ".join(shown.out.split())


@pytest.mark.parametrize("name", ["phi", "gptj", "phi3 partial"])
def test_rotated_directions_are_kept_and_rules_apply_to_the_others(name: str, tmp_path: Path) -> None:
    tiny_models.build(name).save_pretrained(tmp_path / "model")
    model = open_model(tmp_path / "model")
    decompose_model(model, tmp_path / "whole")
    for rule in (Rule(rank=2), Rule(target_attention=0.4), Rule(energy=0.9, round_to=2)):
        prune_model(model, tmp_path / f"{rule}", rule)
        prune_model(open_model(tmp_path / "whole"), tmp_path / f"sliced {rule}", rule)
        out, sliced = (open_model(tmp_path / folder) for folder in (f"{rule}", f"sliced {rule}"))
        for site, cut in zip(out.attention, sliced.attention, strict=True):
            assert min(site.qk_ranks) >= site.unmerged > 0
            assert (site.qk_ranks, site.vo_ranks) == (cut.qk_ranks, cut.vo_ranks)
            if rule.rank:
                assert set(site.qk_ranks) == {site.unmerged + 2}
        weights = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in (f"{rule}", f"sliced {rule}")]
        assert weights[0] == weights[1]


def test_clamped_values_are_refused(tmp_path: Path, pessa: Pessa) -> None:
    tiny_models.build("olmo").save_pretrained(tmp_path)
    edit_json(lambda config: config.update(clip_qkv=1.0))(tmp_path)
    is_refusal(pessa("inspect", tmp_path), "clip_qkv", "W_V and W_O")


def eager(folder: Path, train: bool = False) -> Any:
    model = tiny.load(folder, attn_implementation="eager")
    return model.train(train)


@pytest.mark.parametrize(
    ("name", "with_it", "without"),
    [
        ("gemma2", {"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 3}, {"query_pre_attn_scalar": 20}),
        ("mistral", {"sliding_window": 2}, {"sliding_window": None}),
        ("t5", {"relative_attention_max_distance": 20}, {"relative_attention_max_distance": 5}),
        ("llama", {"attention_dropout": 0.5}, {"attention_dropout": 0.0}),
    ],
    ids=lambda value: str(value),
)
def test_operations_on_scores_do_not_prevent_merging(
    name: str, with_it: dict[str, Any], without: dict[str, Any], tmp_path: Path
) -> None:
    """Caps, scales, windows, relative biases and dropout change the outputs, but the merged products stay exact."""
    train = "attention_dropout" in with_it

    def said(folder: str) -> torch.Tensor:
        torch.manual_seed(0)
        return tiny_models.outputs(name, eager(tmp_path / folder, train))

    for folder, more in (("with", with_it), ("without", without)):
        tiny_models.build(name, **more).save_pretrained(tmp_path / folder)
    decompose_model(open_model(tmp_path / "with"), tmp_path / "out")
    wanted = said("with")
    assert float((said("out") - wanted).norm() / wanted.norm()) < EXACT
    assert float((said("without") - wanted).norm() / wanted.norm()) > 1e-3
