"""`pessa bench`: its counts are right, its times exist, and unusable models and settings are refused.

No test here asserts how long anything takes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from harness import Pessa, TinyFolder, copy_of, edit_json, is_refusal

from pessa_cli import PessaError, UsageError
from pessa_cli.cli.console import show_bench
from pessa_cli.evaluation.bench import Bench, BenchSettings, Measurement, Runner, cache_bytes, peak_memory
from pessa_cli.surgery.model import open_model

Pruned = Callable[..., Path]
FEW = ("--rounds", 2, "--tokens", 4, "--threads", 1)


@pytest.mark.slow
def test_whisper_against_its_pruned_self(tiny_folder: TinyFolder, pruned: Pruned, pessa: Pessa) -> None:
    folders = tiny_folder("whisper"), pruned("whisper")
    result = pessa("bench", *folders, *FEW, "--batch", 2, "--json")
    assert result.code == 0, result
    found = json.loads(result.out)
    assert (found["reference"], found["candidate"]) == tuple(map(str, folders))
    assert (
        found["settings"] | {"batch": 2, "tokens": 4, "rounds": 2, "threads": 1, "device": "cpu"} == found["settings"]
    )
    measures = {measure["name"]: measure for measure in found["measures"]}
    times = ("forward", "encoder", "generate")
    assert list(measures) == [*times, "peak memory", "cache", "parameters", "weights on disk"]
    for name in times:
        assert [len(runs) for runs in measures[name]["runs"]] == [2, 2]
        assert all(seconds > 0 for runs in measures[name]["runs"] for seconds in runs)
    for folder, side in zip(folders, ("reference", "candidate"), strict=True):
        assert measures["parameters"][side] == tiny.load(folder).num_parameters()
        assert measures["weights on disk"][side] == (folder / "model.safetensors").stat().st_size
        assert measures["peak memory"][side] > 50e6  # torch alone
    assert measures["parameters"]["ratio"] < 1
    # Keys and values of 2 layers in float32, over 30 encoder frames, the start token and 3 of the 4 generated tokens.
    assert measures["cache"]["reference"] == 2 * (2 * 2 * 32 * 4) * (30 + 4)
    assert 0 < measures["cache"]["candidate"] <= measures["cache"]["reference"]


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    measures = [
        Measurement("forward", "seconds", 2.0, 0.5, ([2.0], [0.5])),
        Measurement("generate", "seconds", 0.5, 0.25, ([0.5], [0.25])),
        Measurement("cache", "bytes", 2e6, 1e6),
        Measurement("parameters", "parameters", 0, 12345),
    ]
    show_bench(Bench(BenchSettings(tokens=9, rounds=1), 2, "AVX2", measures), ("original/", "out/"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "cpu, float32, 2 threads, batch 1, medians of 1 alternating runs (AVX2)"
    assert [line.split() for line in lines[1:]] == [
        ["original/", "out/", "ratio"],
        ["forward", "2.00", "s", "500.0", "ms", "0.250"],
        ["generate", "9", "tokens", "500.0", "ms", "250.0", "ms", "0.500"],
        ["cache", "2.0", "MB", "1.0", "MB", "0.500"],
        ["parameters", "0", "12,345"],
    ]


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("whisper", ["forward", "encoder", "generate"]), ("bert", ["forward"]), ("llama", ["forward", "generate"])],
)
def test_kinds_of_runs_for_each_architecture(name: str, kinds: list[str], pruned: Pruned) -> None:
    runner = Runner(open_model(pruned(name)), BenchSettings(tokens=4))
    assert runner.answer("kinds") == kinds
    assert all(runner.answer(kind) > 0 for kind in kinds)
    assert ("cache" in runner.answer("facts")) == ("generate" in kinds)


def test_both_models_get_the_same_inputs(tiny_folder: TinyFolder, pruned: Pruned) -> None:
    for name in ("whisper", "llama"):
        models = [open_model(folder) for folder in (tiny_folder(name), pruned(name))]
        runners = [Runner(model, BenchSettings(tokens=4, batch=3)) for model in models]
        first, second = (runner.inputs for runner in runners)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) and len(first[key]) == 3 for key in first)


def test_dtype_and_number_of_tokens(tiny_folder: TinyFolder) -> None:
    runner = Runner(open_model(tiny_folder("llama")), BenchSettings(dtype="bfloat16", tokens=7))
    assert runner.model.dtype == torch.bfloat16
    assert runner.answer("generate") > 0
    length = runner.inputs["input_ids"].shape[1] + 6  # the last generated token is not in the cache
    assert runner.cache == 2 * 2 * 2 * 8 * 2 * length  # layers, keys and values, heads, width, bytes
    assert runner.answer("facts")["cache"] == runner.cache


def test_shared_cache_memory_counts_once() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    keys = torch.zeros(1, 2, 3, 4)
    cache.update(keys, torch.zeros(1, 2, 3, 4), 0)
    once = cache_bytes(cache)
    assert once == 2 * 24 * 4
    cache.layers[0].values = cache.layers[0].keys
    assert cache_bytes(cache) == once / 2


def test_peak_memory_stays_after_memory_is_freed() -> None:
    block = torch.ones(50_000_000)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    assert resident > block.nbytes
    del block
    assert peak_memory() >= resident * 0.99  # the kernel counts pages in batches


@pytest.mark.slow
def test_models_that_cannot_be_run(tiny_folder: TinyFolder, pessa: Pessa, place: Path) -> None:
    whisper = tiny_folder("whisper")
    (place / "nothing").mkdir()
    is_refusal(pessa("bench", whisper, place / "nothing"), "nothing")
    is_refusal(pessa("bench", whisper, place / "gone"), "gone")
    is_refusal(pessa("bench", whisper, tiny_folder("bert")), "a whisper of", "a bert of")
    is_refusal(pessa("bench", whisper, whisper, "--tokens", 400), "40 positions", code=2)  # from the worker process
    nameless = copy_of(whisper, place / "nameless")
    edit_json(lambda config: config.update(vocab_size=90))(nameless)
    with pytest.raises(PessaError, match="embed_tokens"):
        Runner(open_model(nameless), BenchSettings())


@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ({"rounds": 0}, "--rounds 0"),
        ({"threads": 0}, "--threads 0"),
        ({"batch": -1}, "--batch -1"),
        ({"tokens": 0}, "--tokens 0"),
        ({"device": "warp"}, "--device warp"),
        ({"dtype": "int8"}, "--dtype int8"),
    ],
)
def test_invalid_settings_are_refused(options: dict[str, int], culprit: str) -> None:
    with pytest.raises(UsageError, match=culprit):
        BenchSettings(**options)  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_killed_worker_process_is_reported(tiny_folder: TinyFolder) -> None:
    import signal

    from pessa_cli.evaluation.bench import _worker

    with _worker(open_model(tiny_folder("bert")), BenchSettings()) as worker:
        os.kill(worker.process.pid, signal.SIGKILL)
        with pytest.raises(PessaError, match="ended with code -9"):
            worker.ask("kinds")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(tiny_folder: TinyFolder, pruned: Pruned, pessa: Pessa) -> None:
    result = pessa("bench", tiny_folder("whisper"), pruned("whisper"), *FEW, "--device", "cuda", "--json")
    assert result.code == 0, result
    memory = next(m for m in json.loads(result.out)["measures"] if m["name"] == "peak memory")
    assert 0 < memory["reference"] < 50e6
