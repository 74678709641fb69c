"""The public Python API: its names, its results and types, and that it works without the command line."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Pessa, TinyFolder, copy_of, snapshot
from packages import SOURCE

import pessa_cli
from pessa_cli import Recipe, Rule, Run, UsageError, VerifyOptions, api

ROOT = SOURCE.parent
PUBLIC = (
    *("prune", "decompose", "inspect", "export", "verify", "verify_files", "bench", "load_recipe", "load_whisper"),
    *("Rule", "Recipe", "Run", "VerifyOptions", "BenchSettings", "PessaError", "PessaWarning", "UsageError"),
    *("PessaTunerConfig", "SorsaConfig", "MiloraConfig", "PicaConfig", "SvftConfig", "LoraXsConfig"),
    *("get_backend", "set_backend"),
)


def python(code: str, *arguments: object, folder: Path | None = None) -> str:
    """Run a program in its own process, and return what it prints."""
    line = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Names


def test_the_public_names() -> None:
    assert sorted(PUBLIC) == sorted(api.__all__)
    assert set(PUBLIC) < set(dir(pessa_cli))
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        getattr(pessa_cli, "nonsense")  # noqa: B009  # mypy would report pessa_cli.nonsense
    with pytest.raises(AttributeError, match="has no attribute 'Path'"):
        getattr(pessa_cli, "Path")  # noqa: B009


def test_type_checkers_see_the_names_that_are_imported() -> None:
    tree = ast.parse((SOURCE / "api.py").read_text(encoding="utf-8"))
    checking = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        str(node.module).removeprefix("pessa_cli."): tuple(alias.name for alias in node.names)
        for node in checking.body
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("pessa_cli.")
    }
    assert seen == api._MODULES
    assert {name for names in seen.values() for name in names} | {"load_whisper"} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_a_docstring(name: str) -> None:
    found = getattr(pessa_cli, name)
    first, *rest = inspect.cleandoc(found.__doc__ or "").split("\n\n")
    assert first[0].isupper(), first
    assert first.rstrip().endswith("."), first
    if not inspect.isfunction(found) or name in ("get_backend", "set_backend", "load_recipe"):
        return
    text = " ".join(rest)
    assert "Returns" in text, name
    assert "Raises" in text, name
    for parameter in inspect.signature(found).parameters:
        assert parameter in text, f"{name} does not explain {parameter}"


@pytest.mark.parametrize("name", ["PessaError", "UsageError", "Rule", "Recipe", "VerifyOptions", "load_whisper"])
def test_names_that_need_no_torch_do_not_import_it(name: str) -> None:
    code = f"import sys; from pessa_cli import {name}; print(sorted(sys.modules.keys() & {{'torch', 'typer', 'peft'}}))"
    assert python(code).strip() == "[]"


def test_without_peft_its_configurations_raise_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(pessa_cli.PessaError, match="peft") as refused:
        pessa_cli.SorsaConfig()
    assert refused.value.hint == "pip install 'pessa[tune]'"


# Use


NOTEBOOK = """
import sys
for name in ("typer", "rich", "click"):  # hide them as if they were not installed
    sys.modules[name] = None
model, out = sys.argv[1:]

from pessa_cli import Rule, prune
written = prune(model, out, Rule(ratio=0.3))
print(written.totals["attention_pruned"])

assert not [name for name in sys.modules if name.startswith("pessa_cli.cli")]
"""


def test_three_lines_prune_a_model_without_the_command_line(
    tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa
) -> None:
    folder = tiny_folder("whisper")
    shown = python(NOTEBOOK, folder, tmp_path / "out")
    pruned = json.loads(pessa("prune", folder, "-o", tmp_path / "same", "--ratio", "0.3", "--json").out)
    assert float(shown) == pruned["totals"]["attention_pruned"] > 0.1
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "same")


def test_a_rule_alone_is_a_recipe_and_paths_may_be_text(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("bert")
    pessa_cli.prune(str(folder), str(tmp_path / "a"), Rule(rank=3))
    pessa_cli.prune(folder, tmp_path / "b", Recipe(Rule(rank=3)))
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")
    assert (
        pessa_cli.inspect(folder, Rule(rank=3)).to_dict() == pessa_cli.inspect(folder, Recipe(Rule(rank=3))).to_dict()
    )


Call = Callable[[Path, Path, Path], Any]
CALLS: dict[str, tuple[str, Call]] = {
    "inspect": (
        "inspect {model} --rank 3 --layers 1",
        lambda model, _small, _out: pessa_cli.inspect(model, Recipe(Rule(rank=3), layers=frozenset({1}))),
    ),
    "curve": ("inspect {model} --curve", lambda model, _small, _out: pessa_cli.inspect(model, curve=True)),
    "prune": (
        "prune {model} -o {out} --energy 0.9 --layout dense --sites decoder.self",
        lambda model, _small, out: pessa_cli.prune(
            model, out, Recipe(Rule(energy=0.9), sites=("decoder.self",), layout="dense")
        ),
    ),
    "dry run": (
        "prune {model} -o {out} --ratio 0.2 --dry-run",
        lambda model, _small, out: pessa_cli.prune(model, out, Rule(ratio=0.2), Run(dry=True)),
    ),
    "decompose": (
        "decompose {model} -o {out} --layers 0",
        lambda model, _small, out: pessa_cli.decompose(model, out, Recipe(layers=frozenset({0}))),
    ),
    "export": ("export {small} -o {out}", lambda _model, small, out: pessa_cli.export(small, out)),
    "verify": (
        "verify {model} {small} --level weights --tolerance 0.5",
        lambda model, small, _out: pessa_cli.verify(model, small, VerifyOptions(level="weights", tolerance=0.5)),
    ),
    "verify files": ("verify {small}", lambda _model, small, _out: pessa_cli.verify_files(small)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_function_returns_what_its_command_prints_as_json(
    name: str,
    tiny_folder: TinyFolder,
    pruned: Callable[..., Path],
    pessa: Pessa,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line, call = CALLS[name]
    model, small = tiny_folder("whisper"), pruned("whisper")
    place = tmp_path / "place"
    place.mkdir()
    printed = json.loads(pessa(*line.format(model=model, small=small, out=place / "out").split(), "--json").out)
    written = snapshot(place)
    place.rename(tmp_path / "other")
    place.mkdir()
    capsys.readouterr()
    found = call(model, small, place / "out")
    assert capsys.readouterr() == ("", "")
    assert json.loads(json.dumps(found.to_dict())) == printed
    assert snapshot(place) == written
    assert bool(written) == ("-o" in line and "dry" not in line)


def test_export_to_another_format_returns_an_exported_model(
    tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The function that writes the file is replaced here; it is tested in tests/exports."""
    monkeypatch.setattr("pessa_cli.exports.openai.export_openai", lambda _folder, out, *_: out.write_text("weights"))
    folder, out = tiny_folder("whisper"), tmp_path / "out.pt"
    printed = pessa("export", folder, "-o", out, "--to", "openai-whisper", "--json").out
    out.unlink()
    found = pessa_cli.export(folder, out, to="openai-whisper")
    assert out.exists()
    assert json.loads(printed) == found.to_dict()
    assert found.to_dict() == {"command": "export", "source": str(folder), "to": "openai-whisper", "out": str(out)}


def test_results_have_types(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("llama")
    written = pessa_cli.prune(folder, tmp_path / "out", Rule(ratio=0.3, round_to=2))
    assert (written.command, written.rule, written.method, written.layout) == (
        *("prune", "ratio 0.3, round_to 2"),
        *("svd", "compact"),
    )
    assert written.ranks == json.loads((tmp_path / "out" / "pessa.json").read_text())["ranks"]
    assert written.shards == {"model.safetensors": written.totals["bytes_after"]}
    assert (written.source, written.out, written.search, written.warnings) == (str(folder), tmp_path / "out", None, [])
    checked = pessa_cli.verify(folder, tmp_path / "out", VerifyOptions(level="weights"))
    assert not checked.same
    assert checked.failures
    found = pessa_cli.inspect(tmp_path / "out")
    values = [block.seams["vo"] for block in found.blocks]
    assert sum(sum(vo.ranks) for vo in values) < sum(len(vo.ranks) * vo.width for vo in values)


def test_too_little_calibration_data_is_a_warning_in_the_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], llama: Path, pessa: Pessa
) -> None:
    (tmp_path / "few.txt").write_text("a few words")
    recipe = Recipe(Rule(ratio=0.3), calibrate=(tmp_path / "few.txt",))
    written = pessa_cli.prune(llama, tmp_path / "out", recipe)
    assert written.method == "calibrated"
    assert len(written.warnings) == 2
    assert "independent frames" in written.warnings[0]
    assert capsys.readouterr().err == ""
    shown = pessa("prune", llama, "-o", tmp_path / "b", "--ratio", "0.3", "--calibrate", tmp_path / "few.txt").err
    assert shown.startswith("Too little calibration data for 2 blocks: their weights partly decide what they keep.\n")
    assert f"  {written.warnings[0]}\n" in shown


def test_progress_is_reported_to_a_callback(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    from contextlib import contextmanager

    begun: list[str] = []
    done = [0, 0]

    @contextmanager
    def progress(what: str, _nbytes: int, blocks: int) -> Any:
        begun.append(f"{what} {blocks}")

        def tick(nbytes: int, blocks: int) -> None:
            done[0] += nbytes
            done[1] += blocks

        yield tick

    pessa_cli.prune(tiny_folder("llama"), tmp_path / "out", Rule(ratio=0.3), Run(progress=progress))
    assert begun == ["measuring 2", "writing 2"]
    assert done[1] == 4
    assert done[0] > 0


def test_bench_measures_both_models(tiny_folder: TinyFolder, pruned: Callable[..., Path]) -> None:
    settings = pessa_cli.BenchSettings(threads=1, tokens=2, rounds=1)
    found = pessa_cli.bench(tiny_folder("bert"), pruned("bert"), settings)
    assert {measure.name for measure in found.bench.measures} >= {"forward", "parameters", "weights on disk"}
    assert list(found.to_dict()) == ["reference", "candidate", "settings", "measures"]


# Errors


def test_errors_are_those_of_the_command_line(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder("whisper"), tmp_path / "model")
    before = snapshot(tmp_path)
    refused: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (UsageError, "--ratio 2 is not a share to drop", lambda: Rule(ratio=2)),
        (UsageError, "--sites nowhere", lambda: pessa_cli.prune(folder, tmp_path / "o", Recipe(sites=("nowhere",)))),
        (UsageError, "--device nonsense", lambda: Run(device="nonsense")),
        (UsageError, "go together", lambda: Recipe(max_wer_increase=1.0)),
        (UsageError, "vanilla uses the weights alone", lambda: Recipe(method="vanilla", statistics=(Path("s"),))),
        (UsageError, "--to onnx has no --layout", lambda: pessa_cli.export(folder, "o", "compact", to="onnx")),
        (UsageError, "--to 'tflite' is not known", lambda: pessa_cli.export(folder, "o", to="tflite")),  # type: ignore
        (pessa_cli.PessaError, "nowhere does not exist", lambda: pessa_cli.inspect("nowhere")),
        (pessa_cli.PessaError, "model exists", lambda: pessa_cli.decompose(folder, folder)),
        (pessa_cli.PessaError, "would prune all of Q-K", lambda: pessa_cli.inspect(folder, Rule(qk_thr=1e9))),
        (pessa_cli.PessaError, "not a model that pessa wrote", lambda: pessa_cli.export(folder, tmp_path / "o")),
    ]
    for kind, text, call in refused:
        with pytest.raises(kind, match=text) as error:
            call()
        assert error.type is kind
        assert error.value.hint  # type: ignore[attr-defined]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("command", ["prune", "decompose"])
def test_outputs_that_cannot_be_written_are_refused_before_calibration(
    command: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.txt").write_text("some words")
    monkeypatch.setattr("pessa_cli.calibration.collect.collect", lambda *_: pytest.fail("calibration began"))
    call = getattr(pessa_cli, command)
    with pytest.raises(pessa_cli.PessaError, match="llama exists"):
        call(llama, llama, Recipe(calibrate=(tmp_path / "text.txt",)))
    recipe = Recipe(calibrate=(tmp_path / "text.txt",), statistics=(tmp_path / "nowhere" / "s.safetensors",))
    with pytest.raises(UsageError, match="nowhere is not a folder"):
        call(llama, tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


# Types


USER = """
import pessa_cli
from pessa_cli import Recipe, Rule, Run, load_whisper, prune

written = prune("model", "out", Rule(ratio=0.3), Run(force=True))
reveal_type(written)
reveal_type(written.shards)
reveal_type(prune)
reveal_type(pessa_cli.inspect("model").blocks[0].seams["vo"].ranks)
reveal_type(pessa_cli.export("out", "dense"))
reveal_type(pessa_cli.export("out", "file.pt", to="openai-whisper"))
reveal_type(pessa_cli.verify("model", "out").same)
reveal_type(pessa_cli.PessaTunerConfig)
pessa_cli.nonsense
Rule(ratios=0.3)
Recipe(Rule(), layout="thin")
"""
REVEALED = (
    "pessa_cli.workflow.written.WrittenModel",
    "typing.Mapping[str, int]",
    "-> pessa_cli.workflow.written.WrittenModel",
    "list[int]",
    "pessa_cli.workflow.written.WrittenModel",
    "pessa_cli.workflow.export.ExportedModel",
    "bool",
    "-> pessa_cli.tuning.tuner_pessa.PessaTunerConfig",
)
WRONG = (
    'Module has no attribute "nonsense"',
    'Unexpected keyword argument "ratios" for "Rule"',
    'Argument "layout" to "Recipe" has incompatible type',
)
# Other packages are skipped, because that is faster.
SETTINGS = f"""
[mypy]
strict = true
mypy_path = {ROOT}
follow_imports = silent
[mypy-torch.*,transformers.*,peft.*,whisper.*,safetensors.*,numpy.*,wrapt.*,huggingface_hub.*,typer.*,rich.*]
follow_imports = skip
ignore_missing_imports = true
"""


def test_mypy_sees_the_types_of_the_public_names(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(USER)
    (tmp_path / "mypy.ini").write_text(SETTINGS)
    line = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary", "user.py"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert len(lines) == len(REVEALED) + len(WRONG), done
    for line_of_mypy, expected in zip(lines, (*REVEALED, *WRONG), strict=True):
        assert expected in line_of_mypy
    assert not [line_of_mypy for line_of_mypy in lines[: len(REVEALED)] if '"Any"' in line_of_mypy]


def test_python_users_may_give_lists_texts_and_single_items(tmp_path: Path) -> None:
    recipe = pessa_cli.Recipe(
        pessa_cli.Rule(target_size="120MB"),  # type: ignore[arg-type]
        sites="encoder.self",  # type: ignore[arg-type]
        layers="0-2",  # type: ignore[arg-type]
        calibrate=["a.txt", tmp_path],  # type: ignore[arg-type]
    )
    assert (recipe.rule.target_size, recipe.sites) == (120_000_000, ("encoder.self",))
    assert recipe.layers == frozenset({0, 1, 2})
    assert recipe.calibrate == (Path("a.txt"), tmp_path)


@pytest.mark.parametrize("options", [{"ratio": "0.5"}, {"rank": 2.5}, {"rank": True}, {"target_size": "large"}])
def test_numbers_of_the_wrong_type_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(pessa_cli.UsageError, match=f"--{next(iter(options)).replace('_', '-')}"):
        pessa_cli.Rule(**options)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(pessa_cli.UsageError, match="--layout"):
        pessa_cli.export(tmp_path, tmp_path / "out", "sparse")  # type: ignore[call-overload]


def test_star_import() -> None:
    names: dict[str, Any] = {}
    exec("from pessa_cli import *", names)
    assert set(names) - {"__builtins__"} == set(pessa_cli.api.__all__)


def test_what_is_known_early_is_told_even_if_the_command_fails(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder, told = tiny_folder("bert"), list[Any]()
    with pytest.raises(pessa_cli.PessaError, match="all of Q-K"):
        pessa_cli.inspect(folder, pessa_cli.Rule(qk_thr=1e9, vo_thr=0.0), notify=told.append)
    assert [(notice.totals["blocks"], notice.totals["blocks_chosen"]) for notice in told] == [(4, 2)]
    del tmp_path
