"""The commands as a user runs them: help, tables, JSON and files; numbers are compared with independent results."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from harness import (
    PESSA,
    Pessa,
    TinyFolder,
    copy_of,
    edit_json,
    edit_weights,
    is_refusal,
    raw_tensors,
    snapshot,
)
from numpy.typing import NDArray
from safetensors.numpy import load_file

from pessa_cli.workflow.recipe import load_recipe

Array = NDArray[np.float64]
COMMANDS = ("inspect", "decompose", "prune", "export", "verify", "run")
CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("[!t]*.toml"))  # those of `pessa tune` are tune-*
TOTALS = (
    "blocks blocks_chosen qk_pruned vo_pruned mlp_pruned attention_parameters attention_parameters_after "
    "attention_pruned mlp_parameters mlp_parameters_after mlp_parameters_pruned "
    "parameters parameters_after model_pruned bytes bytes_after"
)

# Module names by kind of block in the published checkpoints, independent of the architecture table.
KINDS = {
    "whisper": {
        "encoder.self": "model.encoder.layers.{}.self_attn.{}_proj",
        "decoder.self": "model.decoder.layers.{}.self_attn.{}_proj",
        "decoder.cross": "model.decoder.layers.{}.encoder_attn.{}_proj",
    },
    "bert": {"encoder.self": "bert.encoder.layer.{}.attention.{}"},
    "llama": {"decoder.self": "model.layers.{}.self_attn.{}_proj"},
}
SIDES = {
    "whisper": {"q": "q", "k": "k", "v": "v", "o": "out"},
    "bert": {"q": "self.query", "k": "self.key", "v": "self.value", "o": "output.dense"},
    "llama": {"q": "q", "k": "k", "v": "v", "o": "o"},
}


def a_json(text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert isinstance(value, dict)
    return value


def run(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PESSA, *map(str, arguments)], capture_output=True, text=True, check=False, **options)


# Help


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'numpy', 'safetensors', 'matplotlib'}"
    code = (
        "import sys\nfrom pessa_cli.cli.main import main\nsys.argv = ['pessa', '--help']\n"
        f"try: main()\nfinally: print(sorted(sys.modules.keys() & {heavy}), file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.perf_counter() - start < 2  # 0.2 seconds on a quiet machine; torch alone takes more than 1
    assert done.returncode == 0
    assert done.stderr.strip() == "[]"
    assert all(command in done.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_of_options_that_exist(command: str, pessa: Pessa) -> None:
    result = pessa(command, "--help")
    assert result.code == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.out).split())
    example = re.search(rf"Example: pessa {command} (.*?) Arguments", text)
    assert example is not None, result.out
    options = re.findall(r"(?<!\S)--?[a-z][a-z-]*", example[1])
    assert all(f" {option} " in text.partition("Options")[2] for option in options)


@pytest.mark.slow
def test_the_installed_command_runs_in_its_own_process(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    assert run("prune", tiny_folder("llama"), "-o", tmp_path / "out", "--ratio", "0.5").returncode == 0
    failed = run("prune", tiny_folder("llama"), "-o", tmp_path / "out")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith(f"error: {tmp_path / 'out'} exists\nhint: ")
    assert run("prune", tiny_folder("llama"), "-o", tmp_path / "out", "--rank", "0").returncode == 2


# inspect


def dense_spectra(weights: dict[str, Array], names: dict[str, str], heads: int, group: int) -> tuple[Array, Array]:
    """Compute the singular values of each key/value head's dense Q-K and V-O products with numpy."""

    def rows(side: str, count: int) -> Array:
        weight = weights[f"{names[side]}.weight"]
        bias = weights.get(f"{names[side]}.bias", np.zeros(len(weight)))
        return np.hstack([weight, bias[:, None]]).reshape(count, -1, weight.shape[1] + 1)

    q, k, v = rows("q", heads), rows("k", heads // group)[..., :-1], rows("v", heads // group)
    if f"{names['o']}.bias" in weights:  # the value bias moves into it; otherwise it stays an extra row of v
        v = v[..., :-1]
    o = np.stack(np.split(weights[f"{names['o']}.weight"], heads, axis=1))  # (heads, D, d)
    qk, vo = [], []
    for g in range(heads // group):
        shared = range(g * group, (g + 1) * group)
        qk.append(np.linalg.svd(np.vstack([q[h].T for h in shared]) @ k[g], compute_uv=False)[: k.shape[1]])
        vo.append(np.linalg.svd(v[g].T @ np.hstack([o[h].T for h in shared]), compute_uv=False)[: k.shape[1]])
    return np.array(qk), np.array(vo)


def without_output_bias(folder: Path) -> None:
    edit_weights(lambda t: [t.pop(name) for name in list(t) if name.endswith("o_proj.bias")])(folder)


@pytest.mark.parametrize("name", ["whisper", "bert", "llama", "llama-biased", "llama-no-o-bias"])
def test_inspect_json_has_the_spectra_of_the_dense_products(
    name: str, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    base = name.replace("no-o-bias", "biased")
    folder = copy_of(tiny_folder(base), tmp_path / "model")
    if name != base:
        without_output_bias(folder)
    weights = {key: value.astype(np.float64) for key, value in load_file(folder / "model.safetensors").items()}
    family, qk_thr, vo_thr = name.partition("-")[0], 4.0, 5.0
    result = pessa("inspect", folder, "--json", "--qk-thr", qk_thr, "--vo-thr", vo_thr)
    content = a_json(result.out)
    assert content["model"] == str(folder)
    assert list(content["totals"]) == TOTALS.split()
    group = 2 if family == "llama" else 1
    seen = []
    for block in content["blocks"]:
        seen.append((block["kind"], block["layer"]))
        pattern = KINDS[family][block["kind"]]
        names = {side: pattern.format(block["layer"], SIDES[family][side]) for side in "qkvo"}
        qk, vo = dense_spectra(weights, names, 4, group)
        assert (block["heads"], block["kv_heads"]) == (4, 4 // group)
        seams = block["seams"]
        assert {name: seam["width"] for name, seam in seams.items()} == {"qk": qk.shape[1], "vo": vo.shape[1]}
        np.testing.assert_allclose(seams["vo"]["spectrum"], vo, rtol=1e-9, atol=1e-12)
        assert seams["vo"]["ranks"] == (vo > vo_thr).sum(1).tolist()
        if family == "llama":
            assert seams["qk"]["spectrum"] is None
            assert seams["qk"]["ranks"] == [qk.shape[1]] * len(qk)
        else:
            np.testing.assert_allclose(seams["qk"]["spectrum"], qk, rtol=1e-9, atol=1e-12)
            assert seams["qk"]["ranks"] == (qk > qk_thr).sum(1).tolist()
        assert np.shape(seams["qk"]["pairs"]) == ((len(qk), qk.shape[1] // 2) if family == "llama" else ())
        assert seams["vo"]["pairs"] is None
        assert 0 < sum(seams["vo"]["ranks"]) < vo.size  # the thresholds prune some directions, but not all
    assert seen == [(kind, layer) for kind in KINDS[family] for layer in range(2)]


@pytest.mark.parametrize("name", ["whisper", "bert", "llama", "llama-biased"])
@pytest.mark.parametrize("options", [[], ["--ratio", "0.4"], ["--rank", "5", "--layers", "1"], ["--energy", "0.9"]])
def test_totals_agree_with_what_prune_writes(
    name: str, options: list[str], pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder, out = tiny_folder(name), tmp_path / "out"
    inspected = a_json(pessa("inspect", folder, "--json", *options).out)
    pruned = a_json(pessa("prune", folder, "-o", out, "--json", *options).out)
    totals = inspected["totals"]
    assert pruned["totals"] == totals
    assert (pruned["source"], pruned["out"], pruned["command"]) == (str(folder), str(out), "prune")
    ranks = {
        f"{block['kind']}.{block['layer']}": {
            name: " ".join(map(str, seam["ranks"])) for name, seam in block["seams"].items()
        }
        for block in inspected["blocks"]
    }
    assert pruned["ranks"] == ranks == json.loads((out / "pessa.json").read_text())["ranks"]
    before, after = raw_tensors(folder), raw_tensors(out)
    for when, tensors in (("", before), ("_after", after)):
        attention = [key for key in tensors if re.search(r"attn\.|attention\.(self|output\.dense)", key)]
        chosen = [key for key in attention if "--layers" not in options or re.search(r"layers?\.1\.", key)]
        assert totals[f"parameters{when}"] == sum(len(data) // 4 for _, _, data in tensors.values())
        assert totals[f"bytes{when}"] == sum(len(data) for _, _, data in tensors.values())
        assert totals[f"attention_parameters{when}"] == sum(len(tensors[key][2]) // 4 for key in chosen)
    seams = [block["seams"]["vo"] for block in inspected["blocks"]]
    kept = [(sum(seam["ranks"]), len(seam["ranks"]) * seam["width"]) for seam in seams]
    assert totals["vo_pruned"] == pytest.approx(1 - sum(k for k, _ in kept) / sum(n for _, n in kept))
    assert totals["model_pruned"] == pytest.approx(1 - totals["parameters_after"] / totals["parameters"])
    assert (totals["blocks_chosen"], totals["blocks"]) == (len(ranks), 10 if name == "whisper" else 4)


def test_inspect_prints_a_row_for_each_block_and_side(pessa: Pessa, tiny_folder: TinyFolder) -> None:
    result = pessa("inspect", tiny_folder("whisper"), "--rank", "3")
    assert result.code == 0
    rows = [line for line in result.out.splitlines() if re.search(r"\b(Q-K|V-O) .*/32", line)]
    assert len(rows) == 12
    assert all("12/32" in row for row in rows)
    block = a_json(pessa("inspect", tiny_folder("whisper"), "--json").out)["blocks"][0]
    values = sorted(value for head in block["seams"]["qk"]["spectrum"] for value in head)
    assert rows[0].split()[:5] == [
        "encoder.self.0",
        "Q-K",
        *(f"{v:.3g}" for v in (values[-1], np.median(values), values[0])),
    ]
    assert "Q-K pairs" in pessa("inspect", tiny_folder("llama")).out


@pytest.mark.parametrize(("suffix", "start"), [("png", b"\x89PNG\r\n"), ("svg", b"<?xml")])
def test_plots(suffix: str, start: bytes, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    picture = tmp_path / f"spectra.{suffix}"
    result = pessa("inspect", tiny_folder("whisper"), "--plot", picture, "--layers", "1", "--json")
    assert (result.code, len(a_json(result.out)["blocks"])) == (0, 3)
    assert picture.read_bytes().startswith(start)
    if suffix == "svg":
        titles = re.findall(r"<!-- (\S+ \d, \S+) -->", picture.read_text())
        assert titles == [f"{kind} 1, {side}" for kind in KINDS["whisper"] for side in ("Q-K", "V-O")]
    assert [path.name for path in tmp_path.iterdir()] == [picture.name]


# prune, decompose, run


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        (["--layers", "1"], r"layers\.1\..*attn\."),
        (["--sites", "decoder.cross"], r"encoder_attn\."),
        (["--sites", "encoder.self,decoder.self", "--layers", "0-0"], r"layers\.0\.self_attn\."),
    ],
)
@pytest.mark.parametrize(
    "command", [["prune", "--rank", "5"], ["prune", "--rank", "5", "--layout", "dense"], ["decompose"]]
)
def test_other_blocks_are_copied_byte_for_byte(
    command: list[str], options: list[str], chosen: str, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    folder, out = tiny_folder("whisper"), tmp_path / "out"
    assert pessa(*command, folder, "-o", out, *options).code == 0
    before, after = raw_tensors(folder), raw_tensors(out)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if re.search(chosen, name)}
    modules = json.loads((out / "config.json").read_text()).get("quantization_config", {}).get("modules", {})
    assert {f"{name}.weight" for name in modules} == {
        name for name in changed if name.endswith("weight") and before[name][1] != after[name][1]
    }


def test_as_treats_a_model_as_another(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder("llama"), tmp_path / "model")
    edit_json(lambda config: config.update(model_type="mystery"))(folder)
    is_refusal(pessa("prune", folder, "-o", tmp_path / "out"), "--as llama")
    assert pessa("prune", folder, "-o", tmp_path / "out", "--ratio", "0.3", "--as", "llama").code == 0
    assert pessa("prune", tiny_folder("llama"), "-o", tmp_path / "plain", "--ratio", "0.3").code == 0
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "plain")
    compare = ["verify", tmp_path / "plain", tmp_path / "out", "--level", "weights"]
    assert [pessa(*compare, *more).code for more in ([], ["--as", "llama"])] == [1, 0]


@pytest.mark.parametrize("recipe", CONFIGS, ids=lambda path: path.stem)
def test_the_recipes_in_configs(recipe: Path, pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    names = [name for name in KINDS if name in recipe.stem] or list(KINDS)
    for name in names:
        out = tmp_path / name
        if wanted := load_recipe(recipe).calibrate:  # test_real_models runs it with data
            is_refusal(pessa("run", recipe, tiny_folder(name), "-o", out), f"{wanted[0]} does not exist")
            continue
        result = pessa("run", recipe, tiny_folder(name), "-o", out)
        assert result.code == 0, result
        lines = re.findall(r"^(\w+) = (.*)$", recipe.read_text().partition("[verify]")[0], re.MULTILINE)
        options = {key: json.loads(value) for key, value in lines}
        manifest = json.loads((out / "pessa.json").read_text())
        rule = [f"{key} {value:g}" for key, value in options.items() if isinstance(value, (int, float))]
        assert manifest["rule"] == (", ".join(rule) or "lossless")
        assert {site.rpartition(".")[0] for site in manifest["ranks"]} == set(options.get("sites", KINDS[name]))


def test_there_are_recipes() -> None:
    assert CONFIGS


def test_a_recipe_does_the_same_as_its_options(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(
        "[prune]\nqk_thr = 4\nvo_thr = 4.5\nround_to = 2\nmin_rank = 1\nsites = ['decoder.self']\nlayers = '1'\n"
        "layout = 'dense'\nmethod = 'vanilla'\n"
    )
    options = "--qk-thr 4 --vo-thr 4.5 --round-to 2 --min-rank 1 --sites decoder.self --layers 1"
    more = "--layout dense --method vanilla"
    folder = tiny_folder("whisper")
    assert pessa("run", tmp_path / "recipe.toml", folder, "-o", tmp_path / "ran").code == 0
    assert pessa("prune", folder, "-o", tmp_path / "pruned", *options.split(), *more.split()).code == 0
    assert snapshot(tmp_path / "ran") == snapshot(tmp_path / "pruned")
    assert raw_tensors(tmp_path / "ran") != raw_tensors(folder)


def test_a_recipe_that_verifies_fails_when_the_models_differ(
    pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path
) -> None:
    recipe, folder = tmp_path / "recipe.toml", tiny_folder("whisper")
    recipe.write_text("[prune]\nratio = 0.3\n[verify]\nlevel = 'weights'\n")
    failed = pessa("run", recipe, folder, "-o", tmp_path / "out")
    assert failed.code == 1
    error = failed.err[failed.err.index("error: ") :]
    assert all(part in error for part in (str(tmp_path / "out"), " head ", "limit 1e-06", "hint: "))
    failed = pessa("run", recipe, folder, "-o", tmp_path / "out", "--force", "--json")
    assert (failed.code, a_json(failed.out)["verify"]["same"]) == (1, False)
    recipe.write_text("[prune]\nratio = 0.3\n[verify]\nlevel = 'weights'\ntolerance = 0.9\n")
    passed = pessa("run", recipe, folder, "-o", tmp_path / "out", "--force", "--json")
    assert (passed.code, a_json(passed.out)["verify"]["same"]) == (0, True)


# verify


@pytest.fixture(scope="module")
def cut(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper with rank 5 for each head of its first layers."""
    out = tmp_path_factory.mktemp("cut") / "out"
    done = run("prune", tiny_folder("whisper"), "-o", out, "--rank", "5", "--layers", "0")
    assert done.returncode == 0, done.stderr
    return out


def test_verify_json_has_the_norms_of_the_cut_directions(pessa: Pessa, tiny_folder: TinyFolder, cut: Path) -> None:
    """The relative error of each head follows from the spectra of the original, by Eckart and Young (1936)."""
    folder = tiny_folder("whisper")
    result = pessa("verify", folder, cut, "--json")
    report = a_json(result.out)
    assert (result.code, report["same"]) == (1, False)
    assert (report["reference"], report["candidate"]) == (str(folder), str(cut))
    expected = {}
    for block in a_json(pessa("inspect", folder, "--json").out)["blocks"]:
        for side, label in (("qk", "Q-K"), ("vo", "V-O")):
            for head, spectrum in enumerate(np.array(block["seams"][side]["spectrum"])):
                lost = spectrum[5:] if block["layer"] == 0 else spectrum[8:]
                where = f"{block['kind']}.{block['layer']} head {head} {label}"
                expected[where] = float(np.linalg.norm(lost) / np.linalg.norm(spectrum))
    found = {entry["where"]: entry["error"] for entry in report["weights"] if "head" in entry["where"]}
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)
    worst = max(expected, key=lambda where: expected[where])
    assert report["worst"]["where"] == worst
    assert [worst in report["failures"][0], report["unequal"]] == [True, {}]
    off = {block["where"] for block in report["blocks"] if block["error"] > 1e-4}
    assert off == {f"{kind}.0" for kind in KINDS["whisper"]}
    assert report["outputs"]["error"] > report["limits"]["outputs"]
    assert worst in pessa("verify", folder, cut).out


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ([], 1),
        (["--level", "weights"], 1),
        (["--level", "blocks", "--tolerance", "0.1"], 1),
        (["--tolerance", "1"], 1),  # the agreement of the outputs is still too low
        (["--tolerance", "1", "--min-agreement", "0"], 0),
        (["--level", "weights", "--tolerance", "0.9"], 0),
        (["--level", "blocks", "--tolerance", "0.9"], 0),
    ],
)
def test_exit_code_json_and_junit_of_verify_agree(
    options: list[str], code: int, pessa: Pessa, tiny_folder: TinyFolder, cut: Path, tmp_path: Path
) -> None:
    arguments = ["verify", tiny_folder("whisper"), cut, *options, "--junit", tmp_path / "report.xml"]
    result = pessa(*arguments)
    report = a_json(pessa(*arguments, "--json").out)
    suite = ElementTree.parse(tmp_path / "report.xml").getroot()
    failures = suite.findall("testcase/failure")
    cases = suite.findall("testcase")
    assert (result.code, report["same"], bool(failures)) == (code, code == 0, code == 1)
    assert ("not the same model" in result.out, "same model within" in result.out) == (code == 1, code == 0)
    assert (suite.get("tests"), suite.get("failures")) == (str(len(cases)), str(len(failures)))
    for entry in report["weights"]:
        case = next(case for case in cases if case.get("name") == entry["where"])
        assert (case.find("failure") is None) == (entry["error"] <= report["limits"]["weights"])


def test_verify_finds_changes_outside_the_blocks(pessa: Pessa, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = tiny_folder("bert")
    other = copy_of(folder, tmp_path / "other")
    name = "bert.encoder.layer.1.output.LayerNorm.bias"
    edit_weights(lambda tensors: tensors[name].view(-1)[3].mul_(-1).add_(1e-30))(other)
    result = pessa("verify", folder, other, "--level", "weights", "--json")
    assert (result.code, list(a_json(result.out)["unequal"])) == (1, [name])
    assert name in pessa("verify", folder, other, "--level", "weights").out
    assert pessa("verify", folder, folder, "--level", "weights").code == 0


# stdout and stderr


def lines_of(folder: Path, cut: Path, tmp_path: Path) -> dict[str, list[object]]:
    return {
        "inspect": ["inspect", folder],
        "decompose": ["decompose", folder, "-o", tmp_path / "a"],
        "prune": ["prune", folder, "-o", tmp_path / "b"],
        "export": ["export", cut, "-o", tmp_path / "c"],
        "verify": ["verify", folder, folder],
        "run": ["run", CONFIGS[0].with_stem("lossless"), folder, "-o", tmp_path / "d"],
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_stdout_is_one_json_document_and_stderr_only_messages(
    command: str, pessa: Pessa, tiny_folder: TinyFolder, cut: Path, tmp_path: Path
) -> None:
    result = pessa(*lines_of(tiny_folder("whisper"), cut, tmp_path)[command], "--json")
    assert result.code == 0
    assert a_json(result.out)
    assert "\x1b" not in result.out + result.err
    assert "" not in result.err.splitlines()
    assert not re.search(r"measuring|writing|comparing|━|%", result.err)


@pytest.mark.slow
def test_progress_goes_to_a_terminal_on_stderr_and_results_to_stdout(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    arguments = [str(PESSA), "prune", str(tiny_folder("whisper")), "-o", str(tmp_path / "out"), "--json"]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, stderr=theirs, env=environment, check=True, text=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert "writing" in shown
    assert "6/6 blocks" in shown
    assert a_json(done.stdout)["command"] == "prune"


@pytest.mark.slow
def test_a_closed_pipe_causes_no_traceback(tiny_folder: TinyFolder) -> None:
    """As in `pessa inspect MODEL | head -1`."""
    ours, theirs = os.pipe()
    process = subprocess.Popen([PESSA, "inspect", tiny_folder("whisper")], stdout=theirs, stderr=subprocess.PIPE)
    os.close(theirs)
    os.close(ours)
    _, err = process.communicate()
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


@pytest.mark.slow
def test_a_terminal_that_supports_only_ascii(tiny_folder: TinyFolder) -> None:
    result = run("inspect", tiny_folder("whisper"), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (result.returncode, "Traceback" in result.stderr) == (0, False)
    assert "encoder.self.0" in result.stdout
