"""The places of outputs: what is replaced, what is left alone, and what a failure or a second run leaves behind."""

from __future__ import annotations

import os
import resource
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from harness import Pessa, TinyFolder, copy_of, is_refusal, snapshot
from kill_sweep import COMMANDS, Sweep, make_world
from tuned import sums, with_tokenizer

from pessa_cli.checkpoint.places import JOURNAL_FILE
from pessa_cli.checkpoint.shards import ShardWriter
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import check_writable, disk_error, whole_file, write_file

PRUNE = ("prune", "llama", "-o", "out", "--ratio", "0.3", "--max-shard-size", "20kB")


@pytest.fixture
def here(place: Path, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a small model in `llama`."""
    copy_of(tiny_folder("llama"), place / "llama")
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def during(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """`during(change)`: do this once while the next run writes its weights."""

    def arrange(change: Callable[[], object]) -> None:
        write, left = ShardWriter.write, iter([change])

        def disturbed(*given: Any) -> None:
            if found := next(left, None):
                found()
            write(*given)

        monkeypatch.setattr(ShardWriter, "write", disturbed)

    return arrange


def folder_with(path: Path, name: str = "thesis.tex") -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("mine")
    return path


# Moments: kills, races and full disks. scripts/kill_sweep.py has all of them.

POINTS = {"prune": 20, "prune --force": 20, "export to openai-whisper": 10, "tune": 4}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("sweep") / "world"
    place.mkdir()
    make_world(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_or_joined_at_any_operation(name: str, world: Path, tmp_path: Path) -> None:
    sweep = Sweep(COMMANDS[name], world, tmp_path)
    sweep.kill(POINTS.get(name, 6))
    sweep.race(2 if name == "tune" else 3)
    assert sweep.faults == []
    assert sweep.found["output complete"]
    assert sweep.found["output absent"] + sweep.found["the old output stands"]


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
@pytest.mark.parametrize("name", ["prune", "tune"])
def test_a_disk_that_is_full(name: str, world: Path, tmp_path: Path) -> None:
    sweep = Sweep(COMMANDS[name], world, tmp_path)
    sweep.fill(3)
    assert sweep.faults == []
    assert sweep.found["full disk: one error"] > 1


def test_a_disk_without_room_is_noticed_before_the_work(
    here: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "pessa_cli.surgery.decomposition.decompose_block", lambda *_, **__: pytest.fail("a block was decomposed")
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(total=10**9, free=10_000))
    before = snapshot(here)
    is_refusal(pessa(*PRUNE), "out takes", "only 10,000 are free", "-o on another disk")
    is_refusal(pessa("decompose", "llama", "-o", "out"), "out takes", "only 10,000 are free")
    assert snapshot(here) == before


# What appears at the place of an output while it is written.


@pytest.mark.parametrize("what", ["folder", "empty folder", "file", "link", "model"])
def test_what_appears_during_the_run_stays(
    what: str, here: Path, pessa: Pessa, during: Callable[[Callable[[], object]], None]
) -> None:
    out = here / "out"
    appearing: dict[str, Callable[[], object]] = {
        "folder": lambda: folder_with(out),
        "empty folder": out.mkdir,
        "file": lambda: out.write_text("mine"),
        "link": lambda: out.symlink_to("llama"),
        "model": lambda: shutil.copytree(here / "llama", out),
    }
    during(appearing[what])
    before = snapshot(here / "llama")
    result = pessa(*PRUNE)
    is_refusal(result, "out was left as it is: something has appeared there", ".out.partial/output")
    assert snapshot(here / "llama") == before
    if what == "folder":
        assert (out / "thesis.tex").read_text() == "mine"
    out.rename(here / "theirs")
    is_refusal(pessa(*PRUNE), "holds the finished output of an earlier run", ".out.partial/output")
    assert pessa(*PRUNE, "--resume").code == 0
    assert pessa("verify", "out").code == 0
    assert sorted(path.name for path in here.iterdir()) == ["llama", "out", "theirs", "tmp"]


@pytest.mark.parametrize("change", ["another folder", "the same content", "a file in it", "a file instead", "nothing"])
def test_force_replaces_only_what_was_there_at_the_start(
    change: str, here: Path, pessa: Pessa, during: Callable[[Callable[[], object]], None]
) -> None:
    assert pessa(*PRUNE[:4], "--rank", 3).code == 0
    old, out = here / "before", here / "out"

    def changing() -> None:
        if change == "a file in it":
            folder_with(out)
            return
        out.rename(old)
        if change == "another folder":
            folder_with(out)
        elif change == "the same content":
            shutil.copytree(old, out)
        elif change == "a file instead":
            out.write_text("mine")

    during(changing)
    result = pessa(*PRUNE, "--force")
    if change == "nothing":  # the old output was moved away
        assert result.code == 0, result
        return
    is_refusal(result, "out was left as it is", ".out.partial/output")
    if change == "the same content":
        assert snapshot(out) == snapshot(old)
    else:
        assert (out if out.is_file() else out / "thesis.tex").read_text() == "mine"
    assert pessa("verify", old if old.exists() else ".out.partial/output").code == 0


def test_a_replacement_that_was_interrupted_is_undone_or_finished(here: Path, pessa: Pessa) -> None:
    """What a killed run leaves between its two renames, and after the second."""
    assert pessa(*PRUNE[:4], "--rank", 3).code == 0
    partial = here / ".out.partial"
    partial.mkdir()
    (partial / JOURNAL_FILE).write_text('{"finished": {}}')
    old = snapshot(here / "out")
    (here / "out").rename(partial / "replaced")
    is_refusal(pessa(*PRUNE), "out exists", "--force")
    assert snapshot(here / "out") == old
    assert not partial.exists()
    partial.mkdir()
    folder_with(partial / "replaced")
    (partial / JOURNAL_FILE).write_text('{"finished": {}}')
    assert pessa(*PRUNE, "--force").code == 0
    assert pessa("verify", "out").code == 0
    assert not partial.exists()
    folder_with(partial / "replaced")
    folder_with(partial / "output")
    (partial / JOURNAL_FILE).write_text('{"finished": {}}')
    before = snapshot(here)
    is_refusal(pessa(*PRUNE, "--force"), ".out.partial/replaced", "something else has appeared")
    assert snapshot(here) == before


# What is in the way of the temporary folder.


@pytest.mark.parametrize("what", ["link", "dangling link", "file", "folder", "folder with a damaged journal"])
@pytest.mark.parametrize("line", [PRUNE, ("export", "whisper", "--to", "openai-whisper", "-o", "out.pt")], ids=str)
def test_a_partial_folder_that_is_not_ours_is_left_alone(
    what: str, line: tuple[str, ...], here: Path, pessa: Pessa, tiny_folder: TinyFolder
) -> None:
    copy_of(tiny_folder("whisper"), here / "whisper")
    partial, mine = here / f".{line[line.index('-o') + 1]}.partial", folder_with(here / "mine")
    if "link" in what:
        partial.symlink_to(mine if what == "link" else "nowhere")
    elif what == "file":
        partial.write_text("mine")
    else:
        folder_with(partial)
        if "damaged" in what:
            (partial / JOURNAL_FILE).write_text("{")
    before = snapshot(here)
    result = pessa(*line)
    is_refusal(result, str(partial.name), "is a " + what.rpartition("dangling ")[2].split()[0], "move it away")
    assert snapshot(here) == before
    assert os.path.lexists(partial)


def test_an_empty_partial_folder_is_used(here: Path, pessa: Pessa) -> None:
    """A run that was killed before it wrote its journal leaves one."""
    (here / ".out.partial").mkdir()
    assert pessa(*PRUNE).code == 0
    assert sorted(path.name for path in here.iterdir()) == ["llama", "out", "tmp"]


def test_a_run_does_not_delete_the_partial_folder_of_the_next_one(
    here: Path, pessa: Pessa, during: Callable[[Callable[[], object]], None]
) -> None:
    partial = here / ".out.partial"

    def another() -> None:
        partial.rename(here / "moved")
        folder_with(partial / "output")

    during(another)
    assert pessa(*PRUNE).code == 1
    assert (partial / "output" / "thesis.tex").read_text() == "mine"


# What is pessa's, and may be replaced.


def test_every_output_has_a_manifest_and_may_be_replaced(here: Path, pessa: Pessa, tiny_folder: TinyFolder) -> None:
    """Those of tune and of ONNX are in the tests of these."""
    copy_of(tiny_folder("whisper"), here / "whisper")
    for line in (
        ("prune", "whisper", "--ratio", "0.3"),
        ("decompose", "whisper"),
        ("prune", "llama", "--rank", "3"),
        ("export", "pruned", "--layout", "dense"),
    ):
        if line[0] == "export":
            (here / "out").rename(here / "pruned")
        assert pessa(*line, "-o", "out", "--force").code == 0
        assert pessa("verify", "out").code == 0
    for extra in (".git/config", "sub/notes.txt", "data.csv"):
        folder_with((here / "out" / extra).parent, Path(extra).name)
    (here / "out" / "linked").symlink_to(here)
    before = snapshot(here)
    result = pessa(*PRUNE, "--force")
    is_refusal(result, "did not write", "  .git/config", "  data.csv", "  linked", "  sub/notes.txt", "move it away")
    assert snapshot(here) == before


def test_an_output_whose_files_became_links_is_not_replaced(here: Path, pessa: Pessa) -> None:
    """As DVC and the hub's cache store files: the links lead to the only copies."""
    assert pessa(*PRUNE).code == 0
    (here / "store").mkdir()
    (here / "out" / "config.json").rename(here / "store" / "config.json")
    (here / "out" / "config.json").symlink_to(here / "store" / "config.json")
    before = snapshot(here)
    is_refusal(pessa(*PRUNE, "--force"), "did not write", "  config.json")
    assert snapshot(here) == before


def test_a_dry_run_writes_nothing_and_names_what_is_in_the_way(
    here: Path, pessa: Pessa, tiny_folder: TinyFolder
) -> None:
    with_tokenizer(tiny_folder("llama"), here / "base")
    (here / "story.txt").write_text("a man plays the flute, and the lamp burned until three ships came home. " * 20)
    (here / "out").mkdir()
    before = snapshot(here)
    data = ("--calibrate", "story.txt", "--statistics", "found.safetensors")
    result = pessa("prune", "base", "--ratio", "0.3", *data, "--dry-run", "-o", "out")
    assert result.code == 0, result
    assert "out exists" in result.err
    assert "tokenizer.json  copied" in result.out.splitlines()
    assert snapshot(here) == before


def test_an_interrupted_run_says_how_to_go_on(here: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pessa_cli.workflow.prune.prune_model", interrupted)
    result = pessa(*PRUNE)
    assert result.code == 130
    assert "interrupted" in result.err
    assert "--resume" in result.err
    assert not (here / ".out.partial").exists()


def test_an_adapter_is_not_replaced_by_the_model_it_is_merged_into(
    here: Path, pessa: Pessa, tiny_folder: TinyFolder
) -> None:
    model = with_tokenizer(tiny_folder("llama"), here / "base")
    quick = ("--method", "lora", "--max-steps", 1, "--device", "cpu")
    assert pessa("tune", model, "--data", sums(here / "sums.jsonl"), "-o", "adapter", *quick).code == 0
    before = snapshot(here)
    is_refusal(pessa("merge", "base", "adapter", "-o", "adapter", "--force"), "adapter", "reads from it")
    assert snapshot(here) == before


# Errors before the work.


@pytest.mark.parametrize(
    ("line", "says", "code"),
    [
        ("prune base --calibrate story.txt -o taken", "taken exists", 1),
        ("prune base --calibrate story.txt -o story.txt/out", "Not a directory", 1),
        ("prune base --calibrate story.txt -o out --statistics nowhere/sums", "--statistics nowhere/sums", 2),
        ("prune base --calibrate story.txt -o out --statistics story.txt", "story.txt exists already", 2),
        ("prune base --calibrate story.txt -o out --statistics base/sums", "is inside base, which is only read", 2),
        ("prune base --calibrate story.txt -o out --statistics out", "in the place of the output out", 2),
        ("prune base --calibrate story.txt -o out --statistics ./out", "in the place of the output out", 2),
        ("prune base --calibrate story.txt -o out --statistics .out.partial", "in the place of the output out", 2),
        (
            "prune base --calibrate story.txt -o taken --force --statistics taken/x",
            "in the place of the output taken",
            2,
        ),
        ("decompose base --calibrate story.txt -o out --statistics out", "in the place of the output out", 2),
        ("inspect base --plot base/model.svg", "--plot base/model.svg is inside base, which is only read", 2),
        (f"prune base --calibrate story.txt -o out --statistics {'long' * 75}", "File name too long", 1),
        (f"prune base --calibrate story.txt -o {'long' * 75}", "File name too long", 1),
        ("prune base --calibrate story.txt -o /proc/out", "/proc/out", 1),
        ("decompose base --calibrate story.txt -o taken", "taken exists", 1),
        ("export base --to onnx -o taken", "taken exists", 1),
        ("tune base --data sums.jsonl -o taken", "taken exists", 1),
        ("tune base --data sums.jsonl -o story.txt/out", "Not a directory", 1),
        ("eval base --text story.txt --device nonsense", "--device nonsense", 2),
        ("bench base base --device nonsense", "--device nonsense", 2),
        ("prune base --calibrate story.txt -o out --device nonsense", "--device nonsense", 2),
        (f"verify base base --junit {'long' * 75}", "File name too long", 1),
        (f"inspect base --plot {'long' * 75}.png", "File name too long", 1),
    ],
)
def test_what_is_wrong_with_an_output_is_noticed_before_a_model_is_loaded(
    line: str, says: str, code: int, here: Path, pessa: Pessa, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_tokenizer(tiny_folder("llama"), here / "base")
    (here / "story.txt").write_text("3+4=7 " * 40)
    sums(here / "sums.jsonl")
    folder_with(here / "taken")
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    before = snapshot(here)
    is_refusal(pessa(*line.split()), says, code=code)
    assert snapshot(here) == before


# Single files.


def test_a_file_is_whole_or_as_before(tmp_path: Path) -> None:
    path = tmp_path / "report.xml"
    write_file(path, b"old")
    path.chmod(0o600)
    with pytest.raises(TypeError), whole_file(path) as file:
        file.writelines([b"half", None])  # type: ignore[list-item]
    assert path.read_bytes() == b"old"
    (tmp_path / "link").symlink_to(path)
    write_file(tmp_path / "link", b"new")
    assert path.read_bytes() == b"new"
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(PessaError, match="has appeared during the run") as failed:
        write_file(path, b"other", new=True)
    assert path.read_bytes() == b"new"
    (kept,) = (name for name in tmp_path.iterdir() if name.name.startswith(".pessa-"))
    assert kept.read_bytes() == b"other"
    assert str(kept) in str(failed.value.hint)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match="not a regular file"):
        check_writable(tmp_path / "pipe", "--junit")
    with pytest.raises(PessaError, match="not a regular file"):
        write_file(tmp_path / "pipe", b"")


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "sums"
    write_file(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(PessaError, match="File too large") as failed:
            write_file(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some space" in str(failed.value.hint)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"old"


def test_errors_of_the_disk_inside_other_libraries() -> None:
    found = disk_error(ValueError("Error while serializing: I/O error: No space left on device (os error 28)"))
    assert found is not None
    assert found.errno == 28
    assert disk_error(RuntimeError("PytorchStreamWriter failed writing file data/1")) is not None
    assert disk_error(RuntimeError("basic_ios::clear: iostream error")) is not None  # torch.save to a path, at its end
    assert disk_error(RuntimeError("shape mismatch")) is None


def test_statistics_are_absent_after_an_interrupted_pass(
    here: Path, pessa: Pessa, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pessa_cli.calibration import listeners

    with_tokenizer(tiny_folder("llama"), here / "base")
    (here / "story.jsonl").write_text("".join(f'{{"text": "{i}+{i}="}}\n' for i in range(8)))
    before = snapshot(here)
    line = ("prune", "base", "-o", "out", "--ratio", "0.3", "--calibrate", "story.jsonl", "--statistics", "sums")
    for error in (KeyboardInterrupt(), OSError(5, "Input/output error")):
        monkeypatch.undo()
        monkeypatch.chdir(here)
        seen, real = iter(range(5)), listeners.collect_statistics

        def failing(sites: Any, modules: Any, runs: Any, *rest: Any, error: BaseException = error) -> Any:
            def some() -> Any:
                for each in runs:
                    if next(seen, None) is None:  # noqa: B023
                        raise error
                    yield each

            return real(sites, modules, some(), *rest)  # noqa: B023

        monkeypatch.setattr("pessa_cli.calibration.collect.collect_statistics", failing)
        if isinstance(error, KeyboardInterrupt):
            assert pessa(*line).code == 130
        else:
            is_refusal(pessa(*line), "Input/output error")
        assert snapshot(here) == before


def test_statistics_that_appear_during_the_calibration_are_left(
    here: Path, pessa: Pessa, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pessa_cli.calibration import collect

    with_tokenizer(tiny_folder("llama"), here / "base")
    (here / "story.jsonl").write_text("".join(f'{{"text": "{i}+{i}="}}\n' for i in range(8)))
    save = collect.save

    def late(path: Path, *rest: Any) -> None:
        path.write_text("mine")
        save(path, *rest)

    monkeypatch.setattr(collect, "save", late)
    line = ("prune", "base", "-o", "out", "--ratio", "0.3", "--calibrate", "story.jsonl", "--statistics", "sums")
    is_refusal(pessa(*line), "sums has appeared during the run", ".pessa-")
    assert (here / "sums").read_text() == "mine"
    (kept,) = here.glob(".pessa-*")
    assert pessa("inspect", "base", "--statistics", kept).code == 0


def test_reports_replace_only_reports(here: Path, pessa: Pessa) -> None:
    line = ("verify", "llama", "llama", "--level", "weights", "--junit")
    (here / "notes.md").write_text("mine")
    before = snapshot(here)
    is_refusal(pessa(*line, "notes.md"), "--junit notes.md exists", "not an XML file", code=2)
    assert snapshot(here) == before
    assert pessa(*line, "report.xml").code == 0
    first = (here / "report.xml").read_bytes()
    assert pessa(*line, "report.xml").code == 0
    assert (here / "report.xml").read_bytes() == first
