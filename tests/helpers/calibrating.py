"""Calibration of tiny models, which have no tokenizers: each calibration file stands for one prepared input."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from pessa_cli.calibration.collect import collect
from pessa_cli.models import windows
from pessa_cli.models.data import DataItem
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import SavedStatistics, Statistics
from pessa_cli.surgery.model import Model


def batches(model: Any, count: int = 6) -> list[dict[str, Tensor]]:
    """Return different inputs of batch size 1 for a tiny model."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for _ in range(count):
        ids = torch.randint(5, 90, (1, 20), generator=generator)
        if model.config.model_type == "whisper":
            features = torch.randn(1, 8, 60, generator=generator) * torch.logspace(0, -1, 8).unsqueeze(-1)
            found.append({"input_features": features, "decoder_input_ids": ids})
        else:
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


def files_of_inputs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, encode: Callable[[Any, int], Inputs], count: int
) -> list[Path]:
    """Return files that stand for one input each, since tiny models have no tokenizers: `encode(model, number)`."""

    def inputs_of(model: Any, _encoder: Any, item: DataItem, _transcribed: bool) -> Iterator[Inputs]:
        yield encode(model, int(item.text or ""))

    for name in ("check_kind", "encoder_for"):
        monkeypatch.setattr(windows, name, lambda *_: None)
    monkeypatch.setattr(windows, "inputs_of", inputs_of)
    paths = [folder / f"{number}.txt" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_text(str(number))
    return paths


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return files that stand for the inputs of `batches`."""
    return files_of_inputs(tmp_path, monkeypatch, lambda model, number: batches(model)[number], 6)


def collected(model: Model, data: list[Path], out: Path, rule: Rule | None = None) -> Statistics:
    collect(model, model.attention, data, out, rule)
    return SavedStatistics(out)


def block_errors(folder: Path, reference: Path) -> float:
    """Return the relative error of one model's logits on the calibration inputs, against those of another."""
    a, b = tiny.load(folder), tiny.load(reference)
    with torch.no_grad():
        pairs = [(a(**given).logits, b(**given).logits) for given in batches(a)]
    off, whole = (torch.cat([t.flatten() for t in side]) for side in zip(*pairs, strict=True))
    return float((off - whole).norm() / whole.norm())
