"""Hostile files raise PessaError quickly and in little memory; no code is run and no other file is written.

scripts/fuzz.py runs the same strategies with any number of cases; here are a few of each, and the known attacks.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from fuzzing import Fuzzer, limited, make_fuzzers
from harness import TinyFolder, copy_of, edit_json
from hostile import (
    CONFIG,
    INDEX,
    MANIFEST,
    RECIPE,
    SPECTRA,
    WEIGHTS,
    Case,
    bounded,
    header_of,
    make_bases,
    outcome,
    targets,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save

from pessa_cli.checkpoint.files import MOST_JSON, read_json, write_json
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import read_text
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.models.data import read_data
from pessa_cli.models.instructions import read_rows
from pessa_cli.ranks.rule import Rule
from pessa_cli.sources.open import open_source
from pessa_cli.sources.torch_file import read_torch_file
from pessa_cli.sources.whisper_folder import read_vocabulary
from pessa_cli.statistics.file import SavedStatistics
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.spectra_file import load_spectra
from pessa_cli.tuning.merge import Adapter
from pessa_cli.workflow.recipe import load_recipe

TARGETS = ("header", "bytes", "index", "config", "manifest", "spectra", "recipe")
Bases = dict[str, Path]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    return make_bases(tmp_path_factory.mktemp("bases"))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_any_file_works_or_is_refused(target: str, bases: Bases, tmp_path: Path) -> None:
    found: set[str] = set()

    @settings(
        max_examples=60,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(targets(bases)[target])
    def attack(case: Case) -> None:
        found.add(outcome(case, bases, tmp_path / "place"))

    attack()
    assert "PessaError" in found


def test_the_undamaged_models_pass(bases: Bases, tmp_path: Path) -> None:
    """The control: the cases above are refused because of their damage."""
    for name, folder in bases.items():
        unchanged = Case(name, {path.name: path.read_bytes() for path in folder.iterdir() if path.name != MANIFEST})
        assert outcome(unchanged, bases, tmp_path / "place") == "fine"
    for name in ("decomposed", "compact"):
        unchanged = Case(name, {MANIFEST: (bases[name] / MANIFEST).read_bytes()})
        assert outcome(unchanged, bases, tmp_path / "place") == "fine"
    assert outcome(Case("bert", {RECIPE: b"[prune]\nrank = 2"}), bases, tmp_path / "place") == "fine"


def refused(case: Case, bases: Bases, place: Path) -> str:
    """Return the message of the PessaError."""
    with pytest.MonkeyPatch.context() as patch:
        seen: list[str] = []
        made = PessaError.__init__

        def noted(self: PessaError, message: str, hint: str | None = None) -> None:
            seen.append(message)
            made(self, message, hint)

        patch.setattr(PessaError, "__init__", noted)
        assert outcome(case, bases, place) == "PessaError"
    return seen[-1]


def with_header(folder: Path, change: Callable[[str], str]) -> dict[str, Any]:
    header, data = header_of((folder / WEIGHTS).read_bytes())
    encoded = change(json.dumps(header)).encode()
    return {WEIGHTS: struct.pack("<Q", len(encoded)) + encoded + data}


def twice(header: str) -> str:
    """Repeat the header's first entry at the end."""
    name, entry = next(iter(json.loads(header).items()))
    return f"{header[:-1]}, {json.dumps(name)}: {json.dumps(entry)}}}"


def as_lists(header: str) -> str:
    """Write entries as lists, which the safetensors library also accepts."""
    return json.dumps({name: list(entry.values()) for name, entry in json.loads(header).items()})


HEADERS: dict[str, tuple[Callable[[str], str], str]] = {
    "duplicate names": (twice, "twice"),
    "entries as lists": (as_lists, "lists"),
    "names that steer a terminal": (lambda h: h.replace("embeddings", r"\u001b[2Jembeddings"), "not printable"),
    "endless names": (lambda h: h.replace("embeddings", "x" * 600), "not printable"),
    "offsets past the file": (lambda h: h.replace("[0, 96]", "[0, 10000000000000]"), "not a complete"),
    "overlap": (lambda h: h.replace("[0, 96]", "[32, 128]"), "not a complete"),
    "reversed offsets": (lambda h: h.replace("[0, 96]", "[96, 0]"), "not a complete"),
    "product that overflows": (lambda h: h.replace("[3, 8]", "[4294967296, 4294967296, 24]"), "not a complete"),
    "negative shape": (lambda h: h.replace("[3, 8]", "[-3, -8]"), "not a complete"),
    "shape of floats": (lambda h: h.replace("[3, 8]", "[3.0, 8.0]"), "not a complete"),
    "shape of booleans": (lambda h: h.replace("[3, 8]", "[true, 24]"), "not a complete"),
    "dtype as a number": (lambda h: h.replace('"F32"', "32"), "not a complete"),
    "metadata as a list": (lambda h: h.replace("{", '{"__metadata__": [], ', 1), "not a complete"),
    "half a surrogate": (lambda h: h.replace("embeddings", r"\ud800"), "not a complete"),
    "depth": (lambda h: h.replace("[3, 8]", "[" * 5000 + "]" * 5000), "not a complete"),
}


@pytest.mark.parametrize("attack", HEADERS)
def test_headers(attack: str, bases: Bases, tmp_path: Path) -> None:
    change, says = HEADERS[attack]
    assert with_header(bases["bert"], change) != with_header(bases["bert"], str)
    assert says in refused(Case("bert", with_header(bases["bert"], change)), bases, tmp_path / "place")


def config(base: Path, **values: Any) -> dict[str, Any]:
    return {CONFIG: json.dumps(json.loads((base / CONFIG).read_text()) | values).encode()}


def claims(head_dim: int) -> dict[str, Any]:
    """Return a quantization_config whose heads have the given size and keep no direction of V-O."""
    modules = {f"model.layers.0.self_attn.{side}_proj": f"rows {head_dim}: 0 0" for side in "v"}
    modules |= {"model.layers.0.self_attn.o_proj": f"columns {head_dim}: 0 0 0 0"}
    return {"quant_method": "pessa", "modules": modules}


CONFIGS: dict[str, tuple[dict[str, Any], str]] = {
    "more heads than memory": ({"num_attention_heads": 10**12, "num_key_value_heads": 10**12}, "not a number of heads"),
    "more heads than numbers": ({"num_attention_heads": 10**4000}, "not a number of heads"),
    "as many heads as float64 has": ({"num_attention_heads": 1e308}, "not a number of heads"),
    "heads not a number": ({"num_attention_heads": float("nan")}, "not a number of heads"),
    "negative heads": ({"num_key_value_heads": -2}, "not a number of heads"),
    "heads larger than memory": ({"quantization_config": claims(99999)}, "model.layers.0.self_attn"),
    "head_dim beyond numbers": ({"quantization_config": claims(10**4000)}, "quantization_config"),
    "a module of dots": ({"quantization_config": {"quant_method": "pessa", "modules": {"." * 10**6: ""}}}, "module"),
    "a long story": ({"model_type": "x" * 10**6}, "is not supported"),
    "a model type that cannot be looked up": ({"model_type": {}}, "model_type"),
}


@pytest.mark.parametrize("attack", CONFIGS)
def test_configs(attack: str, bases: Bases, tmp_path: Path) -> None:
    values, says = CONFIGS[attack]
    assert says in refused(Case("llama", config(bases["llama"], **values)), bases, tmp_path / "place")


def test_zero_ranks_do_not_allow_huge_heads(bases: Bases, tmp_path: Path) -> None:
    """The tensors have no bytes, but their full size would be 2**50 entries."""
    wide = 2**40
    header = {
        f"model.layers.0.self_attn.{side}_proj.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}
        for side, shape in {"q": [0, wide], "k": [0, wide], "v": [0, wide], "o": [wide, 0]}.items()
    }
    encoded = json.dumps(header).encode()
    modules = {f"model.layers.0.self_attn.{side}_proj": "pairs 256: none none" for side in "qk"}
    modules |= {"model.layers.0.self_attn.v_proj": "rows 256: 0 0"}
    modules |= {"model.layers.0.self_attn.o_proj": "columns 256: 0 0"}
    claim = {"quantization_config": {"quant_method": "pessa", "modules": modules}, "num_attention_heads": 2}
    files = {WEIGHTS: struct.pack("<Q", len(encoded)) + encoded, **config(bases["llama"], **claim)}
    assert "at full size" in refused(Case("llama", files), bases, tmp_path / "place")


def test_json_beyond_the_limits_is_refused_before_parsing(bases: Bases, tmp_path: Path) -> None:
    model = copy_of(bases["bert"], tmp_path / "model")
    with (model / CONFIG).open("r+b") as file:
        file.truncate(MOST_JSON + 1)  # sparse
    with bounded(), pytest.raises(PessaError, match="more than"):
        CheckpointReader(model)
    length = MOST_JSON + 8
    with (model / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + length)
    shutil.copyfile(bases["bert"] / CONFIG, model / CONFIG)
    with bounded(), pytest.raises(PessaError, match="header would have"):
        CheckpointReader(model)


def test_lone_surrogates_in_json_are_written(tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(r'{"a": "\ud800", "b": "é"}')
    value = read_json(tmp_path / "in.json")
    write_json(tmp_path / "out.json", value)
    assert read_json(tmp_path / "out.json") == value
    write_json(tmp_path / "plain.json", {"b": "é"})
    assert "é" in (tmp_path / "plain.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "/dev/null", "a loop", "a folder"])
def test_pipes_and_devices_are_not_read(kind: str, name: str, bases: Bases, tmp_path: Path) -> None:
    """Reading a pipe would block for ever, and /dev/zero never ends."""
    model = copy_of(bases["bert"], tmp_path / "model")
    (model / name).unlink()
    if kind == "pipe":
        os.mkfifo(model / name)
    elif kind == "a folder":
        (model / name).mkdir()
    else:
        (model / name).symlink_to(name if kind == "a loop" else kind)
    with bounded(), pytest.raises(PessaError):
        open_model(model)


def test_links_of_the_hub_cache_are_followed(bases: Bases, tmp_path: Path) -> None:
    """In the cache every file of a snapshot is a link to ../../blobs, but an index must not name such a path."""
    for base in ("bert", "sharded"):
        cache = tmp_path / base
        snapshot = cache / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (cache / "blobs").mkdir()
        for number, path in enumerate(sorted(bases[base].iterdir())):
            shutil.copyfile(path, cache / "blobs" / str(number))
            (snapshot / path.name).symlink_to(f"../../blobs/{number}")
        prune_model(open_model(snapshot), tmp_path / f"{base}-out", Rule(rank=2), run=Run(jobs=1))
        out = list((tmp_path / f"{base}-out").iterdir())
        assert {WEIGHTS, CONFIG, "notes.txt"} <= {path.name for path in out}
        assert not any(path.is_symlink() for path in out)


@pytest.mark.parametrize(
    "file",
    [
        "../bert/model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "a\\b.safetensors",
        "..",
        ".",
        "",
        "./x.safetensors",
        ".hidden.safetensors",
        "a\0.safetensors",
        "\ud800.safetensors",
        "x" * 300 + ".safetensors",
        "x" * 10**6,
        "config.json",
        "\n.safetensors",
    ],
)
def test_an_index_names_only_files_of_its_folder(file: str, bases: Bases, tmp_path: Path) -> None:
    index = json.loads((bases["sharded"] / INDEX).read_text())
    index["weight_map"]["embeddings.weight"] = file
    message = refused(Case("sharded", {INDEX: json.dumps(index).encode()}), bases, tmp_path / "place")
    assert "outside its folder" in message or "not .safetensors files" in message


@pytest.mark.slow
def test_many_names_take_linear_time(bases: Bases, tmp_path: Path) -> None:
    """The time is proportional to the length of the header, not to its square."""
    block = "encoder.layer.{}.attention.{}"
    tensors = {
        block.format(i, side): torch.zeros(1, 1) for i in range(3000) for side in ("self.query.weight", "x.weight")
    }
    files: dict[str, Any] = {WEIGHTS: save(tensors)}
    assert "do not fit" in refused(Case("bert", files), bases, tmp_path / "place")
    modules = {f"encoder.layer.{i}.attention.self.query": "rows 4: 1 1" for i in range(30_000)}
    claim = config(bases["bert"], quantization_config={"quant_method": "pessa", "modules": modules})
    assert "do not fit" in refused(Case("bert", files | claim), bases, tmp_path / "place")


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(st.sampled_from(["nan", "inf", "negative", "ascending", "float32"]), st.integers(0, 7))
def test_invalid_spectra_are_refused(
    bases: Bases, tmp_path_factory: pytest.TempPathFactory, kind: str, at: int
) -> None:
    tensors = load_file(bases["decomposed"] / SPECTRA)
    values = tensors["encoder.self.0.vo"]
    if kind == "float32":
        tensors["encoder.self.0.vo"] = values.float()
    elif kind == "ascending":
        values[at // 4] = values[at // 4].flip(0)
    else:
        values.view(-1)[at] = {"nan": torch.nan, "inf": torch.inf, "negative": -1.0}[kind]
    place = tmp_path_factory.mktemp("spectra") / "place"
    assert SPECTRA in refused(Case("decomposed", {SPECTRA: save(tensors)}), bases, place)


RECIPES = {
    "huge": "[prune]\nrank = " + "9" * 400,
    "digits without end": "[prune]\nrank = " + "9" * 5000,
    "deep": "[prune]\nsites = " + "[" * 5000 + "]" * 5000,
    "huge limit": "[verify]\ntolerance = " + "9" * 400,
    "layers without end": '[prune]\nlayers = "' + "0-99999," * 10_000 + '0"',
    "long": "#" * 2**21,
}


@pytest.mark.parametrize("attack", RECIPES)
def test_recipes(attack: str, tmp_path: Path) -> None:
    (tmp_path / RECIPE).write_text(RECIPES[attack])
    with bounded(), pytest.raises(PessaError, match=RECIPE) as error:
        load_recipe(tmp_path / RECIPE)
    assert len(error.value.message) < 1000


def test_ranks_beyond_64_bits(bases: Bases, tmp_path: Path) -> None:
    """A multiple that large means the head size; such a rank is refused."""
    model = open_model(bases["bert"])
    prune_model(model, tmp_path / "out", Rule(rank=1, round_to=10**30), run=Run(jobs=1))
    assert [site.vo_ranks for site in open_model(tmp_path / "out").attention] == [(4, 4)]
    for rule in (Rule(rank=10**30), Rule(min_rank=10**30)):
        with bounded(), pytest.raises(PessaError, match=f"{10**30}: the largest head has 4"):
            prune_model(model, tmp_path / "no", rule, run=Run(jobs=1))


@pytest.mark.parametrize("name", ["bert", "whisper"])
def test_code_in_a_model_folder_is_never_run(
    name: str, tiny_folder: TinyFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """config.json and tokenizer_config.json refer to code; it must not be run, and the user must not be prompted."""
    model = copy_of(tiny_folder(name), tmp_path / "model")
    marker = tmp_path / "ran"
    (model / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nConfig = Model = Tokenizer = Processor = None\n")
    classes = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForMaskedLM": "evil.Model"}
    edit_json(lambda c: c.update(auto_map=classes, trust_remote_code=True))(model)
    tokens = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}
    (model / "tokenizer_config.json").write_text(json.dumps(tokens))
    (model / "preprocessor_config.json").write_text(json.dumps({"auto_map": {"AutoProcessor": "evil.Processor"}}))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run it"))
    prune_model(open_model(model), tmp_path / "out", Rule(), run=Run(jobs=1))
    with suppress(PessaError):  # there is no tokenizer without that code
        verify_models(open_model(model), open_model(tmp_path / "out"), level="outputs")
    assert not marker.exists()


READERS = (
    *("safetensors", "index", "config", "manifest", "spectra", "statistics", "GGUF", "CTranslate2", "pickle"),
    *("old pickle", "openai .pt", "adapter", "adapter's weights", "recipe", "JSONL", "examples", "reader"),
)


@pytest.mark.slow
def test_every_reader_refuses_or_reads(tmp_path: Path) -> None:
    """A hundred cases of each of the fuzzers of scripts/fuzz.py, which runs as many as it is asked for."""
    (tmp_path / "bases").mkdir()
    fuzzers = make_fuzzers(tmp_path / "bases")
    assert set(READERS) == fuzzers.keys() - {"GGUF, whole"}
    for name in READERS:
        kinds = Counter(fuzzers[name].run(number, tmp_path / name, measured=False).kind for number in range(100))
        assert set(kinds) <= {"read", "PessaError"}, (name, kinds)
        assert kinds["PessaError"] > 20, (name, kinds)


def test_the_fuzzer_notices() -> None:
    """The control: an exception, a hang, much memory and an endless message are failures."""

    def hang(_: Path) -> None:
        while True:
            pass

    def say(path: Path) -> None:
        raise PessaError(str(path) * 10_000)

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "from").mkdir()
        (Path(folder) / "from" / "x").write_bytes(b"x")
        none: dict[str, int] = {}
        readers: dict[str, Callable[[Path], object]] = {
            "KeyError": lambda _: none["x"],
            "Late": hang,
            "bytes of memory": lambda _: bytes(10**8),
            "message": say,
        }
        for says, read in readers.items():
            found = Fuzzer(Path(folder) / "from", "x", lambda _, content: content, read).run(0, Path(folder) / "to")
            assert found.kind.startswith("FAILURE")
            assert says in found.kind


@pytest.mark.parametrize("kind", ["pipe", "/dev/zero", "a socket"])
def test_pipes_are_read_by_no_reader(kind: str, bases: Bases, tmp_path: Path) -> None:
    """Opening a pipe blocks until somebody writes to it; each reader asks first what it is."""

    def special(path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "a socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(os.path.relpath(path))
        else:
            path.symlink_to(kind)
        return path

    sites = open_model(bases["bert"]).attention
    model = copy_of(bases["bert"], tmp_path / "m")
    (model / WEIGHTS).unlink()
    special(model / "pytorch_model.bin")
    ct2 = copy_of(bases["bert"], tmp_path / "c")
    (ct2 / WEIGHTS).unlink()
    (ct2 / "model.bin").write_bytes(b"x")
    special(ct2 / "vocabulary.txt")
    adapter = tmp_path / "a" / "adapter_config.json"
    readers: dict[str, Callable[[], object]] = {
        "GGUF": lambda: _opened(special(tmp_path / "x.gguf")),
        "openai": lambda: _opened(special(tmp_path / "x.pt")),
        "pickle": lambda: _opened(model),
        "torch": lambda: read_torch_file(special(tmp_path / "y.pt")),
        "vocabulary": lambda: read_vocabulary(ct2, 3),
        "recipe": lambda: load_recipe(special(tmp_path / "r.toml")),
        "data": lambda: read_data([special(tmp_path / "d.jsonl")]),
        "audio": lambda: read_data([special(tmp_path / "audio" / "d.wav").parent]),
        "examples": lambda: read_rows(special(tmp_path / "e.json")),
        "text": lambda: read_text(special(tmp_path / "t.txt")),
        "statistics": lambda: SavedStatistics(special(tmp_path / "s.safetensors")),
        "adapter": lambda: Adapter(special(adapter).parent),
    }
    for name, read in readers.items():
        with limited(), pytest.raises(PessaError) as error:
            read()
        assert error.value.message, name
    special(copy_of(bases["decomposed"], tmp_path / "p") / SPECTRA)
    with limited():
        assert load_spectra(tmp_path / "p", sites) == {}  # as if it were not there


def _opened(path: Path) -> None:
    with open_source(str(path), allow_pickle=True) as folder:
        open_model(folder)


def test_a_length_beyond_the_file_takes_no_memory(bases: Bases, tmp_path: Path) -> None:
    folder = copy_of(bases["bert"], tmp_path / "model")
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes((24 * 2**20).to_bytes(8, "little") + content[8:])
    tracemalloc.start()
    try:
        with pytest.raises(PessaError, match="not a complete safetensors file"):
            CheckpointReader(folder)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
