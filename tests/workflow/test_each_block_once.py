"""Tests that count how often one run reads, hashes, weighs and decomposes an attention block."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from characters import tokenizer
from harness import WEIGHTS, Pessa, TinyFolder, copy_of

from pessa_cli.calibration import collect, trial_cuts
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.jobs import in_order
from pessa_cli.models import hooks
from pessa_cli.surgery import attention_block, decomposition

TEXTS = ("one two three four five six seven eight nine ten " * 6, "a b c d e f g h i j k l m n o p q r s t u v " * 6)
BUDGET = ("--target-attention", "0.7")


class Counts(NamedTuple):
    """Per block: reads of W_Q from the file, SHA-256 of the weights, weighings by statistics, SVDs of V-O."""

    reads: int
    hashes: int
    weighings: int
    decompositions: int


@pytest.fixture
def folder(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """Return a tiny BERT with a tokenizer, and calibration data of several windows beside it."""
    made = copy_of(tiny_folder("bert"), tmp_path / "bert")
    tokenizer().save_pretrained(made)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(TEXTS[number % 2][number:])
    return made


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch, pessa: Pessa) -> Callable[..., Counts]:
    """`count("prune", ...)`: run a command and return the largest counts over all blocks."""
    seen: Counter[tuple[str, str]] = Counter()

    def counted(owner: Any, name: str, key: Callable[..., str], kind: str) -> None:
        function = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            seen[kind, key(*args, **kwargs)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    counted(CheckpointReader, "get", lambda _, name: name, "reads")
    for module in (decomposition, collect):
        counted(module, "fingerprint", lambda weights: str(weights.v.double().sum().item()), "hashes")
    counted(attention_block, "weigh", lambda _found, site, _bias: site.name, "weighings")
    # However the code is divided: the SVDs of cores of one size, of which every block has as many.
    for name in ("svd", "svdvals"):
        counted(torch.linalg, name, lambda *_args, **_kwargs: "all", "svd")

    def run(*arguments: object) -> Counts:
        seen.clear()
        result = pessa(*arguments)
        assert result.code == 0, result.err
        reads = max(number for (kind, name), number in seen.items() if kind == "reads" and ".query.weight" in name)
        hashes, weighings = (
            max((number for (kind, _), number in seen.items() if kind == wanted), default=0)
            for wanted in ("hashes", "weighings")
        )
        svds = seen["svd", "all"]
        assert svds % 4 == 0  # of Q-K and V-O of two blocks
        return Counts(reads, hashes, weighings, svds // 4)

    return run


def test_a_plain_prune(folder: Path, tmp_path: Path, count: Callable[..., Counts]) -> None:
    """The second reading is for the writing."""
    assert count("prune", folder, "-o", tmp_path / "out", *BUDGET) == Counts(2, 0, 0, 1)
    assert count("inspect", folder, *BUDGET) == Counts(1, 0, 0, 1)
    assert count("decompose", folder, "-o", tmp_path / "full") == Counts(2, 0, 0, 1)
    assert count("prune", tmp_path / "full", "-o", tmp_path / "sliced", *BUDGET) == Counts(1, 0, 0, 0)


def data(tmp_path: Path) -> list[object]:
    return [argument for number in range(6) for argument in ("--calibrate", tmp_path / f"{number}.txt")]


def test_a_prune_with_statistics_on_file(folder: Path, tmp_path: Path, count: Callable[..., Counts]) -> None:
    """Collecting and saving them hashes each block once, and so does comparing them with the weights."""
    collecting = count("inspect", folder, *BUDGET, *data(tmp_path), "--statistics", tmp_path / "found")
    assert collecting == Counts(1, 1, 2, 2)
    pruning = count("prune", folder, "-o", tmp_path / "out", *BUDGET, "--statistics", tmp_path / "found")
    assert pruning == Counts(2, 1, 1, 1)


def test_a_calibrated_prune(folder: Path, tmp_path: Path, count: Callable[..., Counts]) -> None:
    """There are two statistics, and one decomposition by each: trial cuts must not see the inputs they are tried on."""
    assert count("prune", folder, "-o", tmp_path / "out", *BUDGET, *data(tmp_path)) == Counts(1, 0, 2, 2)


def test_a_calibrated_prune_in_sequence(folder: Path, tmp_path: Path, count: Callable[..., Counts]) -> None:
    """One decomposition more, by the statistics of the unpruned model, which determine the ranks."""
    found = count("prune", folder, "-o", tmp_path / "out", *BUDGET, *data(tmp_path), "--sequential")
    assert found == Counts(1, 0, 3, 3)


def test_a_search(llama: Path, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every budget that is tried, and the writing, cut the same decomposition."""
    (tmp_path / "story.txt").write_text(TEXTS[0])
    read: Counter[str] = Counter()
    get = CheckpointReader.get

    def counted(self: CheckpointReader, name: str) -> torch.Tensor:
        read[name] += 1
        return get(self, name)

    monkeypatch.setattr(CheckpointReader, "get", counted)
    limit = ("--max-ppl-increase", "90%", "--evaluate", tmp_path / "story.txt")
    result = pessa("prune", llama, "-o", tmp_path / "out", *limit, "--json")
    assert len(json.loads(result.out)["search"]["tried"]) > 3
    assert {number for name, number in read.items() if ".q_proj." in name} == {2}


@pytest.mark.parametrize("user", ["collect", "trial_cuts"])
def test_the_reference_runs_once_on_each_input(
    user: str, folder: Path, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once on every window of the data for the statistics, and once on each of those that are held out for trials."""
    runs: Counter[str] = Counter()
    run = hooks.output_of

    def counted(model: Any, inputs: Any) -> Any:
        runs[str(inputs["input_ids"].tolist())] += 1
        return run(model, inputs)

    monkeypatch.setattr(f"pessa_cli.calibration.{user}.output_of", counted)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"{number} is a text of its own")
    assert pessa("prune", folder, "-o", tmp_path / "out", *BUDGET, *data(tmp_path)).code == 0
    assert len(runs) == {"collect": 6, "trial_cuts": 2}[user]
    assert set(runs.values()) == {1}


def test_trials_in_little_memory_give_the_same_statistics(
    folder: Path, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the calls of the blocks do not fit, the trials take the inputs in groups."""
    found: list[dict[str, dict[str, torch.Tensor]]] = []
    trial = trial_cuts.try_out

    def recorded(*args: Any) -> dict[str, dict[str, torch.Tensor]]:
        found.append(trial(*args))
        return found[-1]

    monkeypatch.setattr(collect, "try_out", recorded)
    for name, most in (("all", None), ("few", 0)):
        if most is not None:
            monkeypatch.setattr(collect, "try_out", lambda *args: recorded(*args[:4], 0, args[5]))
        assert pessa("prune", folder, "-o", tmp_path / name, *BUDGET, *data(tmp_path)).code == 0
    for name, one in found[0].items():
        for field in ("output", "tried", "harm"):
            torch.testing.assert_close(one[field], found[1][name][field], rtol=1e-9, atol=0)


def test_jobs_reach_calibration_trials_and_sequence(
    folder: Path, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass over the blocks works on as many at a time as --jobs says, and the bytes do not depend on it."""
    given: list[int] = []

    def recorded(function: Any, items: Any, jobs: int) -> Any:
        given.append(jobs)
        return in_order(function, items, jobs)

    monkeypatch.setattr(decomposition, "in_order", recorded)
    for jobs in (1, 3):
        given.clear()
        out = tmp_path / f"jobs {jobs}"
        assert pessa("prune", folder, "-o", out, *BUDGET, *data(tmp_path), "--sequential", "--jobs", jobs).code == 0
        assert len(given) == 4  # trials, ranks, and two blocks in sequence
        assert set(given) == {jobs}
    assert (tmp_path / "jobs 1" / WEIGHTS).read_bytes() == (tmp_path / "jobs 3" / WEIGHTS).read_bytes()
