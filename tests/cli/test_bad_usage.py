"""Invalid options, recipes and output folders: the errors and exit codes, and that no files are left behind."""

from __future__ import annotations

import errno
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from harness import (
    PESSA,
    WEIGHTS,
    Pessa,
    Tensors,
    TinyFolder,
    copy_of,
    edit_json,
    edit_weights,
    is_refusal,
    snapshot,
)

from pessa_cli.checkpoint.shards import ShardWriter

Refuse = Callable[..., None]
WRITE = ShardWriter.write


@pytest.fixture
def refuse(pessa: Pessa, place: Path, tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Run a command that must fail in a folder that must not change: `refuse("prune whisper", "--out", code=2)`."""
    monkeypatch.chdir(place)
    for name in ("whisper", "llama"):
        if not (place / name).exists():
            copy_of(tiny_folder(name), place / name)

    def check(line: str, *culprits: str, code: int = 1) -> None:
        before = snapshot(place)
        is_refusal(pessa(*line.split()), *culprits, code=code)
        assert snapshot(place) == before

    return check


@pytest.mark.parametrize("command", ["inspect whisper", "prune whisper -o out"])
@pytest.mark.parametrize(
    ("options", "culprit"),
    [
        ("--qk-thr -1", "--qk-thr -1"),
        ("--vo-thr nan", "--vo-thr nan"),
        ("--qk-thr inf", "--qk-thr inf"),
        ("--ratio 1", "--ratio 1"),
        ("--ratio -0.1", "--ratio -0.1"),
        ("--ratio nan", "--ratio nan"),
        ("--rank 0", "--rank 0"),
        ("--energy 0", "--energy 0"),
        ("--energy 1.01", "--energy 1.01"),
        ("--energy nan", "--energy nan"),
        ("--round-to 0", "--round-to 0"),
        ("--min-rank -1", "--min-rank -1"),
        ("--qk-thr 1 --ratio 0.5", "--qk-thr/--vo-thr and --ratio"),
        ("--rank 3 --energy 0.9", "--rank and --energy"),
        ("--lossless --rank 3", "--lossless"),
        ("--sites encoders", "encoder.self, decoder.self, decoder.cross, encoder.mlp, decoder.mlp"),
        ("--sites encoder.self,decode", "--sites decode:"),
        ("--sites ,", "--sites"),
        ("--layers 2", "--layers 2"),
        ("--layers 0-99999", "--layers"),
        ("--layers 1-0", "--layers '1-0'"),
        ("--layers 0,,1", "--layers '0,,1'"),
        ("--layers -1", "--layers '-1'"),
        ("--layers first", "--layers 'first'"),
        ("--as gpt9", "pessa architectures"),
    ],
)
def test_invalid_options(command: str, options: str, culprit: str, refuse: Refuse) -> None:
    refuse(f"{command} {options}", culprit, code=2)


@pytest.mark.parametrize(
    ("line", "culprit"),
    [
        ("prune whisper", "--out"),
        ("prune -o out", "MODEL"),
        ("prune whisper -o out --rank many", "--rank"),
        ("prune whisper -o out --method magic", "magic"),
        ("prune whisper -o out --tresh 3", "--tresh"),
        ("verify whisper whisper --level deep", "deep"),
        ("simplify whisper", "simplify"),
    ],
)
def test_command_lines_that_do_not_parse(line: str, culprit: str, pessa: Pessa) -> None:
    result = pessa(*line.split())
    assert result.code == 2
    assert culprit in result.err
    assert result.out == ""
    assert "Traceback" not in result.err


@pytest.mark.parametrize(("options", "side"), [("--qk-thr 1e9", "Q-K"), ("--vo-thr 1e9", "V-O")])
def test_thresholds_that_prune_everything(options: str, side: str, refuse: Refuse) -> None:
    refuse(f"prune whisper -o out {options}", f"all of {side}", "largest singular value")
    refuse(f"inspect whisper {options}", f"all of {side}", "largest singular value")


@pytest.mark.parametrize(
    ("line", "culprit", "code"),
    [
        ("verify whisper whisper --tolerance nan", "--tolerance nan", 2),
        ("verify whisper whisper --tolerance -1", "--tolerance -1", 2),
        ("verify whisper whisper --min-agreement 1.5", "--min-agreement 1.5", 2),
        ("verify whisper whisper --min-agreement nan", "--min-agreement nan", 2),
        ("verify whisper llama", "encoder.self.0", 1),
        ("verify llama whisper", "decoder.self.0", 1),
        ("verify llama llama-biased", "heads of 12", 1),
        ("verify whisper nowhere", "nowhere does not exist", 1),
        ("verify nowhere whisper", "nowhere does not exist", 1),
        ("verify whisper whisper/config.json", "whisper/config.json is a file", 1),
        ("verify llama llama --audio tone.wav", "--audio", 2),
        ("verify whisper whisper --text words.txt", "--text", 2),
        ("verify whisper whisper --level weights --audio tone.wav", "--audio", 2),
        ("verify llama llama --level weights --text words.txt", "--text", 2),
        ("verify whisper whisper --audio nowhere.wav", "nowhere.wav", 1),
        ("verify whisper whisper --audio words.txt", "words.txt", 1),
        ("verify whisper whisper --audio silence.wav", "silence.wav contains no samples", 1),
        ("verify llama llama --text nowhere.txt", "nowhere.txt", 1),
        ("verify llama llama --text tone.wav", "tone.wav", 1),
        ("verify llama llama --text empty.txt", "empty.txt is empty", 1),
        ("verify llama llama --text words.txt", "tokenizer", 1),
        ("verify whisper whisper --audio tone.wav", "preprocessor", 1),
        ("verify whisper whisper --level weights --junit nowhere/report.xml", "nowhere/report.xml", 2),
    ],
)
def test_invalid_arguments_of_verify(
    line: str, culprit: str, code: int, refuse: Refuse, place: Path, tiny_folder: TinyFolder
) -> None:
    (place / "words.txt").write_text("some words")
    (place / "empty.txt").write_text("")
    soundfile.write(place / "tone.wav", np.sin(np.arange(8000) / 9), 16000)
    soundfile.write(place / "silence.wav", np.zeros(0), 16000)
    copy_of(tiny_folder("llama-biased"), place / "llama-biased")
    refuse(line, culprit, code=code)


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (edit_json(lambda c: c.update(vocab_size=90)), "embed_tokens.weight"),
        (edit_json(lambda c: c.update(d_model="wide")), "d_model"),
        (edit_weights(lambda t: t.pop("model.encoder.layers.0.fc1.weight")), "model.encoder.layers.0.fc1.weight"),
    ],
    ids=["other size", "not a size", "not attention, missing"],
)
def test_a_model_that_transformers_cannot_load(
    damage: Callable[[Path], None], culprit: str, refuse: Refuse, place: Path
) -> None:
    damage(place / "whisper")
    refuse("verify whisper whisper", culprit, "whisper")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ("--plot spectra.gif", 2),
        ("--plot spectra", 2),
        ("--plot nowhere/spectra.png", 2),
        ("--plot folder.png", 2),
    ],
)
def test_plots_that_cannot_be_written(options: str, code: int, refuse: Refuse, place: Path) -> None:
    (place / "folder.png").mkdir()
    refuse(f"inspect whisper {options}", options, code=code)


RECIPES = {
    "not TOML": ("prune = = 3", "recipe.toml is not a readable recipe", 1),
    "not text": ("\udcff", "recipe.toml is not a readable recipe", 1),
    "key of too many parts": ("a" + ".a" * 20_000 + " = 1", "line 1 has 20,000 dots", 1),
    "too large": ("#" * 2**17, "131,072 bytes", 1),
    "unknown table": ("[purge]\nrank = 3", "'purge'", 2),
    "unknown key": ("[prune]\nquality = 3", "'quality'", 2),
    "unknown verify key": ("[verify]\naudio = 'x.wav'", "'audio'", 2),
    "key of the other table": ("[verify]\nrank = 3", "'rank'", 2),
    "key without table": ("rank = 3", "'rank'", 2),
    "no table": ("prune = 3", "prune is not a table", 2),
    "verify no table": ("verify = true", "verify is not a table", 2),
    "text for number": ("[prune]\nqk_thr = '5e-3'", "qk_thr", 2),
    "fraction for count": ("[prune]\nrank = 3.5", "rank", 2),
    "true for count": ("[prune]\nrank = true", "rank", 2),
    "text for list": ("[prune]\nsites = 'encoder.self'", "sites", 2),
    "list of numbers": ("[prune]\nsites = [1]", "sites", 2),
    "list of nothing": ("[prune]\nsites = []", "sites", 2),
    "number for layers": ("[prune]\nlayers = 3", "layers", 2),
    "malformed layers": ("[prune]\nlayers = '3-1'", "'3-1'", 2),
    "unknown method": ("[prune]\nmethod = 'magic'", "magic", 2),
    "unknown layout": ("[prune]\nlayout = 'thin'", "thin", 2),
    "unknown level": ("[verify]\nlevel = 'deep'", "deep", 2),
    "two rules": ("[prune]\nrank = 3\nratio = 0.5", "ratio", 2),
    "ratio of one": ("[prune]\nratio = 1", "ratio", 2),
    "threshold not a number": ("[prune]\nvo_thr = nan", "nan", 2),
    "tolerance not a number": ("[verify]\ntolerance = nan", "tolerance", 2),
    "negative tolerance": ("[verify]\ntolerance = -1", "tolerance", 2),
    "agreement above one": ("[verify]\nmin_agreement = 2", "agreement 2", 2),
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_invalid_recipes(recipe: str, refuse: Refuse, place: Path) -> None:
    text, culprit, code = RECIPES[recipe]
    (place / "recipe.toml").write_text(text, encoding="utf-8", errors="surrogateescape")
    refuse("run recipe.toml whisper -o out", "recipe.toml", culprit, code=code)


def test_recipes_that_do_not_fit_the_model(refuse: Refuse, place: Path) -> None:
    refuse("run nowhere.toml whisper -o out", "nowhere.toml")
    refuse("run whisper whisper -o out", "whisper is not a readable recipe")
    (place / "recipe.toml").write_text("[prune]\nsites = ['decoder.cross']")
    refuse("run recipe.toml llama -o out", "decoder.cross", "decoder.self", code=2)
    (place / "recipe.toml").write_text("[prune]\nlayers = '0-31'")
    refuse("run recipe.toml llama -o out", "31", code=2)
    (place / "recipe.toml").write_text("[prune]\nqk_thr = 1e9")
    refuse("run recipe.toml whisper -o out", "prune all of Q-K")


@pytest.mark.parametrize(
    "command",
    [
        "prune whisper",
        pytest.param("decompose whisper", marks=pytest.mark.slow),
        "export pruned",
        pytest.param("run recipe.toml whisper", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("out", "culprit"),
    [
        ("-o taken", "taken exists"),
        ("-o file", "file exists"),
        ("-o whisper", "whisper exists"),
        ("-o file --force", "file is not a folder"),
        ("-o taken --force", "taken was not written by pessa: it has no valid pessa.json"),
        ("-o website --force", "website was not written by pessa"),
        ("-o file/out", "file/out"),
        ("-o whisper --force", "whisper"),
        ("-o added --force", "  notes.txt"),
        ("-o link --force", "link"),
        ("-o pruned --force", "pruned"),
        ("-o whisper/out", "whisper"),
        ("-o .", ". exists"),
        (f"-o {'long' * 70}", "longlong"),
    ],
)
def test_outputs_that_exist_already(
    command: str, out: str, culprit: str, refuse: Refuse, pessa: Pessa, place: Path
) -> None:
    """With --force, only an output of pessa is replaced, to which nothing was added, and never the source itself."""
    (place / "recipe.toml").write_text("")
    (place / "file").write_text("mine")
    (place / "taken").mkdir()
    (place / "taken" / "thesis.tex").write_text("mine")
    (place / "website").mkdir()
    (place / "website" / "config.json").write_text('{"title": "not a model"}')
    assert pessa("prune", place / "whisper", "-o", place / "pruned", "--ratio", "0.3").code == 0
    (copy_of(place / "pruned", place / "added") / "notes.txt").write_text("mine")
    (place / "link").symlink_to("pruned")
    if command.split()[-1] not in out and out in ("-o pruned --force", "-o whisper/out"):
        assert pessa(*f"{command} {out}".split()).code == 0  # here `out` is not the source of the command
    else:
        refuse(f"{command} {out}", culprit)


@pytest.mark.usefixtures("refuse")
def test_force_replaces_the_whole_model(pessa: Pessa, place: Path) -> None:
    """An edited file of the old model is replaced, too."""
    assert pessa("prune", "llama", "-o", "out").code == 0
    (place / "out" / "config.json").write_text("edited")
    (place / "out" / "README.md").write_text("edited")
    before = snapshot(place / "whisper")
    assert pessa("prune", "whisper", "-o", "out", "--force", "--ratio", "0.3").code == 0
    assert pessa("prune", "whisper", "-o", "fresh", "--ratio", "0.3").code == 0
    assert snapshot(place / "out") == snapshot(place / "fresh")
    assert sorted(path.name for path in place.iterdir()) == ["fresh", "llama", "out", "tmp", "whisper"]
    assert snapshot(place / "whisper") == before


@pytest.mark.parametrize("command", ["prune whisper", "decompose whisper", "run recipe.toml whisper"])
def test_an_existing_output_is_refused_before_any_work(
    command: str, refuse: Refuse, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "recipe.toml").write_text("")
    monkeypatch.setattr(
        "pessa_cli.surgery.decomposition.decompose_block", lambda *_, **__: pytest.fail("a long measurement began")
    )
    refuse(f"{command} -o llama", "llama exists")


def test_force_does_not_delete_the_source_with_a_folder_around_it(refuse: Refuse, place: Path) -> None:
    copy_of(place / "whisper", place / "llama" / "inside")
    refuse("prune llama/inside -o llama --force", "llama")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_where_nothing_may_be_written(refuse: Refuse, place: Path) -> None:
    (place / "locked").mkdir(mode=0o500)
    refuse("prune whisper -o locked/out", "locked/out", "Permission denied")


def test_vanilla_needs_the_original_dimensions(refuse: Refuse, pessa: Pessa) -> None:
    assert pessa("decompose", "whisper", "-o", "decomposed").code == 0
    refuse("prune decomposed -o out --method vanilla --ratio 0.3", "decomposed is already decomposed", code=2)


def nudge(tensors: Tensors) -> None:
    for name in tensors:
        if "attn" in name:
            tensors[name] += 0.01 * torch.randn_like(tensors[name])


def test_a_decomposed_model_that_was_trained_afterwards(refuse: Refuse, pessa: Pessa, place: Path) -> None:
    """Its stored spectra no longer belong to its weights, so that slicing by them would cut important directions."""
    assert pessa("decompose", "whisper", "-o", "decomposed").code == 0
    edit_weights(nudge)(place / "decomposed")
    refuse("prune decomposed -o out --ratio 0.3", "spectra.safetensors")
    refuse("inspect decomposed", "spectra.safetensors")


def test_an_export_that_would_change_numbers(refuse: Refuse, pessa: Pessa, place: Path) -> None:
    assert pessa("prune", "whisper", "-o", "dense", "--layout", "dense", "--ratio", "0.3").code == 0
    edit_weights(nudge)(place / "dense")
    refuse("export dense -o out --layout compact", "dense")


@pytest.mark.parametrize(
    ("damage", "culprit"),
    [
        (lambda folder: (folder / "pessa.json").unlink(), "not a model that pessa wrote"),
        (lambda folder: (folder / "pessa.json").write_text("{"), "pessa.json is not readable JSON"),
        (lambda folder: (folder / "pessa.json").write_text("[]"), "pessa.json holds a list"),
        (lambda folder: (folder / "pessa.json").write_text("{}"), "pessa.json"),
        (edit_json(lambda c: c.update(ranks=[]), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c.update(method="magic"), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c.update(rule=3), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c["ranks"].update({"encoder.self.9": {"qk": "1", "vo": "1"}}), "pessa.json"), "self.9"),
        (edit_json(lambda c: c["ranks"]["encoder.self.0"].update(qk=8), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c["ranks"]["encoder.self.0"].update(qk="8 8"), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c["ranks"]["encoder.self.0"].update(qk="9 9 9 9"), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c["ranks"]["encoder.self.0"].update(vo="-1 8 8 8"), "pessa.json"), "pessa.json"),
        (edit_json(lambda c: c["ranks"]["encoder.self.0"].update(vo="1 1 1 1"), "pessa.json"), "encoder.self.0"),
    ],
    ids=[
        "no file", "not JSON", "a list", "empty", "ranks a list", "unknown method", "rule a number", "unknown block",
        "rank a number", "two heads of four", "rank beyond head", "negative rank", "other ranks",
    ],
)  # fmt: skip
@pytest.mark.parametrize("layout", ["compact", "dense"])
def test_export_with_a_damaged_manifest(
    damage: Callable[[Path], object], culprit: str, layout: str, refuse: Refuse, pessa: Pessa, place: Path
) -> None:
    assert pessa("prune", "whisper", "-o", "pruned", "--layout", layout, "--ratio", "0.3").code == 0
    damage(place / "pruned")
    if layout == "compact" and not (place / "pruned" / "pessa.json").exists():
        assert pessa("export", "pruned", "-o", "out").code == 0  # the tensor shapes give the ranks
        return
    refuse("export pruned -o out --layout compact", culprit)
    refuse("export pruned -o out --layout dense", culprit)


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Make the writer of shards raise the error after `after` tensors."""
    left = iter(range(after))

    def faulty(*arguments: object) -> None:
        if next(left, None) is None:
            raise error
        WRITE(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(ShardWriter, "write", faulty)


@pytest.mark.parametrize("after", [0, 40, 70])
@pytest.mark.parametrize("options", ["-o out", "-o some/new/out", "-o pruned --force"])
def test_interrupted_and_failed_runs_leave_no_files(
    options: str, after: int, refuse: Refuse, pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "pruned" in options:
        assert pessa("prune", "llama", "-o", "pruned").code == 0
    before = snapshot(place)
    line = f"prune whisper --ratio 0.3 {options}"
    failing(KeyboardInterrupt(), monkeypatch, after)
    result = pessa(*line.split())
    assert result.code == 130
    assert "Traceback" not in result.err
    assert snapshot(place) == before
    failing(RuntimeError("a bug"), monkeypatch, after)
    with pytest.raises(RuntimeError, match="a bug"):
        pessa(*line.split())
    assert snapshot(place) == before
    failing(OSError(errno.ENOSPC, "No space left on device"), monkeypatch, after)
    refuse(line, "No space left", "free some space")


@pytest.mark.usefixtures("refuse")
@pytest.mark.parametrize("step", ["first", "second"])
@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "Device or resource busy"), KeyboardInterrupt()], ids=repr)
def test_a_replacement_that_fails_at_the_last_step_keeps_the_old_model(
    error: BaseException, step: str, pessa: Pessa, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pessa("prune", "llama", "-o", "pruned").code == 0
    rename, calls = Path.rename, iter(["first", "second"])

    def faulty(self: Path, target: Path) -> Path:
        if next(calls, None) == step:
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", faulty)
    line = "prune whisper --ratio 0.3 -o pruned --force"
    before = snapshot(place / "pruned")
    result = pessa(*line.split())
    if isinstance(error, OSError):
        is_refusal(result, "pruned", "busy", "--resume")
    else:
        assert result.code == 130
    assert snapshot(place / "pruned") == before
    monkeypatch.undo()
    monkeypatch.chdir(place)
    assert pessa(*line.split(), "--resume").code == 0
    assert pessa("prune", "whisper", "--ratio", "0.3", "-o", "fresh").code == 0
    assert snapshot(place / "pruned") == snapshot(place / "fresh")
    assert sorted(path.name for path in place.iterdir()) == ["fresh", "llama", "pruned", "tmp", "whisper"]


INTERRUPTED = """
import os, signal, sys
from pessa_cli.cli.main import main
from pessa_cli.checkpoint.shards import ShardWriter
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells let background jobs ignore SIGINT
ShardWriter.put = lambda *_: (os.kill(os.getpid(), signal.{}), os.read(os.pipe()[0], 1))
sys.argv = "pessa prune whisper -o some/out".split()
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_signals_during_a_write_leave_no_files(name: str, place: Path, tiny_folder: TinyFolder) -> None:
    """SIGINT is sent by Ctrl-C, and SIGTERM when a machine shuts down."""
    copy_of(tiny_folder("whisper"), place / "whisper")
    before = snapshot(place)
    line = [sys.executable, "-c", INTERRUPTED.format(name)]
    done = subprocess.run(line, cwd=place, capture_output=True, check=False, timeout=120)
    assert done.returncode == 128 + getattr(signal, name)
    assert b"Traceback" not in done.stderr
    assert snapshot(place) == before


@pytest.mark.slow
def test_a_full_disk(place: Path, tiny_folder: TinyFolder) -> None:
    """The command runs in its own process, with a limit of the operating system on file sizes."""
    copy_of(tiny_folder("whisper"), place / "whisper")
    before = snapshot(place)
    done = subprocess.run(
        [PESSA, "prune", "whisper", "-o", "out"],
        cwd=place,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[0].startswith("error: out was not written: ")
    assert snapshot(place) == before


def test_names_with_brackets_are_printed_unchanged(pessa: Pessa, place: Path, tiny_folder: TinyFolder) -> None:
    """Square brackets are markup for rich, and must be escaped."""
    model = copy_of(tiny_folder("llama"), place / "model[bold]")
    out = place / "out[/red]"
    result = pessa("prune", model, "-o", out)
    assert result.code == 0
    assert shlex.join(["pessa", "verify", str(model), str(out)]) in result.err
    assert json.loads(pessa("inspect", out, "--json").out)["model"] == str(out)
    assert str(out) in pessa("inspect", out).out
    is_refusal(pessa("prune", model, "-o", out), f"{out} exists")
    assert (out / WEIGHTS).exists()
