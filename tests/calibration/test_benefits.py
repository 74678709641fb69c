"""The benefit of each part of calibration: without it, pruned blocks have larger errors, or an estimate is far off.

Each test measures the outputs of blocks on the inputs that they were calibrated on. A part that is left out, or that no
longer has an effect, makes its test fail.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from calibrating import batches, collected
from harness import TinyFolder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sites import ranks_by

from pessa_cli.blocks.site import AttentionSite
from pessa_cli.calibration import trial_cuts
from pessa_cli.models.hooks import block_modules, block_squares, output_of
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import SavedStatistics, Statistics
from pessa_cli.surgery.decomposition import measure
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model


@dataclass(frozen=True)
class Calibrated:
    folder: Path
    model: Model
    statistics: Statistics
    file: Path

    def block(self, name: str) -> AttentionSite:
        return next(site for site in self.model.attention if site.name == name)


@pytest.fixture
def calibrated(request: pytest.FixtureRequest, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path) -> Calibrated:
    folder = tiny_folder(request.param)
    model = open_model(folder)
    file = tmp_path / "statistics"
    return Calibrated(folder, model, collected(model, data, file), file)


def block_error(site: AttentionSite, ours: Any, theirs: Any) -> float:
    """Return the relative squared error of one block of `theirs` on the inputs that the block has in `ours`."""
    with ExitStack() as hooks, torch.no_grad():
        squares = block_squares([site], ours, theirs, hooks)
        for given in batches(ours):
            output_of(ours, given)
    off, whole = squares[site.name]
    return off / whole


@pytest.mark.parametrize(
    ("calibrated", "block", "most"),
    [("whisper", "encoder.self.0", 0.5), ("bert", "encoder.self.0", 0.98), ("llama", "decoder.self.0", 0.98)],
    indirect=["calibrated"],
)
def test_the_refit_of_the_output_projection_reduces_the_error(
    calibrated: Calibrated, block: str, most: float, tmp_path: Path
) -> None:
    """Compared with slicing the calibrated decomposition, which keeps the same directions without a refit.

    Only V-O is cut, so that the inputs of the output projection do not change.
    """
    site, model = calibrated.block(block), calibrated.model
    decompose_model(model, tmp_path / "full", statistics=calibrated.statistics)
    spectrum = measure(model, [site], statistics=calibrated.statistics)[block].seams["vo"]
    rule = Rule(qk_thr=0.0, vo_thr=float(np.quantile(spectrum, 0.5)))
    fitted = prune_model(model, tmp_path / "fitted", rule, [site], layout="dense", statistics=calibrated.statistics)
    full = open_model(tmp_path / "full")
    same = [other for other in full.sites if other.name == block]
    sliced = prune_model(full, tmp_path / "sliced", rule, same, layout="dense")
    assert ranks_by(fitted.ranks, "vo") == ranks_by(sliced.ranks, "vo")
    assert 0 < sum(fitted.ranks.ranks[block]["vo"]) < site.kv_heads * site.head_dim
    original = tiny.load(calibrated.folder)
    errors = [block_error(site, original, tiny.load(tmp_path / name)) for name in ("fitted", "sliced")]
    assert 0 < errors[0] < most * errors[1]


@pytest.mark.parametrize(
    ("calibrated", "block", "most"),
    [("whisper", "encoder.self.0", 0.5), ("bert", "encoder.self.0", 0.97)],
    indirect=["calibrated"],
)
def test_weighting_keys_by_their_influence_on_the_output_reduces_the_error(
    calibrated: Calibrated, block: str, most: float, tmp_path: Path
) -> None:
    """Compared with the same statistics without `influence`, for a quarter of Q-K cut and V-O not cut."""
    site, model, without = calibrated.block(block), calibrated.model, tmp_path / "without"
    with safe_open(calibrated.file, framework="pt") as file:
        about = file.metadata()
    sums = load_file(calibrated.file)
    save_file({n: t * 0 if n.endswith(".influence") else t for n, t in sums.items()}, without, about)
    errors = []
    for name, statistics in (("all", calibrated.statistics), ("keys", SavedStatistics(without))):
        spectrum = measure(model, [site], statistics=statistics)[block].seams["qk"]
        rule = Rule(qk_thr=float(np.quantile(spectrum, 0.25)), vo_thr=0.0)
        written = prune_model(model, tmp_path / name, rule, [site], layout="dense", statistics=statistics)
        assert sum(written.ranks.ranks[block]["qk"]) == 0.75 * spectrum.size
        errors.append(block_error(site, tiny.load(calibrated.folder), tiny.load(tmp_path / name)))
    assert 0 < errors[0] < most * errors[1]


@pytest.mark.parametrize("calibrated", ["whisper"], indirect=True)
def test_the_harm_of_a_cut_predicts_the_divergence(
    calibrated: Calibrated, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each block cut by half on its own, the harm is the KL divergence of the logits per error of the block."""
    monkeypatch.setattr(trial_cuts, "SAMPLES", 200)  # with 4 the estimate is within a factor of 3
    model = calibrated.model
    spectra = measure(model, model.attention, statistics=collected(model, data, tmp_path / "many"))
    original = tiny.load(calibrated.folder)
    for site in model.attention:
        folder = tmp_path / site.name
        prune_model(model, folder, Rule(ratio=0.5), [site], layout="dense", statistics=calibrated.statistics)
        cut = tiny.load(folder)
        divergence = []
        with torch.no_grad():
            for given in batches(original):
                before, after = (output_of(m, given)[1].double().log_softmax(-1) for m in (original, cut))
                divergence.append(float((before.exp() * (before - after)).sum(-1).mean()))
        trials = spectra[site.name].trials
        assert trials is not None
        expected = float(np.mean(divergence)) / block_error(site, original, cut)
        assert 0.3 < trials.harm / expected < 3.5, site.name


@pytest.mark.parametrize(
    ("calibrated", "block"),
    [
        ("whisper", "encoder.self.1"),
        ("bert", "encoder.self.1"),
        ("llama", "decoder.self.1"),
        ("llama-biased", "decoder.self.1"),
    ],
    indirect=["calibrated"],
)
def test_calibration_in_sequence_reduces_the_error_behind_pruned_blocks(
    calibrated: Calibrated, block: str, data: list[Path], tmp_path: Path
) -> None:
    """The second block, calibrated in sequence or on the original model, runs behind the same pruned first block."""
    model, rule, site = calibrated.model, Rule(rank=3), calibrated.block(block)
    chain = collected(model, data, tmp_path / "in sequence", rule)
    for name, statistics in (("apart", calibrated.statistics), ("chain", chain)):
        prune_model(model, tmp_path / name, rule, layout="dense", statistics=statistics)
    original, behind = tiny.load(calibrated.folder), tiny.load(tmp_path / "chain")
    ours, theirs = (block_modules([site], loaded)[site.name].block for loaded in (behind, original))
    ours.load_state_dict(theirs.state_dict())
    apart, in_sequence = (block_error(site, behind, tiny.load(tmp_path / name)) for name in ("apart", "chain"))
    assert 0 < in_sequence < 0.85 * apart
