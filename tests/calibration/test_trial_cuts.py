"""What trial cuts keep of a block, by hand, and what they measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from attention import GROUPED
from calibrating import batches
from harness import edit_weights
from mlps import saved
from sites import spectra_by

from pessa_cli.calibration import trial_cuts
from pessa_cli.calibration.trial_cuts import kept_at, try_out
from pessa_cli.surgery.decomposition import decomposition_of
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.run import Run

QK, VO = np.array([[6.0, 5.0], [4.0, 0.5]]), np.array([[6.0, 5.0, 4.0], [3.0, 2.0, 1.0]])


@pytest.mark.parametrize(
    ("share", "only", "qk", "vo"),
    [
        (0.0, None, (3, 3), (3, 3)),
        (0.25, "qk", (3, 2), (3, 3)),  # the smallest of the four directions that can be cut
        (0.5, "qk", (3, 1), (3, 3)),
        (0.75, "qk", (2, 1), (3, 3)),
        (0.5, "vo", (3, 3), (3, 0)),
        (0.5, None, (3, 1), (3, 0)),
    ],
)
def test_trial_cuts_keep_the_directions_that_are_always_kept(
    share: float, only: str | None, qk: tuple[int, ...], vo: tuple[int, ...]
) -> None:
    """One of three directions of each head is rotated; the spectrum of Q-K and the shares are of the two others."""
    partial = replace(GROUPED, unmerged=1, between="RoPE")
    kept = kept_at(partial, spectra_by(QK, VO), share, only)
    assert kept.ranks == {"qk": qk, "vo": vo}


def test_the_metric_is_the_fisher_information_of_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the last MLP: J^T (diag p - p p^T) J, summed over positions, where J is the Jacobian of the logits."""
    monkeypatch.setattr(trial_cuts, "SAMPLES", 500)
    saved("llama", tmp_path / "model")
    edit_weights(lambda tensors: tensors["lm_head.weight"].mul_(10))(tmp_path / "model")
    model, loaded = open_model(tmp_path / "model"), tiny.load(tmp_path / "model")
    last, given = model.sites[-1], batches(loaded, 1)[0]
    assert last.kind == "decoder.mlp"
    with decomposition_of(model, Run(), reuse=True) as found:
        found.decompose(model.sites)
        metric = try_out(loaded, model.sites, [given], found, 10**9, lambda *_: None)[last.name]["metric"] / 500
    states: list[torch.Tensor] = []
    loaded.model.norm.register_forward_pre_hook(lambda _module, args: states.append(args[0][0]))
    with torch.no_grad():
        loaded(**given)
    expected = torch.zeros_like(metric)
    for state in states[0]:
        jacobian = torch.func.jacrev(lambda x: loaded.lm_head(loaded.model.norm(x)))(state).double()
        p = loaded.lm_head(loaded.model.norm(state)).softmax(-1).double()
        expected += jacobian.mT @ (torch.diag(p) - torch.outer(p, p)) @ jacobian
    assert float((metric - expected).norm() / expected.norm()) < 0.1
    assert float((metric - expected.trace() / len(expected) * torch.eye(len(expected))).norm() / expected.norm()) > 0.5
