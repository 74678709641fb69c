"""The MLPs of every row of the architecture table, cut in a tiny model of transformers' own class."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import torch
from harness import copy_of, edit_json, edit_weights
from mlps import ROUTED, mlps_of, saved, without_channels

from pessa_cli.blocks.mlp_discover import mlp_specs_of
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_table import MLPS
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.checkpoint.manifest import MANIFEST_FILE
from pessa_cli.common.errors import UsageError
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.block_io import read_site, write_site
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import decompose_model, prune_model

EXACT = 1e-5
HALF = Rule(mlp_ratio=0.5)
# Of each way in which an MLP is built one: plain, after a norm, gated, gated in one tensor, with transposed weights,
# beside attention, shared by all layers, and gated or not by the config. The others are for `make test`.
FEW = ("whisper", "bert", "llama", "phi3 partial", "gpt2", "gptj", "albert", "mt5")
BY_TIER = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in tiny_models.TINIES]
ONE_BY_ONE = ("clip", "siglip", "wavlm")  # their blocks do not run on built-in inputs, see test_architectures


@pytest.fixture(scope="module", params=BY_TIER)
def name(request: pytest.FixtureRequest) -> str:
    if request.param in ROUTED:
        pytest.skip("all of its MLPs are routed experts")
    return str(request.param)


@pytest.fixture(scope="module")
def source(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(name, tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def said(name: str, source: Path) -> torch.Tensor:
    return tiny_models.outputs(name, tiny.load(source))


@pytest.fixture(scope="module")
def compact(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model with half of the channels of each MLP, and attention as it was."""
    out, model = tmp_path_factory.mktemp("compact") / "out", open_model(source)
    prune_model(model, out, HALF, [*mlps_of(model)])
    return out


def off(name: str, expected: torch.Tensor, model: Any) -> float:
    """Return how far the outputs of a model are from others, relative to them."""
    return float((tiny_models.outputs(name, model) - expected).norm() / expected.norm())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def numbers(folder: Path) -> dict[str, list[int]]:
    """Return the original numbers of the stored channels of each MLP, as pessa.json has them."""
    texts = json.loads((folder / MANIFEST_FILE).read_text())["channels"]
    return {site: [int(number) for number in text.split()] for site, text in texts.items()}


def test_the_table_has_the_mlps_of_every_layer_with_attention(source: Path) -> None:
    model = open_model(source)
    specs = mlp_specs_of(model.reader.config)
    assert {site.kind for site in mlps_of(model)} == {spec.kind for spec in specs if spec.out}
    layers: dict[str, set[int]] = {}
    for site in model.attention:  # each layer has self-attention or, in Mllama, cross-attention in place of it
        stack, _, kind = site.kind.partition(".")
        layers.setdefault(f"{stack}.{'global_mlp' if kind == 'global' else 'mlp'}", set()).add(site.layer)
    found: dict[str, set[int]] = {}
    for mlp in mlps_of(model):
        found.setdefault(mlp.kind, set()).add(mlp.layer)
    assert found == layers
    # What is in no block are embeddings, norms and heads: no matrix that is repeated in each layer.
    owned = {tensor for site in model.sites for tensor in site.tensors}
    assert len(owned) == sum(len(site.tensors) for site in model.sites)


def test_every_tensor_of_an_mlp_round_trips_bit_for_bit(source: Path, compact: Path) -> None:
    for model in (open_model(source), open_model(compact)):
        for site in mlps_of(model):
            written = write_site(read_site(model.reader, site), site, model.reader.header, "compact")
            assert written.keys() == site.tensors.keys()
            for tensor, value in written.items():
                assert torch.equal(value, model.reader.get(tensor)), tensor


def test_full_width_changes_nothing(name: str, source: Path, said: torch.Tensor, tmp_path: Path) -> None:
    model = open_model(source)
    decompose_model(model, tmp_path / "out", [*mlps_of(model)])
    out = open_model(tmp_path / "out")
    order = numbers(tmp_path / "out")
    for site in mlps_of(model):
        assert sorted(order[site.name]) == [*range(site.width)] != order[site.name]
        ours, theirs = (own.reader.get(f"{site.out}.weight") for own in (model, out))
        places = torch.tensor(order[site.name])
        assert torch.equal(ours.index_select(0 if site.spec.transposed else 1, places), theirs)
    assert off(name, said, tiny.load(tmp_path / "out")) < EXACT
    report = verify_models(model, out, level="weights" if name in ONE_BY_ONE else "blocks")
    assert report.same, report.failures
    assert report.weights
    # Negative control: with the numbers of two channels exchanged, other channels would be compared.
    first = mlps_of(model)[0].name

    def exchange(manifest: dict[str, Any]) -> None:
        swapped = [order[first][1], order[first][0], *order[first][2:]]
        manifest["channels"][first] = " ".join(map(str, swapped))

    edit_json(exchange, MANIFEST_FILE)(tmp_path / "out")
    wrong = verify_models(model, open_model(tmp_path / "out"), level="weights")
    assert not wrong.same
    assert any(first in failure for failure in wrong.failures)


def test_half_of_the_channels_compute_the_same_in_both_layouts(
    name: str, source: Path, said: torch.Tensor, compact: Path, tmp_path: Path
) -> None:
    model, cut = open_model(source), open_model(compact)
    kept = numbers(compact)
    lost = {site: torch.tensor(sorted({*range(site.width)} - {*kept[site.name]})) for site in mlps_of(model)}
    gone = {site.name: (site.width - len(kept[site.name]), site.width // 2) for site in mlps_of(model)}
    assert all(cut_channels == half for cut_channels, half in gone.values()), gone
    # The original without these channels, made without pessa's code for cutting.
    same, other = (copy_of(source, tmp_path / folder) for folder in ("same", "other"))
    for site, channels in lost.items():
        edit_weights(without_channels(site, channels))(same)
        edit_weights(without_channels(site, torch.tensor(kept[site.name])))(other)
    zeroed = tiny.load(same)
    expected = tiny_models.outputs(name, zeroed)
    assert float((expected - said).norm() / said.norm()) > 1e-2
    narrow = tiny.load(compact)
    assert off(name, expected, narrow) < EXACT
    assert off(name, expected, tiny.load(other)) > 1e-2  # negative control: the other half of the channels
    # Dense and back: zeros at the right places, and the same bytes.
    prune_model(model, tmp_path / "dense", HALF, [*mlps_of(model)], layout="dense")
    export_model(cut, tmp_path / "padded", "dense")
    assert weights(tmp_path / "padded") == weights(tmp_path / "dense")
    assert off(name, expected, tiny.load(tmp_path / "dense")) < EXACT
    export_model(open_model(tmp_path / "padded"), tmp_path / "compact", "compact")
    assert weights(tmp_path / "compact") == weights(compact)
    assert numbers(tmp_path / "compact") == kept
    # Saved again by transformers, and running in its own code with narrower modules.
    narrow.save_pretrained(tmp_path / "again")
    again = tiny.load(tmp_path / "again")
    assert off(name, expected, again) < EXACT
    stored = open_model(tmp_path / "again")
    sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (zeroed, narrow, again)]
    assert sizes[1] == sizes[2] == sizes[0] - (model.parameters - cut.parameters) < sizes[0]
    assert stored.parameters == cut.parameters
    assert {site.name: site.kept for site in mlps_of(stored)} == {site: len(each) for site, each in kept.items()}
    if again.can_generate():
        given = {key: value for key, value in tiny_models.inputs(name).items() if not key.startswith("decoder")}
        options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": 1}
        options["suppress_tokens"] = [*range(90, 100)]  # of images, which are not there
        texts = [each.generate(**given, **options) for each in (again, tiny.load(tmp_path / "dense"))]
        assert torch.equal(texts[0], texts[1])


def test_pruning_a_decomposed_or_pruned_folder(
    name: str, source: Path, said: torch.Tensor, compact: Path, tmp_path: Path
) -> None:
    model = open_model(source)
    decompose_model(model, tmp_path / "decomposed", [*mlps_of(model)])
    ordered = open_model(tmp_path / "decomposed")
    prune_model(ordered, tmp_path / "sliced", HALF, [*mlps_of(ordered)])
    assert weights(tmp_path / "sliced") == weights(compact)
    assert numbers(tmp_path / "sliced") == numbers(compact)
    # Pruned further: a quarter of the channels remain, the same as from the original.
    quarter, half = Rule(mlp_ratio=0.75), open_model(compact)
    prune_model(half, tmp_path / "further", quarter, [*mlps_of(half)])
    prune_model(model, tmp_path / "at once", quarter, [*mlps_of(model)])
    assert weights(tmp_path / "further") == weights(tmp_path / "at once") != weights(compact)
    assert numbers(tmp_path / "further") == numbers(tmp_path / "at once")
    assert off(name, said, tiny.load(tmp_path / "further")) > 1e-2
    # A wider rule cannot bring channels back.
    fourth = open_model(tmp_path / "further")
    prune_model(fourth, tmp_path / "wider", HALF, [*mlps_of(fourth)])
    assert weights(tmp_path / "wider") == weights(tmp_path / "further")


def test_attention_and_mlps_share_a_budget(name: str, source: Path, said: torch.Tensor, tmp_path: Path) -> None:
    if name not in FEW:
        pytest.skip("what is shared is tested on the ways of building an MLP, not on every architecture")
    model = open_model(source)
    rule = Rule(target_layers=0.7)
    if not all(site.compact for site in model.sites):
        with pytest.raises(UsageError, match="reads its weight tensors directly"):
            prune_model(model, tmp_path / "compact", rule)
        return
    prune_model(model, tmp_path / "compact", rule)
    out = open_model(tmp_path / "compact")
    before, after = (
        sum(reader.header[t].count for site in own.sites for t in site.tensors)
        for own in (model, out)
        for reader in [own.reader]
    )
    assert 0.6 < after / before <= 0.7
    cut = {type(site) for site in out.sites if site.ranks != site.in_full().ranks}
    assert MlpSite in cut
    assert AttentionSite in cut or name not in FEW
    export_model(out, tmp_path / "dense", "dense")
    dense = tiny_models.outputs(name, tiny.load(tmp_path / "dense"))
    assert off(name, dense, tiny.load(tmp_path / "compact")) < EXACT
    assert float((dense - said).norm() / said.norm()) > EXACT
    prune_model(model, tmp_path / "uniform", Rule(target_layers=0.7, uniform=True, round_to=4))
    widths: dict[tuple[str, str], set[int]] = {}
    for site in open_model(tmp_path / "uniform").sites:
        for seam in site.seams:
            widths.setdefault((site.kind, seam.name), set()).update(seam.ranks)
    assert all(len(own) == 1 for own in widths.values()), widths
    assert all(width % 4 == 0 for (_, seam), (width,) in widths.items() if seam == "mlp"), widths


def test_the_table_has_a_row_for_each_model_type() -> None:
    """Of each form of MLP the fast tier has one; the others are for `make test`."""
    forms = {(spec.form, spec.transposed) for rows in MLPS.values() for spec in rows if spec.out}
    fast = {(spec.form, spec.transposed) for name in FEW for spec in MLPS[name.partition(" ")[0]]}
    assert forms == fast
    assert {name for name, rows in MLPS.items() if not any(spec.out for spec in rows)} == {*ROUTED}


@pytest.mark.parametrize("name", ROUTED)
def test_routed_experts_are_copied_and_said_to_be(name: str, tmp_path: Path) -> None:
    model = open_model(saved(name, tmp_path / "model"))
    assert not mlps_of(model)
    prune_model(model, tmp_path / "out", Rule(target_layers=0.7))
    out = open_model(tmp_path / "out")
    experts = [tensor for tensor in model.reader.header if "experts" in tensor]
    assert experts
    assert all(torch.equal(model.reader.get(tensor), out.reader.get(tensor)) for tensor in experts)
    assert all("copied" in spec.form for spec in mlp_specs_of(model.reader.config))
    with pytest.raises(UsageError, match="--mlp-ratio: no MLP is among the chosen blocks"):
        prune_model(model, tmp_path / "no", HALF, model.sites)
