"""The tables of scripts/reproduce.py: what is cut for each cell, how folds are put together, and what is shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import soundfile
import tiny
from reproduce import Results, harm, loss, shown, table, verdicts
from reproduce_data import KL, NATS, OTHER, SPEARMAN, WORDS, Places, figures, speech
from reproduce_subjects import OF_LAYERS, SUBJECTS, recipe
from speech_scores import Sums

from pessa_cli.blocks.site import count
from pessa_cli.evaluation.figures import Figure
from pessa_cli.models.audio import SAMPLE_RATE
from pessa_cli.models.inputs import built_in_speech
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model


def test_figures_are_over_the_items_of_all_folds() -> None:
    found = figures([{NATS: Sums([1.0, 5.0], [1, 1])}, {NATS: Sums([3.0], [7])}])
    assert (found[NATS].items, found[NATS].value) == (3, 1.0)
    alone = Figure(1, lambda _: 0.5)
    assert figures([{SPEARMAN: alone}])[SPEARMAN] is alone


def test_every_cell_of_layers_keeps_the_same_number_of_parameters(tmp_path: Path) -> None:
    model = open_model(tiny.save("llama", tmp_path / "model"))
    sites, data = model.sites, [Path("data.txt")]
    whole = sum(count(site.tensors) for site in sites)
    for method in OF_LAYERS:
        given = recipe(method, 0.8, sites, data, lambda: Path("statistics"))
        assert given is not None
        assert bool(given.calibrate) is (method in ("joint", "MLPs alone")) is not bool(given.statistics)
        own = [site for site in sites if site.kind in given.sites]
        ranks = prune_model(model, tmp_path / method.replace(" ", "-"), given.rule, own).ranks
        left = sum(count(ranks.kept(site).tensors) for site in own) + whole - sum(count(site.tensors) for site in own)
        # Of heads with 8 directions and 4 pairs a share of 0.8 is not a whole number.
        assert (0.7 if method == "same share" else 0.77) < left / whole <= (0.82 if method == "same share" else 0.8), (
            method
        )
    assert recipe("attention alone", 0.5, sites, data, lambda: Path("statistics")) is None


def test_clips_are_not_scored_that_were_calibrated_on(tmp_path: Path) -> None:
    clip = tmp_path / "clip.wav"
    soundfile.write(clip, built_in_speech(), SAMPLE_RATE)
    for part in ("calibrate", "score"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "clips.jsonl").write_text(json.dumps({"audio": str(clip), "text": "words"}) + "\n")
    with pytest.raises(SystemExit, match="1 clips would be scored"):
        speech(Places(tmp_path, tmp_path, speech=tmp_path), tmp_path)


def entry(difference: float, **more: float) -> dict[str, Any]:
    figure = {"value": 1.0, "interval": [0.5, 1.5], "difference": {"value": difference, "interval": [-0.2, 0.2]}}
    return {"figures": {name: figure | {"value": value} for name, value in more.items()}, "method": "joint"}


def test_cells() -> None:
    clips = entry(0.1, **{KL: 0.0125, NATS: 0.8, WORDS: 0.125})
    assert shown(clips, layers=True) == "0.0125 (0.5000 to 1.5000); 0.800; 12.5 %"
    assert shown(clips, layers=False) == "12.5 % (0.80)"
    text = entry(0.0, **{NATS: 0.0, OTHER: 0.0})
    assert shown(text, layers=True) == "1.000 (0.819 to 1.221); 1.000 (0.819 to 1.221)"
    assert shown(text, layers=False) == "1.0; 1.0"
    pairs = entry(-0.1, **{SPEARMAN: 0.85})
    assert shown(pairs, layers=True) == "0.850, -0.1000 (-0.2000 to +0.2000)"
    assert shown(None, layers=True) == ""
    assert (loss(pairs), harm(pairs), loss(clips), harm(clips)) == (0.1, 0.1, 0.1, 0.1)


def test_results_that_are_there_are_shown(tmp_path: Path) -> None:
    subject = next(each for each in SUBJECTS if each.title == "MiniLM layers")
    key = {"subject": subject.title, "share": 0.75, "parameters": 12, "pruned": 0.25}
    runs = [
        key | entry(-0.02, **{SPEARMAN: 0.84}) | {"method": "joint"},
        key | entry(-0.01, **{SPEARMAN: 0.85}) | {"method": "same share"},
        {"subject": subject.title, "share": 0.75, "method": "attention alone", "unmet": "too much"},
    ]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in runs))
    results = Results(Places(tmp_path, tmp_path), threads=1)
    results.make(subject, "joint", 0.75)  # takes no model
    results.make(subject, "attention alone", 0.75)
    (row,) = [line for line in table(results, [subject]) if line.startswith("| MiniLM")]
    assert row.startswith("| MiniLM layers | 75.0 % | 12 | 0.840, -0.0200")
    assert row.endswith("|  |  |  |")
    assert list(verdicts(results, [subject])) == [
        "MiniLM layers, 75%, joint: +0.0200, target 0.01: MISSED",
        "MiniLM layers, 75%: joint WORSE than same share, 0.0200 and 0.0100",
    ]


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda each: each.title)
def test_titles_and_shares_are_apart(subject: Any) -> None:
    assert sum(each.title == subject.title for each in SUBJECTS) == 1
    assert {*subject.first, *subject.sequence} <= {*subject.shares}
