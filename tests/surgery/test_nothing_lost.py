"""Outputs appear only when complete: runs that are killed, resumed or concurrent, and sources that change meanwhile."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pessa, TinyFolder, copy_of, edit_json, is_refusal, snapshot
from killing import ended, started
from transformers import LlamaConfig, LlamaForCausalLM

from pessa_cli.checkpoint.places import JOURNAL_FILE
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.checkpoint.shards import ShardWriter
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.block_io import StorageLayout
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.run import Run

OPTIONS = ("--ratio", "0.3", "--max-shard-size", "20kB")


@pytest.fixture
def model(tiny_folder: TinyFolder, place: Path) -> Path:
    return copy_of(tiny_folder("llama"), place / "llama")


def pruned(model: Path, out: Path, **run: Any) -> Path:
    prune_model(open_model(model), out, Rule(ratio=0.3), run=Run(source="llama", shard_bytes=20_000, **run))
    return out


def killed(after: int, *arguments: object) -> int:
    """The command, killed without warning at the n-th write of a tensor."""

    def prepare() -> None:
        write, left = ShardWriter.write, iter(range(after))

        def dying(*given: Any) -> None:
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*given)

        ShardWriter.write = dying  # type: ignore[assignment,method-assign]

    return ended(started(arguments, prepare))


def test_resume_reuses_finished_shards(model: Path, place: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> None:
    assert killed(12, "prune", model, "-o", place / "out", *OPTIONS) == -signal.SIGKILL
    finished = json.loads((place / ".out.partial" / JOURNAL_FILE).read_text())["finished"]
    assert len(finished) > 1
    begun: list[str] = []
    start = ShardWriter.__init__

    def noting(self: ShardWriter, path: Path, *rest: Any) -> None:
        begun.append(path.name)
        start(self, path, *rest)

    monkeypatch.setattr(ShardWriter, "__init__", noting)
    assert pessa("prune", model, "-o", place / "out", *OPTIONS, "--resume").code == 0
    assert set(begun) | set(finished) == set(CheckpointReader(place / "out").files)
    assert not set(begun) & set(finished)


def test_resume_refuses_another_run_and_replaces_a_damaged_shard(model: Path, place: Path, pessa: Pessa) -> None:
    whole = snapshot(pruned(model, place / "whole"))
    assert killed(12, "prune", model, "-o", place / "out", *OPTIONS) == -signal.SIGKILL
    other = ("--ratio", "0.5", "--max-shard-size", "20kB")
    is_refusal(pessa("prune", model, "-o", place / "out", *other, "--resume"), "another source, options or version")
    shard = min((place / ".out.partial" / "output").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert pessa("prune", model, "-o", place / "out", *OPTIONS, "--resume").code == 0
    assert snapshot(place / "out") == whole


def test_resume_without_an_earlier_run(model: Path, place: Path, pessa: Pessa) -> None:
    assert pessa("prune", model, "-o", place / "out", *OPTIONS, "--resume").code == 0
    assert snapshot(place / "out") == snapshot(pruned(model, place / "whole"))


@pytest.mark.parametrize("layout", ["compact", "dense"])
def test_the_bytes_do_not_depend_on_jobs(layout: StorageLayout, place: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=256, intermediate_size=64, num_hidden_layers=4,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "model")
    found = []
    for jobs, threads in ((1, 1), (1, 2), (2, 1), (3, 2)):
        torch.set_num_threads(threads)
        out = place / f"out-{jobs}-{threads}"
        prune_model(
            open_model(place / "model"),
            out,
            Rule(ratio=0.3),
            layout=layout,
            run=Run(jobs=jobs),
        )
        assert torch.get_num_threads() == threads
        found.append(snapshot(out))
    torch.set_num_threads(1)
    assert all(other == found[0] for other in found)


@pytest.mark.slow
def test_two_runs_into_the_same_folder(model: Path, place: Path, pessa: Pessa) -> None:
    waiting = "import os; from pessa_cli.checkpoint.shards import ShardWriter; "
    waiting += "ShardWriter.put = lambda *_: (print(1, flush=True), os.read(0, 1)); "
    code = waiting + "from pessa_cli.cli.main import main; main()"
    line = [sys.executable, "-c", code, "prune", str(model), "-o", str(place / "out"), *OPTIONS]
    first = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert first.stdout is not None
    first.stdout.readline()
    before = snapshot(place)
    is_refusal(pessa("prune", model, "-o", place / "out", *OPTIONS), "another run is writing", ".out.partial")
    is_refusal(pessa("prune", model, "-o", place / "out", *OPTIONS, "--resume"), "another run is writing")
    assert snapshot(place) == before
    first.kill()
    first.communicate()
    assert pessa("prune", model, "-o", place / "out", *OPTIONS, "--resume").code == 0


@pytest.mark.parametrize("change", ["touched", "shorter", "replaced", "gone"])
def test_a_source_that_changes_during_the_run(
    change: str, model: Path, place: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = model / "model.safetensors"
    write, left = ShardWriter.write, iter(range(6))

    def changing(*arguments: Any) -> None:
        if next(left, None) is None:
            if change == "touched":
                os.utime(weights, ns=(1, 1))
            elif change == "shorter":
                os.truncate(weights, 1000)
            elif change == "replaced":
                shutil.copy(weights, place / "copy")
                (place / "copy").replace(weights)
            else:
                weights.unlink(missing_ok=True)
        write(*arguments)

    monkeypatch.setattr(ShardWriter, "write", changing)
    result = pessa("prune", model, "-o", place / "out", "--ratio", "0.3")
    is_refusal(result, str(model))
    assert sorted(path.name for path in place.iterdir()) == ["llama", "tmp"]


@pytest.mark.parametrize("after", [3, 14])
def test_a_read_error(after: int, model: Path, place: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error occurs while blocks are decomposed, or while the output is written."""
    left = iter(range(after))
    at = CheckpointReader._at

    def faulty(self: CheckpointReader, name: str) -> Any:
        if next(left, None) is None:
            raise OSError(5, "Input/output error", str(model / "model.safetensors"))
        return at(self, name)

    monkeypatch.setattr(CheckpointReader, "_at", faulty)
    is_refusal(pessa("prune", model, "-o", place / "out", "--ratio", "0.3"), "Input/output error", str(model))
    assert sorted(path.name for path in place.iterdir()) == ["llama", "tmp"]


def test_a_full_disk_after_finished_shards_leaves_only_them(
    model: Path, place: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = snapshot(pruned(model, place / "whole"))
    shutil.rmtree(place / "whole")
    write, left = ShardWriter.write, iter(range(12))

    def faulty(*arguments: Any) -> None:
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", faulty)
        result = pessa("prune", model, "-o", place / "out", *OPTIONS)
    is_refusal(result, "No space left", "free some space", "--resume", "rm -r", ".out.partial")
    assert not (place / "out").exists()
    assert pessa("prune", model, "-o", place / "out", *OPTIONS, "--resume").code == 0
    assert snapshot(place / "out") == whole


def test_the_manifest(model: Path, place: Path) -> None:
    import hashlib

    written = prune_model(open_model(model), place / "out", Rule(rank=3), run=Run(source="llama as typed"))
    manifest = json.loads((place / "out" / "pessa.json").read_text())
    files = {path.name: path for path in (place / "out").iterdir() if path.name not in ("pessa.json", "README.md")}
    assert manifest["sha256"] == {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in sorted(files.items())}
    source = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(model.iterdir())}
    assert manifest["source_sha256"] == source
    assert manifest["source"] == "llama as typed"
    assert manifest["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    for site in open_model(model).attention:
        assert manifest["ranks"][site.name] == {"qk": "8 8", "vo": "3 3"}
        spectrum = written.spectra[site.name].seams["vo"]
        assert manifest["dropped"][site.name]["qk"] is None
        assert manifest["dropped"][site.name]["vo"] == pytest.approx([(row[3:] ** 2).sum() ** 0.5 for row in spectrum])


def test_verify_alone_checks_a_folder_against_its_manifest(model: Path, place: Path, pessa: Pessa) -> None:
    out = pruned(model, place / "out")
    assert pessa("verify", out).code == 0
    assert json.loads(pessa("verify", out, "--json").out)["same"] is True
    for damage, says in (
        (lambda: (out / "generation_config.json").unlink(), "generation_config.json: missing"),
        (lambda: (out / "new.txt").write_text(""), "new.txt: not in the manifest"),
        (edit_json(lambda c: c.update(vocab_size=3)), "config.json: changed"),
    ):
        damage(out) if says.startswith("config") else damage()  # type: ignore[call-arg]
        is_refusal(pessa("verify", out), says, str(out))
    is_refusal(pessa("verify", model), "pessa.json")


@pytest.mark.parametrize("command", [("prune", "--ratio", "0.3"), ("decompose",)])
def test_a_dry_run_gives_the_same_plan_and_writes_nothing(
    command: tuple[str, ...], model: Path, place: Path, pessa: Pessa
) -> None:
    name, *options = command
    line = (name, model, "-o", place / "out", *options, "--max-shard-size", "20kB", "--json")
    before = snapshot(place)
    planned = json.loads(pessa(*line, "--dry-run").out)
    shown = pessa(*line[:-1], "--dry-run")
    assert snapshot(place) == before
    assert json.loads(pessa(*line).out) == planned
    reader = CheckpointReader(place / "out")
    assert list(planned["shards"]) == reader.files
    assert sum(planned["shards"].values()) == sum(info.nbytes for info in reader.header.values())
    assert all(file in shown.out for file in reader.files)
    assert planned["ranks"]["decoder.self.1"]["vo"] in shown.out


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"])
def test_a_nan_outside_attention_is_not_copied(name: str, model: Path, place: Path, pessa: Pessa) -> None:
    from harness import edit_weights

    edit_weights(lambda tensors: tensors[name].view(-1)[-1].fill_(float("nan")))(model)
    is_refusal(pessa("prune", model, "-o", place / "out"), name, "NaN", str(model))
    assert sorted(path.name for path in place.iterdir()) == ["llama", "tmp"]


@pytest.mark.parametrize("options", [("--jobs", "-1"), ("--device", "cuda:77"), ("--max-shard-size", "big")])
def test_invalid_options_of_a_run(options: tuple[str, str], model: Path, place: Path, pessa: Pessa) -> None:
    is_refusal(pessa("prune", model, "-o", place / "out", *options), *options, code=2)
