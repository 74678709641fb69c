"""Calibration of every kind of model: exact at full rank and better than the weights alone, or refused with a reason.

Models read real files through a tokenizer; nothing is replaced.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from characters import tokenizer
from harness import Pessa, is_refusal

from pessa_cli.blocks.site import AttentionSite, select
from pessa_cli.calibration.collect import calibrate
from pessa_cli.models.data import CalibrationData, read_data
from pessa_cli.models.dense import text_part
from pessa_cli.models.hooks import output_of
from pessa_cli.models.load import load
from pessa_cli.models.windows import windows
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.weighing import weigh
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.run import Run

STORY = "the keeper lit the lamp on the ninth of march, and it burned until three sails came home. "
# One for each way in which blocks are built or called; the others are for `make test`.
FEW = ("gemma2", "gpt_oss", "phi", "phi3", "gpt2", "falcon", "mpnet", "deberta-v2", "clip", "t5", "vit", "wavlm")
REFUSED = {  # by what the refusal names
    "speech_to_text": "takes input_features",
    **dict.fromkeys(("wav2vec2", "hubert", "moonshine"), "takes input_values"),
    **dict.fromkeys(("vit", "deit", "dinov2", "beit"), "takes pixel_values"),
    **dict.fromkeys(("clip_vision_model", "siglip_vision_model"), "takes pixel_values"),
    "wavlm": "without calling them",
}


def by_tier(names: list[str]) -> list[Any]:
    return [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in names]


READING = by_tier([name for name in tiny_models.TINIES if name not in REFUSED and name != "whisper"])  # it listens


def made(name: str, to: Path) -> tuple[Model, CalibrationData]:
    """Save a tiny model with a tokenizer, and read calibration data."""
    tiny_models.build(name).save_pretrained(to / "model")
    tokenizer().save_pretrained(to / "model")
    for number in range(6):
        (to / f"{number}.txt").write_text((STORY * 2)[17 * number :][:24])
    return open_model(to / "model"), read_data([to / f"{number}.txt" for number in range(6)])


def of_text(model: Model) -> list[AttentionSite]:
    """Return the blocks that read text."""
    kinds = {site.spec.kind for site in model.attention}
    return select(model.attention, ("text.self",) if "text.self" in kinds else ())


@pytest.mark.parametrize("name", READING)
def test_calibration_is_exact_at_full_rank_and_better_below(name: str, tmp_path: Path) -> None:
    model, data = made(name, tmp_path)
    sites, half = of_text(model), Rule(rank=model.attention[0].head_dim // 2)
    with calibrate(model, sites, data, None, Run()) as found:
        trials = [found.statistics.of(site).trials for site in sites]
        decompose_model(model, tmp_path / "full", sites, statistics=found.statistics, blocks=found.blocks)
        prune_model(model, tmp_path / "calibrated", half, sites, "svd", "dense", statistics=found.statistics)
    prune_model(model, tmp_path / "plain", half, sites, "svd", "dense")
    assert all(trial is not None and trial.harm > 0 for trial in trials)
    original = text_part(load(model))
    inputs = [window for window, _ in windows(model.reader.folder, original, data.items)]

    def outputs(loaded: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([output_of(loaded, window)[1].flatten() for window in inputs])

    expected = outputs(original)
    full, calibrated, plain = (
        float((outputs(text_part(load(open_model(tmp_path / made)))) - expected).norm() / expected.norm())
        for made in ("full", "calibrated", "plain")
    )
    assert full < 1e-5
    assert calibrated < 0.95 * plain
    assert plain > 0.1  # negative control: the blocks matter


@pytest.mark.parametrize("name", by_tier(list(REFUSED)))
def test_refusals_before_any_pass(name: str, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> None:
    made(name, tmp_path)
    monkeypatch.setattr(
        "pessa_cli.calibration.collect.output_of", lambda *_: pytest.fail("the data were run through the model")
    )
    done = pessa("prune", tmp_path / "model", "-o", tmp_path / "out", "--calibrate", tmp_path / "0.txt")
    is_refusal(done, REFUSED[name], code=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["clip", "llava"])
def test_parts_that_read_no_text_are_refused_unless_others_are_chosen(name: str, tmp_path: Path, pessa: Pessa) -> None:
    made(name, tmp_path)
    given = ("--calibrate", tmp_path / "0.txt", "--calibrate", tmp_path / "1.txt")
    is_refusal(pessa("inspect", tmp_path / "model", *given), "vision.self.0", "--sites text.self", code=2)
    assert pessa("inspect", tmp_path / "model", *given, "--sites", "text.self").code == 0


def test_blocks_that_the_data_do_not_reach(tmp_path: Path, pessa: Pessa) -> None:
    """Mllama skips its cross-attention without an image."""
    made("mllama", tmp_path)
    given = ("--sites", "text.self,text.cross", "--calibrate", tmp_path / "0.txt")
    is_refusal(pessa("inspect", tmp_path / "model", *given), "text.cross.1", "--sites text.self", code=2)


def test_of_partly_rotated_heads_the_merged_directions_are_weighted(tmp_path: Path) -> None:
    """RoPE rotates the first directions of each head; the statistics of the others weight what is decomposed."""
    model, data = made("phi", tmp_path)
    site = model.attention[0]
    with calibrate(model, [site], data, None, Run()) as found:
        sums = replace(found.statistics.of(site), influence=torch.zeros_like(found.statistics.of(site).influence))
    loaded, seen = load(model), list[torch.Tensor]()
    query = next(module for name, module in loaded.named_modules() if name.endswith(site.q))
    query.register_forward_hook(lambda _module, _args, output: seen.append(output[0].double()))
    with torch.no_grad():
        for window, _ in windows(model.reader.folder, loaded, data.items):
            output_of(loaded, window)
    queries = torch.cat(seen).reshape(-1, site.kv_heads, site.head_dim)[..., site.unmerged :].transpose(0, 1)
    weighed = weigh(sums, site, None).qk
    assert 0 < site.unmerged < site.head_dim
    assert torch.allclose(weighed.left, queries.mT @ queries / queries.shape[1], rtol=1e-4, atol=1e-5)
    assert weighed.right is not None
    keys = sums.keys[:, site.unmerged :, site.unmerged :] / sums.frames
    assert torch.allclose(weighed.right * site.head_dim, keys)
