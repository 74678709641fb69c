"""Links in a model folder: those into the folder and the hub's cache are followed, others only if the user says so."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from harness import Pessa, TinyFolder, copy_of, is_refusal, snapshot

RULE = ("--rank", "3")


@pytest.fixture
def model(tiny_folder: TinyFolder, place: Path) -> Path:
    folder = copy_of(tiny_folder("bert"), place / "model")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def secret(place: Path) -> Path:
    (place / "secret.txt").write_text("private")
    return place / "secret.txt"


def linked(folder: Path, to: Callable[[Path], Path]) -> None:
    """Move each file of a folder to the place that `to` gives, and leave a link to it."""
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        target = to(path.relative_to(folder))
        target.parent.mkdir(parents=True, exist_ok=True)
        path.rename(target)
        path.symlink_to(target)


def test_a_folder_of_links(model: Path, place: Path, pessa: Pessa) -> None:
    """As of DVC and git-annex: it is refused with the names, and complete with --follow-links."""
    assert pessa("prune", model, "-o", place / "expected", *RULE).code == 0
    linked(model, lambda name: place / "store" / name)
    before = snapshot(place)
    result = pessa("prune", model, "-o", place / "out", *RULE)
    store = (place / "store").resolve()
    names = ("config.json", "tokenizer.json", "1_Pooling/config.json", "model.safetensors")
    is_refusal(result, *(f"{name} -> {store / name}" for name in names), "--follow-links")
    assert snapshot(place) == before
    assert pessa("prune", model, "-o", place / "out", *RULE, "--follow-links").code == 0
    assert snapshot(place / "out") == snapshot(place / "expected")
    assert not [path for path in (place / "out").rglob("*") if path.is_symlink()]


@pytest.mark.parametrize(
    "command",
    [
        *("inspect", "prune", "decompose", "verify", "eval", "merge", "export"),
        pytest.param("bench", marks=pytest.mark.slow),
    ],
)
def test_each_command_refuses_and_follows(command: str, model: Path, secret: Path, place: Path, pessa: Pessa) -> None:
    (model / "vocab.txt").symlink_to(secret)
    other = {"verify": (model,), "bench": (model,), "merge": (place,), "eval": ("--text", secret)}.get(command, ())
    line = [command, model, *other]
    if command in ("prune", "decompose", "merge", "export"):
        line += ["-o", place / "out"]
    refused = pessa(*line)
    is_refusal(refused, f"vocab.txt -> {secret.resolve()}", "--follow-links")
    assert not (place / "out").exists()
    assert "lead out" not in pessa(*line, "--follow-links").err


def test_a_link_to_a_secret_beside_pickled_weights(model: Path, secret: Path, place: Path, pessa: Pessa) -> None:
    torch.save(tiny.load(model).state_dict(), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    (model / "vocab.txt").symlink_to(secret)
    before = snapshot(place)
    is_refusal(pessa("prune", model, "-o", place / "out", *RULE, "--allow-pickle"), f"vocab.txt -> {secret.resolve()}")
    assert snapshot(place) == before
    (model / "vocab.txt").unlink()
    assert pessa("prune", model, "-o", place / "out", *RULE, "--allow-pickle").code == 0
    (model / "pytorch_model.bin").rename(place / "elsewhere.bin")
    (model / "pytorch_model.bin").symlink_to(place / "elsewhere.bin")
    line = ("prune", model, "-o", place / "again", *RULE, "--allow-pickle")
    is_refusal(pessa(*line), "pytorch_model.bin -> ")
    assert pessa(*line, "--follow-links").code == 0


def _inside(model: Path, _: Path) -> None:
    (model / "vocab.txt").symlink_to("tokenizer.json")
    (model / "2_Pooling").symlink_to("1_Pooling")


def _annex(model: Path, _: Path) -> None:
    linked(model, lambda name: model / ".git" / "annex" / "objects" / str(name).replace("/", "-"))


def _local_dir(model: Path, place: Path) -> None:
    linked(model, lambda name: place / "hub" / "models--a--b" / "blobs" / str(name).replace("/", "-"))


def _not_the_model(model: Path, place: Path) -> None:
    """No output takes these over."""
    (place / "private").mkdir()
    shutil.copyfile(place / "secret.txt", place / "private" / "key.txt")
    for name in ("runs", ".git", "checkpoint-500"):
        (model / name).symlink_to(place / "private")
    for name in (".netrc", "optimizer.pt", "tf_model.h5"):
        (model / name).symlink_to(place / "secret.txt")


ALLOWED = {"inside": _inside, "git-annex": _annex, "local-dir of the hub": _local_dir, "not copied": _not_the_model}


@pytest.mark.parametrize("case", ALLOWED)
def test_links_that_are_followed(case: str, model: Path, secret: Path, place: Path, pessa: Pessa) -> None:
    assert secret.exists()
    ALLOWED[case](model, place)
    result = pessa("prune", model, "-o", place / "out", *RULE)
    assert result.code == 0, result
    out = place / "out"
    assert (out / "tokenizer.json").read_text() == (out / "1_Pooling" / "config.json").read_text() == "{}"
    assert not [path for path in out.rglob("*") if path.is_symlink()]
    assert not [path for path in out.rglob("*") if path.is_file() and b"private" in path.read_bytes()]
    if case == "inside":
        assert (out / "vocab.txt").read_text() == (out / "2_Pooling" / "config.json").read_text() == "{}"


def test_a_snapshot_of_the_hub(model: Path, place: Path, secret: Path, pessa: Pessa) -> None:
    """Links lead to the blobs of the repository; in a folder that is only named like one they lead nowhere else."""
    snapshot_folder = place / "cache" / "snapshots" / "abc"
    snapshot_folder.parent.mkdir(parents=True)
    model.rename(snapshot_folder)
    linked(snapshot_folder, lambda name: place / "cache" / "blobs" / str(name).replace("/", "-"))
    result = pessa("prune", snapshot_folder, "-o", place / "out", *RULE)
    assert result.code == 0, result
    assert (place / "out" / "1_Pooling" / "config.json").exists()
    for name in ("secret.txt", "cache/key", "blobs/key"):
        (place / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(secret, place / name) if name != "secret.txt" else None
        (snapshot_folder / "vocab.txt").symlink_to(place / name)
        is_refusal(pessa("inspect", snapshot_folder), f"vocab.txt -> {(place / name).resolve()}")
        (snapshot_folder / "vocab.txt").unlink()


def test_a_model_that_is_itself_a_link(model: Path, place: Path, pessa: Pessa) -> None:
    (place / "name").symlink_to(model)
    assert pessa("prune", place / "name", "-o", place / "out", *RULE).code == 0
    assert (place / "out" / "tokenizer.json").exists()


def _chain(model: Path, secret: Path) -> None:
    (model / ".hidden").symlink_to(secret)
    (model / "bad").symlink_to(".hidden")


def _folder(model: Path, secret: Path) -> None:
    (secret.parent / "private").mkdir()
    secret.rename(secret.parent / "private" / "key")
    (model / "bad").symlink_to(secret.parent / "private")


REFUSED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a chain": (_chain, "out of it"),
    "a folder": (_folder, "out of it"),
    "in a folder": (lambda model, secret: (model / "1_Pooling" / "bad").symlink_to(secret), "out of it"),
    "weights beside the model": (lambda model, secret: (model / "bad.safetensors").symlink_to(secret), "out of it"),
    "nowhere": (lambda model, _: (model / "bad").symlink_to("nothing"), "no file"),
    "itself": (lambda model, _: (model / "bad").symlink_to("bad"), "no file"),
    "a folder above": (lambda model, _: (model / "1_Pooling" / "bad").symlink_to(".."), "no file"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_links_that_are_not_followed(case: str, model: Path, secret: Path, place: Path, pessa: Pessa) -> None:
    make, says = REFUSED[case]
    make(model, secret)
    before = snapshot(place / "model")
    is_refusal(pessa("prune", model, "-o", place / "out", *RULE), "bad", "->", says)
    again = pessa("prune", model, "-o", place / "out", *RULE, "--follow-links", "--unknown-weights", "copy")
    assert (again.code == 0) == (says == "out of it"), again
    assert snapshot(place / "model") == before


def test_links_that_multiply_files(model: Path, pessa: Pessa) -> None:
    """Each folder has ten links to the next one: 10^8 folders, without a circle and without a file."""
    for depth in range(8):
        (model / f"d{depth}").mkdir()
        for number in range(10):
            (model / f"d{depth}" / str(number)).symlink_to(model / f"d{depth + 1}")
    (model / "d8").mkdir()
    is_refusal(pessa("inspect", model), str(model), "10,000")


def test_verify_does_not_enter_folders_elsewhere(model: Path, place: Path, pessa: Pessa) -> None:
    assert pessa("prune", model, "-o", place / "out", *RULE).code == 0
    (place / "out" / "1_Pooling").rename(place / "elsewhere")
    (place / "out" / "1_Pooling").symlink_to(place / "elsewhere")
    is_refusal(pessa("verify", place / "out"), "1_Pooling/config.json: missing")


@pytest.mark.parametrize("name", ["tokenizer.json", "1_Pooling/words.txt"])
def test_a_pipe_in_the_place_of_a_file_is_refused(name: str, model: Path, place: Path, pessa: Pessa) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    is_refusal(pessa("prune", model, "-o", place / "out", *RULE), "pipes", name)
    assert not (place / "out").exists()
