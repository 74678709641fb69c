"""The lossless rule drops the channels of MLPs that do nothing, and `verify` proves that nothing else has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from harness import Pessa, Tensors, copy_of, edit_json, edit_weights
from mlps import mlps_of, saved, strong

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.calibration.collect import collect
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import SavedStatistics
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

UNREAD, UNWRITTEN = [3, 17, 30], [5, 17, 41]  # channels
LEFT = 48 - len({*UNREAD, *UNWRITTEN})
Edit = Callable[[Tensors], None]


def scaled(site: MlpSite, unread: list[int], unwritten: list[int], factor: float) -> Edit:
    """Multiply the weights that read or write these channels, with the biases."""

    def edit(tensors: Tensors) -> None:
        for module, channels in ((site.out, unread), (site.into[0], unwritten)):
            weight = tensors[f"{module}.weight"]
            by_rows = (module != site.out) != site.spec.transposed
            (weight if by_rows else weight.T)[channels] *= factor
        if f"{site.into[0]}.bias" in tensors:
            tensors[f"{site.into[0]}.bias"][unwritten] *= factor

    return edit


def made(name: str, folder: Path, factor: float = 0.0) -> Path:
    """Save a tiny model with 48 channels in each MLP, in the first of which a few do nothing."""
    strong(tiny.save(name, folder)) if name in tiny.NAMES else saved(name, folder)
    edit_weights(scaled(mlps_of(open_model(folder))[0], UNREAD, UNWRITTEN, factor))(folder)
    return folder


def widths(folder: Path) -> list[int]:
    return [site.kept for site in mlps_of(open_model(folder))]


@pytest.mark.parametrize("name", ["whisper", "llama", "gpt2", "phi3"])
def test_channels_that_do_nothing_are_dropped_and_the_model_is_the_same(
    name: str, tmp_path: Path, pessa: Pessa
) -> None:
    source = made(name, tmp_path / "model")
    first, *others = (site.width for site in mlps_of(open_model(source)))
    dropped = 48 - LEFT
    done = pessa("prune", source, "--lossless", "--sites", "all", "-o", tmp_path / "out")
    assert done.code == 0, done
    assert widths(tmp_path / "out") == [first - dropped, *others]
    done = pessa("verify", source, tmp_path / "out", "--json")
    assert done.code == 0, done
    weights = json.loads(done.out)["weights"]
    assert {each["error"] for each in weights if ".mlp." in each["where"]} == {0.0}
    assert pessa("prune", source, "--lossless", "-o", tmp_path / "attention").code == 0
    assert widths(tmp_path / "attention") == [first, *others]  # the rule of the paper is about attention


def test_negative_control_channels_that_do_little_stay(tmp_path: Path, pessa: Pessa) -> None:
    source = made("whisper", tmp_path / "model", 1e-3)
    assert pessa("prune", source, "--lossless", "--sites", "mlp", "-o", tmp_path / "out").code == 0
    assert widths(tmp_path / "out") == [48] * 4
    prune_model(open_model(source), tmp_path / "cut", Rule(mlp_rank=LEFT), mlps_of(open_model(source))[:1])
    assert pessa("verify", source, tmp_path / "cut", "--level", "weights").code == 1


def test_an_mlp_that_does_nothing_keeps_one_multiple(tmp_path: Path, pessa: Pessa) -> None:
    source = made("whisper", tmp_path / "model")
    edit_weights(scaled(mlps_of(open_model(source))[1], [*range(48)], [], 0.0))(source)
    for step in (1, 8):
        out = tmp_path / str(step)
        assert pessa("prune", source, "--lossless", "--round-to", step, "--sites", "mlp", "-o", out).code == 0
        assert widths(out) == [-(-LEFT // step) * step, step, 48, 48]
        assert pessa("verify", source, out, "--level", "blocks").code == 0


def test_an_activation_that_is_not_zero_at_zero_keeps_channels_that_nothing_writes(
    tmp_path: Path, pessa: Pessa
) -> None:
    source = made("whisper", tmp_path / "model")
    edit_json(lambda config: config.update(activation_function="sigmoid"))(source)
    assert pessa("prune", source, "--lossless", "--sites", "mlp", "-o", tmp_path / "out").code == 0
    assert widths(tmp_path / "out") == [48] * 4
    cut = copy_of(source, tmp_path / "cut")
    edit_weights(scaled(mlps_of(open_model(source))[0], UNWRITTEN, [], 0.0))(cut)  # what reads the constant channels
    assert pessa("verify", source, cut, "--level", "weights").code == 1


@pytest.mark.parametrize("silent", [[], [0, 1]], ids=["all are used", "some are not used"])
def test_calibrated_the_weights_still_decide(silent: list[int], data: list[Path], tmp_path: Path) -> None:
    """A channel that the calibration data do not use may be used by other inputs."""
    source = made("whisper", tmp_path / "model")
    first = mlps_of(open_model(source))[0]

    def silence(tensors: Tensors) -> None:
        tensors[f"{first.into[0]}.bias"][silent] = -1e4

    edit_weights(silence)(source)
    model, sites = open_model(source), mlps_of(open_model(source))
    collect(model, sites, data, tmp_path / "s")
    written = prune_model(model, tmp_path / "out", Rule(), sites, statistics=SavedStatistics(tmp_path / "s"))
    assert written.method == "calibrated"
    # By their weights, channels that the data do not use are worth something, too.
    assert int((written.spectra[first.name].seams["mlp"] == 0).sum()) == 48 - LEFT
    kept = {int(number) for number in written.channels[first.name].split()}
    assert kept >= {*range(48)} - {*UNREAD, *UNWRITTEN}
    assert silent or len(kept) == LEFT
    assert widths(tmp_path / "out")[1:] == [48] * 3
    before, after = (model_outputs(folder) for folder in (source, tmp_path / "out"))
    assert torch.allclose(before, after, atol=1e-5)


def model_outputs(folder: Path) -> torch.Tensor:
    model = tiny.load(folder)
    with torch.inference_mode():
        found: torch.Tensor = model(**tiny.inputs(model)).logits
    return found
