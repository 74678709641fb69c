"""Cutting MLPs: which channels a rule keeps, in which blocks, what calibration adds, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import torch
from calibrating import batches
from harness import Pessa, Tensors, copy_of, edit_weights, is_refusal
from mlps import mlps_of, saved, strong
from safetensors.torch import load_file, save_file
from torch import Tensor

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.calibration.collect import collect
from pessa_cli.checkpoint.manifest import MANIFEST_FILE
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.models.load import load
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import SavedStatistics, Statistics
from pessa_cli.statistics.sums import MlpStatistics, input_moment
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.spectra_file import SPECTRA_FILE

HALF = Rule(mlp_ratio=0.5)
WHISPER = ("encoder.self", "encoder.mlp", "decoder.self", "decoder.cross", "decoder.mlp")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("whisper")`: the folder of a tiny model with strong MLPs; copy it before changing it."""
    folder, known = tmp_path_factory.mktemp("made"), dict[str, Path]()

    def get(name: str) -> Path:
        if name not in known:
            known[name] = folder / name
            strong(tiny.save(name, folder / name)) if name in tiny.NAMES else saved(name, folder / name)
        return known[name]

    return get


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / MANIFEST_FILE).read_text())
    return content


def numbers(folder: Path, site: MlpSite) -> Tensor:
    """Return the original numbers of the channels that a folder stores of an MLP."""
    return torch.tensor([int(number) for number in manifest(folder)["channels"][site.name].split()])


def matrices(model: Model, site: MlpSite) -> tuple[list[Tensor], Tensor]:
    """Return the rows that write each channel, with their biases, and the columns that read it, in float64."""
    header, rows = model.reader.header, []
    for module in site.into:
        weight = model.reader.get(f"{module}.weight").double()
        weight = weight.T if site.spec.transposed else weight
        if f"{module}.bias" in header:
            weight = torch.cat([weight, model.reader.get(f"{module}.bias").double().unsqueeze(1)], 1)
        rows += list(weight.chunk(site.spec.parts))
    out = model.reader.get(f"{site.out}.weight").double()
    return rows, out.T if site.spec.transposed else out


def worth(model: Model, site: MlpSite) -> Tensor:
    """Return the product of the norms of the vectors of each channel."""
    rows, out = matrices(model, site)
    value: Tensor = out.norm(dim=0)
    for each in rows:
        value = value * each.norm(dim=1)
    return value


# --- which channels


@pytest.mark.parametrize("name", ["whisper", "llama", "gpt2", "phi3"])
def test_the_channels_with_the_largest_norms_are_kept(name: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(made(name))
    sites = mlps_of(model)
    values = {site.name: worth(model, site) for site in sites}
    threshold = float(torch.cat([*values.values()]).median())
    for rule, widths in (
        (Rule(mlp_ratio=0.3), {site.name: site.width - int(0.3 * site.width) for site in sites}),
        (Rule(mlp_rank=5), {site.name: 5 for site in sites}),
        (Rule(mlp_thr=threshold), {site.name: int((values[site.name] > threshold).sum()) for site in sites}),
        (Rule(mlp_rank=5, round_to=16), {site.name: 16 for site in sites}),
        (Rule(mlp_rank=41, round_to=32), {site.name: min(64, site.width) for site in sites}),
    ):
        out = tmp_path / str(rule)
        prune_model(model, out, rule, [*sites])
        assert {site.name: site.kept for site in mlps_of(open_model(out))} == widths
        for site in sites:
            best = values[site.name].argsort(descending=True)[: widths[site.name]]
            assert torch.equal(numbers(out, site), best)
    assert len({*widths.values()}) == 1


def test_a_threshold_gives_each_mlp_its_own_width(made: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_of(made("llama"), tmp_path / "model")
    edit_weights(lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][:30].mul_(0.01))(source)
    model = open_model(source)
    least = float(torch.cat([worth(model, site) for site in mlps_of(model)]).sort().values[31])
    prune_model(model, tmp_path / "out", Rule(mlp_thr=least), [*mlps_of(model)])
    out = open_model(tmp_path / "out")
    assert len({site.kept for site in mlps_of(out)}) == 2
    assert tiny.close(tiny.load(tmp_path / "out"), tiny.load(source), 0.2)


# --- in which blocks


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        (("--target-layers", "0.8"), WHISPER),
        (("--target-params", "0.9"), WHISPER),
        (("--target-size", "150kB"), WHISPER),
        (("--target-attention", "0.8"), ("encoder.self", "decoder.self", "decoder.cross")),
        (("--ratio", "0.2"), ("encoder.self", "decoder.self", "decoder.cross")),
        ((), ("encoder.self", "decoder.self", "decoder.cross")),
        (("--mlp-ratio", "0.2"), ("encoder.mlp", "decoder.mlp")),
        (("--mlp-ratio", "0.2", "--rank", "3"), WHISPER),
        (("--mlp-ratio", "0.2", "--sites", "encoder"), ("encoder.self", "encoder.mlp")),
        (("--target-layers", "0.8", "--sites", "encoder.mlp"), ("encoder.mlp",)),
        (("--target-layers", "0.8", "--sites", "mlp"), ("encoder.mlp", "decoder.mlp")),
        (("--target-layers", "0.8", "--sites", "attention"), ("encoder.self", "decoder.self", "decoder.cross")),
        (("--target-layers", "0.8", "--sites", "all"), WHISPER),
        (("--target-layers", "0.8", "--sites", "decoder,encoder.mlp"), WHISPER[1:]),
    ],
    ids=lambda value: " ".join(value),
)
def test_sites(
    options: tuple[str, ...], kinds: tuple[str, ...], made: Callable[[str], Path], tmp_path: Path, pessa: Pessa
) -> None:
    source = made("whisper")
    done = pessa("prune", source, "-o", tmp_path / "out", *options)
    assert done.code == 0, done.err
    assert {site.rpartition(".")[0] for site in manifest(tmp_path / "out")["ranks"]} == set(kinds)
    model, out = open_model(source), open_model(tmp_path / "out")
    for site in model.sites:
        if site.kind not in kinds:
            assert all(torch.equal(model.reader.get(name), out.reader.get(name)) for name in site.tensors)
    if options:
        assert out.parameters < model.parameters


def test_a_budget_of_attention_leaves_mlps_alone(made: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(made("bert"))
    prune_model(model, tmp_path / "out", Rule(target_attention=0.5), model.sites)
    out = open_model(tmp_path / "out")
    assert [site.kept for site in mlps_of(out)] == [48, 48]
    sizes = [
        sum(own.reader.header[name].count for site in own.attention for name in site.tensors) for own in (model, out)
    ]
    assert 0.45 < sizes[1] / sizes[0] <= 0.5


@pytest.mark.parametrize("name", ["whisper", "llama"])
def test_one_width_for_all_layers(name: str, made: Callable[[str], Path], tmp_path: Path, pessa: Pessa) -> None:
    given = ("prune", made(name), "--target-layers", "0.6", "--sites", "all", "--round-to", "4")
    for out, more in (("uniform", ("--uniform",)), ("free", ())):
        done = pessa(*given, *more, "-o", tmp_path / out)
        assert done.code == 0, done.err
    widths: dict[str, dict[tuple[str, str], set[int]]] = {"uniform": {}, "free": {}}
    for out, found in widths.items():
        for site in open_model(tmp_path / out).sites:
            for seam in site.seams:
                found.setdefault((site.kind, seam.name), set()).update(seam.ranks)
    assert all(len(own) == 1 for own in widths["uniform"].values()), widths
    assert any(len(own) > 1 for own in widths["free"].values())  # negative control
    kept = {kind: own for (kind, seam), own in widths["uniform"].items() if seam == "mlp"}
    assert all(width % 4 == 0 and width < 48 for own in kept.values() for width in own), kept


# --- what is refused, before the work


@pytest.mark.parametrize(
    ("name", "options", "culprits"),
    [
        ("whisper", ("--mlp-rank", "49"), ("--mlp-rank 49", "48 channels")),
        ("whisper", ("--mlp-rank", "0"), ("--mlp-rank 0",)),
        ("whisper", ("--mlp-ratio", "1"), ("--mlp-ratio 1",)),
        ("whisper", ("--mlp-ratio", "-0.1"), ("--mlp-ratio -0.1",)),
        ("whisper", ("--mlp-ratio", "nan"), ("--mlp-ratio nan",)),
        ("whisper", ("--mlp-thr", "-1"), ("--mlp-thr -1",)),
        ("whisper", ("--mlp-thr", "inf"), ("--mlp-thr inf",)),
        ("whisper", ("--mlp-ratio", "0.5", "--mlp-rank", "4"), ("--mlp-ratio and --mlp-rank",)),
        ("whisper", ("--mlp-ratio", "0.5", "--target-layers", "0.5"), ("--target-layers", "--mlp-ratio")),
        ("whisper", ("--mlp-ratio", "0.5", "--uniform"), ("--uniform", "budget")),
        ("whisper", ("--mlp-ratio", "0.5", "--sites", "attention"), ("--mlp-ratio", "--sites mlp")),
        ("whisper", ("--mlp-ratio", "0.5", "--sites", "encoder.self"), ("--mlp-ratio", "--sites mlp")),
        ("whisper", ("--ratio", "0.5", "--sites", "mlp"), ("--ratio", "--mlp-ratio")),
        ("whisper", ("--rank", "3", "--sites", "encoder.mlp"), ("--rank", "--mlp-rank")),
        ("whisper", ("--qk-thr", "0.1", "--sites", "mlp"), ("--qk-thr", "--mlp-thr")),
        ("whisper", ("--energy", "0.9", "--sites", "mlp"), ("--energy", "--mlp-ratio")),
        ("whisper", ("--target-attention", "0.9", "--sites", "mlp"), ("--target-attention", "--target-layers")),
        ("whisper", ("--mlp-ratio", "0.5", "--sites", "text.mlp"), ("--sites text.mlp", "encoder.mlp, decoder.mlp")),
        ("mixtral", ("--mlp-ratio", "0.5"), ("--mlp-ratio", "no MLPs", "decoder.self")),
        ("mixtral", ("--mlp-rank", "4", "--sites", "all"), ("--mlp-rank", "no MLPs")),
        ("mixtral", ("--target-layers", "0.5", "--sites", "mlp"), ("--sites mlp", "decoder.self")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_refusals_before_any_decomposition(
    name: str,
    options: tuple[str, ...],
    culprits: tuple[str, ...],
    made: Callable[[str], Path],
    tmp_path: Path,
    pessa: Pessa,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pessa_cli.surgery.decomposition.decompose_block", lambda *_: pytest.fail("a block was read"))
    monkeypatch.setattr("pessa_cli.surgery.decomposition.spectra_of", lambda *_: pytest.fail("a block was read"))
    for command in (("prune", made(name), "-o", tmp_path / "out"), ("inspect", made(name))):
        is_refusal(pessa(*command, *options), *culprits, code=2)
    assert not (tmp_path / "out").exists()


def test_the_library_refuses_before_any_decomposition_too(
    made: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pessa_cli.surgery.decomposition.decompose_block", lambda *_: pytest.fail("a block was read"))
    model = open_model(made("whisper"))
    with pytest.raises(UsageError, match="--mlp-rank 49"):
        prune_model(model, tmp_path / "out", Rule(mlp_rank=49))
    with pytest.raises(UsageError, match="--rank: no attention"):
        prune_model(model, tmp_path / "out", Rule(rank=3), [*mlps_of(model)])


def test_plans_that_would_leave_a_layer_without_channels(
    made: Callable[[str], Path], tmp_path: Path, pessa: Pessa
) -> None:
    source = copy_of(made("llama"), tmp_path / "model")
    edit_weights(lambda tensors: tensors["model.layers.1.mlp.down_proj.weight"].mul_(1e-3))(source)
    refused = pessa("prune", source, "-o", tmp_path / "out", "--mlp-thr", "1")
    is_refusal(refused, "mlp_thr 1", "decoder.mlp.1", "its largest value is")
    refused = pessa("prune", source, "-o", tmp_path / "out", "--target-layers", "0.01", "--sites", "mlp")
    is_refusal(refused, "target_layers 0.01", "remain", "give 0.0")
    assert not (tmp_path / "out").exists()
    # The smallest plans: one channel remains, and the model runs.
    assert pessa("prune", source, "-o", tmp_path / "one", "--mlp-ratio", "0.999").code == 0
    assert pessa("prune", source, "-o", tmp_path / "least", "--target-layers", "0.0209", "--sites", "mlp").code == 0
    for folder in ("one", "least"):
        assert {site.kept for site in mlps_of(open_model(tmp_path / folder))} == {1}
        assert tiny_models.outputs("llama", tiny.load(tmp_path / folder)).isfinite().all()


# --- with calibration data


def collected(model: Model, data: list[Path], out: Path, rule: Rule | None = None) -> Statistics:
    collect(model, model.sites, data, out, rule)
    return SavedStatistics(out)


def heard(model: Model, inputs: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return the values of the channels of each MLP on some inputs, (frames, channels), by hooks of this test."""
    loaded, found = load(model).double(), {site.name: list[Tensor]() for site in mlps_of(model)}
    for site in mlps_of(model):

        def keep(_module: Any, args: tuple[Tensor, ...], name: str = site.name) -> None:
            found[name].append(args[0].reshape(-1, args[0].shape[-1]))

        loaded.get_submodule(site.out).register_forward_pre_hook(keep)
    with torch.no_grad():
        for given in inputs:
            loaded(**{key: value.double() if value.is_floating_point() else value for key, value in given.items()})
    return {name: torch.cat(each) for name, each in found.items()}


def read_by(folder: Path, site: MlpSite) -> tuple[Tensor, Tensor]:
    """Return the matrix and the bias of a compact folder that read the channels of an MLP, in float64."""
    reader = open_model(folder).reader
    weight = reader.get(f"{site.out}.weight").double()
    bias = reader.get(f"{site.out}.bias").double() if site.out in site.biases else torch.zeros(1).double()
    return weight.T if site.spec.transposed else weight, bias


def alike(site: MlpSite, generator: torch.Generator) -> Callable[[Tensors], None]:
    """Return an edit after which the second half of the channels of an MLP are much like the first half."""

    def edit(tensors: Tensors) -> None:
        for module in site.into:
            for part in ("weight", "bias"):
                tensor = tensors.get(f"{module}.{part}")
                if tensor is None:
                    continue
                rows = tensor.T if site.spec.transposed and part == "weight" else tensor
                for own in rows.chunk(site.spec.parts):
                    first, second = own.chunk(2)
                    second.copy_(first + 0.2 * torch.randn(first.shape, generator=generator) * first.std())

    return edit


@pytest.mark.parametrize("name", ["whisper", "llama", "gpt2", "phi3"])
def test_the_refit_is_better_and_keeps_the_mean(
    name: str, made: Callable[[str], Path], data: list[Path], tmp_path: Path
) -> None:
    source, generator = copy_of(made(name), tmp_path / "model"), torch.Generator().manual_seed(5)
    for site in mlps_of(open_model(source)):
        edit_weights(alike(site, generator))(source)
    model = open_model(source)
    inputs = batches(load(model), 12)  # the first half of them are the calibration data
    seen, unseen = (heard(model, inputs[half]) for half in (slice(0, 6), slice(6, 12)))
    statistics = collected(model, data, tmp_path / "statistics.safetensors")
    prune_model(model, tmp_path / "out", HALF, [*mlps_of(model)], statistics=statistics)
    prune_model(model, tmp_path / "plain", HALF, [*mlps_of(model)])
    for site in mlps_of(model):
        sums, values = statistics.of(site), seen[site.name]
        assert isinstance(sums, MlpStatistics)
        assert int(sums.frames) == len(values)
        for found, expected in ((sums.moment, values.T @ values), (sums.total, values.sum(0))):
            assert float((found - expected).norm() / expected.norm()) < 1e-5
        (own, own_bias), (new, new_bias) = read_by(source, site), read_by(tmp_path / "out", site)
        kept, by_norm = numbers(tmp_path / "out", site), numbers(tmp_path / "plain", site)
        assert len(kept) == site.width // 2
        rows, cut_rows = (matrices(each, site)[0] for each in (model, open_model(tmp_path / "out")))
        assert all(torch.equal(a[kept], b) for a, b in zip(rows, cut_rows, strict=True))

        def error(
            values: Tensor,
            weight: Tensor,
            bias: Tensor,
            own: Tensor = own,
            own_bias: Tensor = own_bias,
            kept: Tensor = kept,
        ) -> float:
            wanted = values @ own.T + own_bias
            return float((values[:, kept] @ weight.T + bias - wanted).norm() / wanted.norm())

        held_out = unseen[site.name]
        refitted, bare = error(held_out, new, new_bias), error(held_out, own[:, kept], own_bias)
        assert refitted < 0.8 * bare, site.name
        assert refitted < error(held_out, own[:, by_norm], own_bias, kept=by_norm), site.name
        if site.out in site.biases:
            wanted = (values @ own.T + own_bias).mean(0)
            mean = (values[:, kept] @ new.T + new_bias).mean(0)
            assert float((mean - wanted).norm() / wanted.norm()) < 1e-4
            bare_mean = (values[:, kept] @ own[:, kept].T + own_bias).mean(0)
            assert float((bare_mean - wanted).norm() / wanted.norm()) > 1e-2  # negative control
        else:
            assert f"{site.out}.bias" not in open_model(tmp_path / "out").reader.header


def test_statistics_that_were_saved_give_the_same_bytes(
    made: Callable[[str], Path], data: list[Path], tmp_path: Path, pessa: Pessa
) -> None:
    given = [option for path in data for option in ("--calibrate", path)]
    file = tmp_path / "statistics.safetensors"
    rule = ("--target-layers", "0.7")
    done = pessa("prune", made("whisper"), "-o", tmp_path / "first", *given, "--statistics", file, *rule)
    assert done.code == 0, done.err
    assert pessa("prune", made("whisper"), "-o", tmp_path / "second", "--statistics", file, *rule).code == 0
    assert weights(tmp_path / "first") == weights(tmp_path / "second")
    first, second = (manifest(tmp_path / out) for out in ("first", "second"))
    assert first["channels"] == second["channels"]
    assert first["ranks"] == second["ranks"]
    assert pessa("prune", made("whisper"), "-o", tmp_path / "third", *rule).code == 0
    assert weights(tmp_path / "third") != weights(tmp_path / "first")  # negative control
    # They belong to these weights alone.
    other = copy_of(made("whisper"), tmp_path / "other")
    edit_weights(lambda tensors: tensors["model.encoder.layers.1.fc1.weight"][0, 0].add_(0.1))(other)
    refused = pessa("prune", other, "-o", tmp_path / "no", "--statistics", file, *rule)
    is_refusal(refused, "encoder.mlp.1", "other weights")


def test_statistics_of_attention_alone_are_refused(
    made: Callable[[str], Path], data: list[Path], tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As versions before MLPs were cut have collected them; they are still good for attention."""
    file, old = tmp_path / "statistics.safetensors", tmp_path / "old.safetensors"
    model = open_model(made("whisper"))
    collected(model, data, file)
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        about = opened.metadata()
    save_file({name: tensor for name, tensor in load_file(file).items() if ".mlp." not in name}, old, about)
    given = ("prune", made("whisper"), "--statistics", old)
    assert pessa(*given, "-o", tmp_path / "attention", "--target-attention", "0.7").code == 0
    assert pessa(*given, "-o", tmp_path / "all", "--sites", "attention", "--target-layers", "0.7").code == 0
    monkeypatch.setattr("pessa_cli.surgery.decomposition.decompose_block", lambda *_: pytest.fail("a block was read"))
    for options in (("--target-layers", "0.7"), ("--mlp-ratio", "0.3"), ("--rank", "3", "--mlp-rank", "9")):
        is_refusal(pessa(*given, "-o", tmp_path / "out", *options), "old.safetensors", "encoder.mlp.0", "--calibrate")
    assert not (tmp_path / "out").exists()


def test_changed_weights_are_noticed_by_the_spectra(
    made: Callable[[str], Path], data: list[Path], tmp_path: Path
) -> None:
    model = open_model(made("whisper"))
    sites = [*mlps_of(model)]
    found = collected(model, data, tmp_path / "statistics.safetensors")
    for kind, statistics in (("plain", None), ("calibrated", found)):
        folder = tmp_path / kind
        decompose_model(model, folder, sites, statistics=statistics)
        assert (folder / SPECTRA_FILE).is_file()
        prune_model(open_model(folder), tmp_path / f"{kind} out", HALF, [*mlps_of(open_model(folder))])
        ordered = open_model(folder)
        for site in mlps_of(ordered):  # the first half of the channels, as they are stored
            rows, cut_rows = (matrices(each, site)[0][0] for each in (ordered, open_model(tmp_path / f"{kind} out")))
            assert torch.equal(rows[:24], cut_rows)
        for module in ("fc1.weight", "fc1.bias", "fc2.weight"):
            changed = copy_of(folder, tmp_path / f"{kind} {module}")

            def change(tensors: Tensors, name: str = f"model.decoder.layers.1.{module}") -> None:
                tensors[name].view(-1)[3] += 0.1

            edit_weights(change)(changed)
            other = open_model(changed)
            with pytest.raises(PessaError, match=r"does not belong to these weights: decoder.mlp.1"):
                prune_model(other, tmp_path / "no", HALF, [*mlps_of(other)])
            assert not (tmp_path / "no").exists()
    assert weights(tmp_path / "plain out") != weights(tmp_path / "calibrated out")


def test_calibrating_a_model_whose_mlps_were_cut(made: Callable[[str], Path], data: list[Path], tmp_path: Path) -> None:
    """Channels that are gone stay gone, and their zeros do no harm."""
    model = open_model(made("whisper"))
    prune_model(model, tmp_path / "half", HALF, [*mlps_of(model)])
    half = open_model(tmp_path / "half")
    statistics = collected(half, data, tmp_path / "statistics.safetensors")
    prune_model(half, tmp_path / "further", Rule(mlp_ratio=0.75), [*mlps_of(half)], statistics=statistics)
    for site in mlps_of(half):
        before, after = numbers(tmp_path / "half", site), numbers(tmp_path / "further", site)
        assert len(after) == 12
        assert set(after.tolist()) < set(before.tolist())
        assert all(tensor.isfinite().all() for tensor in read_by(tmp_path / "further", site))
    # At full width of what is left nothing changes.
    prune_model(half, tmp_path / "same", HALF, [*mlps_of(half)], statistics=statistics)
    assert tiny.close(tiny.load(tmp_path / "same"), tiny.load(tmp_path / "half"))
    assert not tiny.close(tiny.load(tmp_path / "further"), tiny.load(tmp_path / "half"), 1e-3)


def test_blocks_calibrated_in_sequence(made: Callable[[str], Path], data: list[Path], tmp_path: Path) -> None:
    model = open_model(made("whisper"))
    rule = Rule(rank=3, mlp_ratio=0.5)
    plain = collected(model, data, tmp_path / "plain.safetensors")
    behind = collected(model, data, tmp_path / "behind.safetensors", rule)
    for site in mlps_of(model):  # attention before the first MLP is pruned too
        moments = [input_moment(statistics.of(site)) for statistics in (plain, behind)]
        assert float((moments[0] - moments[1]).norm() / moments[0].norm()) > 1e-3
    prune_model(model, tmp_path / "out", rule, statistics=SavedStatistics(tmp_path / "behind.safetensors"))
    assert manifest(tmp_path / "out")["calibration_sequential"] == str(rule)
