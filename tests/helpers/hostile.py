"""Hostile checkpoints, configs and recipes, as hypothesis strategies; for test_hostile.py and scripts/fuzz.py.

A case is a small model in which some files were replaced. `outcome` opens it as the commands do, and rewrites it. That
must either work or raise PessaError, quickly and in little memory, and must write no other file.
"""

from __future__ import annotations

import json
import resource
import shutil
import signal
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy
from safetensors.torch import save

from pessa_cli.blocks.site import select
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.decomposition import measure
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.run import Run
from pessa_cli.workflow.recipe import Recipe, load_recipe

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
SPECTRA, MANIFEST, RECIPE = "spectra.safetensors", "pessa.json", "recipe.toml"
SECONDS = 5  # the most seconds that a case may take; most take a hundredth of a second
MEMORY = 2**29  # the most bytes of address space that a case may add
WIDTH = 8  # of the small models
CHANNELS = 6  # of the MLPs

Damage = bytes | str | None  # the content of a file, the target of a link, or no file


@dataclass(frozen=True)
class Case:
    """A model by its name in `bases`, and the replacements of some of its files."""

    base: str
    files: dict[str, Damage]


class Raw(str):
    """JSON as text, for JSON that json.dumps cannot write."""


class Pairs(list[tuple[str, Any]]):
    """A JSON object that may have duplicate keys."""


def emit(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key)}:{emit(inner)}" for key, inner in value) + "}"
    if isinstance(value, dict):
        return emit(Pairs(value.items()))
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(emit, value)) + "]"
    return json.dumps(value)


# The small models.


def make_bases(folder: Path) -> dict[str, Path]:
    """Make the small models: two of one layer, a sharded one, and one decomposed and one pruned by pessa."""
    torch.manual_seed(0)
    block = "encoder.layer.0.attention."
    bert = {f"{block}{name}.weight": torch.randn(WIDTH, WIDTH) for name in ("self.query", "self.key", "self.value")}
    bert |= {f"{block}{name}.bias": torch.randn(WIDTH) for name in ("self.query", "self.key", "self.value")}
    bert |= {f"{block}output.dense.weight": torch.randn(WIDTH, WIDTH), f"{block}output.dense.bias": torch.randn(WIDTH)}
    for name, shape in (("intermediate", (CHANNELS, WIDTH)), ("output", (WIDTH, CHANNELS))):
        bert |= {f"encoder.layer.0.{name}.dense.weight": torch.randn(shape)}
        bert |= {f"encoder.layer.0.{name}.dense.bias": torch.randn(shape[0])}
    bert |= {"embeddings.weight": torch.randn(3, WIDTH)}
    block = "model.layers.0.self_attn."
    llama = {f"{block}{side}_proj.weight": torch.randn(WIDTH, WIDTH) for side in "qo"}
    llama |= {f"{block}{side}_proj.weight": torch.randn(WIDTH // 2, WIDTH) for side in "kv"}
    llama |= {f"model.layers.0.mlp.{name}_proj.weight": torch.randn(CHANNELS, WIDTH) for name in ("gate", "up")}
    llama |= {"model.layers.0.mlp.down_proj.weight": torch.randn(WIDTH, CHANNELS)}
    configs: dict[str, dict[str, Any]] = {
        "bert": {"model_type": "bert", "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": CHANNELS},
        "llama": {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
        | {"intermediate_size": CHANNELS},
    }
    for name, tensors in (("bert", bert), ("llama", llama)):
        (folder / name).mkdir()
        (folder / name / WEIGHTS).write_bytes(save(tensors))
        (folder / name / CONFIG).write_text(json.dumps(configs[name]))
        (folder / name / "notes.txt").write_text("copied along")
    sharded = folder / "sharded"
    shutil.copytree(folder / "bert", sharded)
    (sharded / WEIGHTS).unlink()
    names, shards = list(bert), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    parts = dict(zip(shards, (names[:4], names[4:]), strict=True))
    for shard, part in parts.items():
        (sharded / shard).write_bytes(save({name: bert[name] for name in part}))
    weight_map = {name: shard for shard, part in parts.items() for name in part}
    (sharded / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    decompose_model(open_model(folder / "bert"), folder / "decomposed", run=Run(jobs=1))
    prune_model(open_model(folder / "llama"), folder / "compact", Rule(rank=1, rope_ratio=0.5), run=Run(jobs=1))
    return {name: folder / name for name in ("bert", "llama", "sharded", "decomposed", "compact")}


# The content of hostile files.

EDGES = [-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 63, 64, 2**15, 2**31, 2**32, 2**40, 2**53, 2**62, 2**63, 2**64 - 1, 2**64]
EDGES += [10**30, -(2**31), -(2**63)]
NAMES = ["", " ", "..", "../../x", "/etc/passwd", "C:\\x", "a/b", "a\0b", "\x1b[2J", "\ud800", "é", "\u202e", "x" * 300]
NAMES += ["x" * 5000, "a." * 300, "__metadata__", "con", "layers.٣.self_attn", ".safetensors", "-rf"]
numbers = st.sampled_from(EDGES) | st.integers(-20, 20) | st.integers()
raws = st.sampled_from(
    [
        "1e999",
        "-0",
        "1.0",
        "1e2",
        "NaN",
        "Infinity",
        "9" * 5000,
        "[" * 60 + "]" * 60,
        "[" * 2000 + "]" * 2000,
        "[" * 100_000,
        '{"a":' * 500 + "1" + "}" * 500,
        '"\\ud800"',
        '"\\u0000"',
        "nul",
        "",
        "tru",
        "\ufeff1",
    ]
).map(Raw)
texts = st.text(max_size=20) | st.sampled_from(NAMES)
scalars = numbers | st.floats() | st.booleans() | st.none() | texts | raws
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
)


@st.composite
def rarely(draw: DrawFn, common: SearchStrategy[Any], rare: SearchStrategy[Any]) -> Any:
    return draw(rare if draw(st.integers(0, 11)) == 7 else common)


def header_of(file: bytes) -> tuple[dict[str, Any], bytes]:
    start = 8 + struct.unpack("<Q", file[:8])[0]
    return json.loads(file[8:start]), file[start:]


def safetensors(header: str, data: bytes, length: int | None = None) -> bytes:
    encoded = header.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(encoded) if length is None else length % 2**64) + encoded + data


@st.composite
def damaged_safetensors(draw: DrawFn, content: bytes) -> bytes:
    """A safetensors file with changes in a few places of its header, or in its bytes."""
    header, data = header_of(content)
    pairs = Pairs(header.items())
    spans = [entry.get("data_offsets", (0, 0)) for entry in header.values()]
    dtypes = st.sampled_from(["F64", "F32", "F16", "BF16", "I32", "BOOL", "F8_E4M3", "F4", "U64", "f32", ""]) | anything
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(pairs) - 1))
        name, entry = pairs[at]
        entry = dict(entry) if isinstance(entry, dict) else {}
        begin, end = spans[at] if at < len(spans) else (0, len(data))
        what = draw(st.integers(0, 16))
        if what == 0:
            entry["shape"] = draw(rarely(st.lists(numbers, max_size=5), anything))
        elif what == 1:
            entry["data_offsets"] = draw(rarely(st.lists(numbers, max_size=3), anything))
        elif what == 2:
            entry["data_offsets"] = draw(st.sampled_from([[end, begin], [begin, begin], [begin, end + 4], [0, end]]))
        elif what == 3:
            entry["dtype"] = draw(dtypes)
        elif what == 4:
            name = draw(texts | st.sampled_from([pair[0] for pair in pairs]))
        elif what == 5:
            pairs.append((draw(st.sampled_from([pair[0] for pair in pairs])), entry))
        elif what == 6:
            pairs.append(("__metadata__", draw(st.dictionaries(texts, texts, max_size=3) | anything)))
        elif what == 7:
            zero = {"dtype": "F32", "shape": draw(st.permutations([0, draw(numbers)])), "data_offsets": [end, end]}
            pairs.append((draw(texts), zero))
        elif what == 8:
            entry[draw(st.sampled_from(["shape", "dtype", "data_offsets", "more"]))] = draw(anything)
        elif what == 9:
            entry = draw(st.sampled_from([list(entry.values()), None, [], {}]) | anything)
        elif what == 10:
            entry["shape"] = [n for n in header.get(name, {}).get("shape", []) for n in (n, 1)] + [
                draw(st.sampled_from([0, 1, 2]))
            ]
        elif what >= 11 and name in header:  # allowed by the format, but not found in models
            count = (end - begin) // 4
            shapes = [[count], [1, count], [count // 4, 4], [count // 8, 8], [2, count // 2], [count, 1, 1], [8, 0, 8]]
            entry["shape"] = draw(st.sampled_from(shapes))
            entry["dtype"] = draw(st.sampled_from(["F32", "F32", "I32"]))
            if what > 14:
                name = draw(st.sampled_from(list(header))).replace(
                    "0", draw(st.sampled_from(["0", "1", "00", "99999", "٣"]))
                )
            if what == 16:
                name = draw(st.sampled_from(["x.", "model.", "..", "0."])) + name
        pairs[at] = (name, entry)
    text = draw(rarely(st.just(emit(pairs)), raws | st.just(" " + emit(pairs)) | st.just(emit(pairs) * 2)))
    if draw(st.integers(0, 19)) == 7:
        data = draw(st.sampled_from([b"", data[:-1], data + b"\0", data * 2]))
    length = draw(rarely(st.none(), numbers))
    return safetensors(text, data, length)


@st.composite
def damaged_bytes(draw: DrawFn, content: bytes) -> bytes:
    """A file with a few bytes flipped, removed or inserted."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at, what = draw(st.integers(0, len(changed))), draw(st.integers(0, 3))
        if what == 0 and at < len(changed):
            changed[at] ^= 1 << draw(st.integers(0, 7))
        elif what == 1:
            del changed[at:]
        elif what == 2:
            changed[at:at] = draw(st.binary(max_size=9))
        else:
            del changed[at : at + draw(st.integers(1, 40))]
    return bytes(changed)


@st.composite
def damaged_json(draw: DrawFn, content: str, keys: list[str], values: SearchStrategy[Any]) -> bytes:
    """A JSON object with other values for the given keys and with additional keys, or text that is not JSON."""
    pairs = Pairs(json.loads(content).items())
    for _ in range(draw(st.integers(1, 3))):
        key = draw(rarely(st.sampled_from(keys), texts))
        value = draw(values)
        kept = Pairs(pair for pair in pairs if pair[0] != key or draw(st.integers(0, 4)) == 0)
        pairs = Pairs([*kept, (key, value)]) if draw(st.integers(0, 9)) else kept
    text: str = draw(rarely(st.just(emit(pairs)), raws | anything.map(emit)))
    return text.encode("utf-8", "surrogatepass")


def ranks_text() -> SearchStrategy[Any]:
    plain = st.lists(st.integers(0, 9), min_size=1, max_size=5).map(lambda ranks: " ".join(map(str, ranks)))
    odd = st.sampled_from(
        ["", " ", "-1 2", "2 2 ", "٣ ٣", "1e1", "9" * 5000, "2\n2", "0x1", "2 " * 9999, "nan 1", "1_0 1"]
    )
    return rarely(plain, odd | anything)


@st.composite
def quantizations(draw: DrawFn, base: Path) -> Any:
    block = "model.layers.0.self_attn."
    config = json.loads((base / CONFIG).read_text())
    modules: dict[str, Any] = dict(config.get("quantization_config", {}).get("modules", {}))
    for _ in range(draw(st.integers(0, 3))):
        side, count = draw(st.sampled_from(["rows", "columns", "Rows", ""])), draw(numbers)
        module = block + draw(st.sampled_from(["q_proj", "k_proj", "v_proj", "o_proj"]))
        module = draw(rarely(st.just(module), texts))
        text = draw(st.just(f"{side} {count}: {draw(ranks_text())}") | ranks_text())
        modules[module] = text
    whole = {
        "quant_method": draw(rarely(st.just("pessa"), anything)),
        "modules": draw(rarely(st.just(modules), anything)),
    }
    return draw(rarely(st.just(whole), anything))


@st.composite
def shard_names(draw: DrawFn) -> Any:
    odd = [
        "../sharded/model-00001-of-00002.safetensors",
        "/etc/passwd",
        "./model-00001-of-00002.safetensors",
        "..",
        ".",
    ]
    odd += ["model-00001-of-00002.safetensors/", "a\\b.safetensors", "link.safetensors", "C:x.safetensors", "fifo"]
    odd += [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "config.json",
        "spectra.safetensors",
    ]
    return draw(st.sampled_from(odd) | texts | texts.map(lambda text: text + ".safetensors") | anything)


@st.composite
def indices(draw: DrawFn, content: str) -> bytes:
    weight_map = json.loads(content)["weight_map"]
    pairs = Pairs(weight_map.items())
    for _ in range(draw(st.integers(1, 3))):
        at, what = draw(st.integers(0, len(pairs) - 1)), draw(st.integers(0, 2))
        if what == 0:
            pairs[at] = (pairs[at][0], draw(shard_names()))
        elif what == 1:
            pairs[at] = (draw(texts), pairs[at][1])
        else:
            pairs.append((draw(texts | st.just(pairs[at][0])), draw(shard_names())))
    if draw(st.integers(0, 30)) == 0:
        pairs = Pairs([*pairs, *((f"tensor.{i}", "model-00001-of-00002.safetensors") for i in range(20_000))])
    whole = {"metadata": draw(rarely(st.just({}), anything)), "weight_map": draw(rarely(st.just(pairs), anything))}
    return str(draw(rarely(st.just(emit(whole)), raws))).encode("utf-8", "surrogatepass")


LINKS = ["model-00001-of-00002.safetensors", "/dev/zero", "/dev/null", "/etc/passwd", "link.safetensors", "/", "gone"]


def linked(name: str) -> SearchStrategy[Mapping[str, Damage]]:
    """Sometimes a symbolic link of that name, with a valid or invalid target."""
    link: SearchStrategy[Mapping[str, Damage]] = st.sampled_from(LINKS).map(lambda target: {name: target})
    none: SearchStrategy[Mapping[str, Damage]] = st.just({})
    return rarely(none, link)


@st.composite
def recipes(draw: DrawFn) -> bytes:
    keys = [
        "qk_thr",
        "vo_thr",
        "ratio",
        "rank",
        "energy",
        "round_to",
        "min_rank",
        "sites",
        "layers",
        "method",
        "layout",
    ]
    toml = numbers.map(str) | st.floats().map(str) | texts.map(json.dumps) | st.booleans().map(lambda b: str(b).lower())
    toml |= st.sampled_from(["9" * 5000, "1e999", "[" * 2000 + "]" * 2000, "[1]", '["encoder.self"]', '"svd"', '"0"'])
    toml |= st.sampled_from(['"0-99999"', '"0-9"', '"' + "0-99999," * 400 + '0"', "1979-05-27", "{a = 1}", "0xffff"])
    lines = ["[prune]"] + [f"{draw(st.sampled_from(keys))} = {draw(toml)}" for _ in range(draw(st.integers(0, 3)))]
    if draw(st.integers(0, 3)) == 0:
        key = draw(st.sampled_from(["level", "tolerance", "min_agreement", "x"]))
        lines += ["[verify]", f"{key} = {draw(toml)}"]
    text: str = draw(rarely(st.just("\n".join(lines)), st.text() | toml))
    content: bytes = text.encode("utf-8", "surrogatepass")
    damaged: bytes = draw(rarely(st.just(content), damaged_bytes(content)))
    return damaged


def targets(bases: Mapping[str, Path]) -> dict[str, SearchStrategy[Case]]:
    """Return the strategies for cases by the kind of file that they attack."""

    def one(base: str, file: str, contents: Callable[[bytes], SearchStrategy[bytes]]) -> SearchStrategy[Case]:
        return contents((bases[base] / file).read_bytes()).map(lambda content: Case(base, {file: content}))

    everything = [(base, path.name) for base, folder in bases.items() for path in sorted(folder.iterdir())]
    heads = ["num_attention_heads", "num_key_value_heads", "model_type", "quantization_config", "auto_map", "head_dim"]
    model_types = st.sampled_from(["bert", "llama", "whisper", "gpt2", ["bert"], {"bert": 1}])
    rank_maps = st.fixed_dictionaries({"qk": ranks_text(), "vo": ranks_text()}) | anything
    blocks = st.dictionaries(st.sampled_from(["encoder.self.0", "decoder.self.0", "x"]), rank_maps, max_size=2)
    manifest_values = st.one_of(blocks, blocks, anything, st.sampled_from(["svd", "vanilla", ["svd"], {}, "dense"]))

    def configs(base: str) -> SearchStrategy[Case]:
        values = st.one_of(numbers, model_types, anything, quantizations(bases[base]))
        content = (bases[base] / CONFIG).read_text()
        return damaged_json(content, heads, values).map(lambda found: Case(base, {CONFIG: found}))

    def manifests(base: str) -> SearchStrategy[Case]:
        content = (bases[base] / MANIFEST).read_text()
        keys = ["ranks", "ranks", "method", "rule", "layout", "sha256", "pessa"]
        damaged = damaged_json(content, keys, manifest_values)
        return damaged.map(lambda found: Case(base, {MANIFEST: found}))

    return {
        "header": st.one_of([one(base, WEIGHTS, damaged_safetensors) for base in ("bert", "llama", "compact")]),
        "bytes": st.sampled_from(everything).flatmap(lambda pair: one(pair[0], pair[1], damaged_bytes)),
        "index": st.builds(
            lambda content, link: Case("sharded", {INDEX: content, **link}),
            indices((bases["sharded"] / INDEX).read_text()),
            linked("link.safetensors"),
        ),
        "config": st.one_of(configs("bert"), configs("llama"), configs("compact")),
        "manifest": st.one_of(manifests("decomposed"), manifests("compact")),
        "spectra": st.one_of(
            one("decomposed", SPECTRA, damaged_safetensors), one("decomposed", SPECTRA, damaged_spectra)
        ),
        "recipe": recipes().map(lambda content: Case("bert", {RECIPE: content})),
    }


@st.composite
def damaged_spectra(draw: DrawFn, content: bytes) -> bytes:
    """A well-formed spectra file with numbers that no spectrum has."""
    header, data = header_of(content)
    values = bytearray(data)
    numbers_ = st.sampled_from([0.0, -0.0, -1.0, 1e-320, 1e300, 1e9, float("nan"), float("inf"), -float("inf"), 3.0])
    for _ in range(draw(st.integers(1, 4))):
        struct.pack_into("<d", values, 8 * draw(st.integers(0, len(values) // 8 - 1)), draw(numbers_ | st.floats()))
    return safetensors(json.dumps(header), bytes(values))


# Running the cases.


@contextmanager
def bounded() -> Iterator[None]:
    """Limit the time and address space inside the context; exceeding either raises an error other than PessaError."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, before)


def outcome(case: Case, bases: Mapping[str, Path], place: Path) -> str:
    """Return "fine" or "PessaError"; any other exception, and a write to anywhere but the output, is raised."""
    model, out = place / "above" / "model", place / "above" / "out"
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(bases[case.base], model)
    for name, content in case.files.items():
        path = model / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.unlink(missing_ok=True)
            if content is not None:
                path.symlink_to(content)
    before = {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}
    refusal: PessaError | None = None
    try:
        with bounded():
            _work(case, model, out)
    except PessaError as error:
        refusal = error
    if refusal is not None:
        assert 0 < len(refusal.message) < 20_000, "a message of a file's making"
        assert not out.exists(), "an output in spite of an error"
    left = sorted(path.relative_to(place).as_posix() for path in (*place.iterdir(), *(place / "above").iterdir()))
    assert left == ["above", "above/model", *(["above/out"] if refusal is None else [])], left
    assert before == {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()}, "source changed"
    return "fine" if refusal is None else "PessaError"


def _work(case: Case, folder: Path, out: Path) -> None:
    run = Run(jobs=1)
    recipe = load_recipe(folder / RECIPE) if RECIPE in case.files else None
    model = open_model(folder)
    if MANIFEST in case.files:
        export_model(model, out, "dense", run=run)
    elif recipe is not None:
        _by_recipe(recipe, model, out, run)
    else:
        sites = select(model.attention)
        measure(model, sites, run=run)
        prune_model(model, out, Rule(), sites, run=run)
    open_model(out)  # pessa must be able to read its own output


def _by_recipe(recipe: Recipe, model: Model, out: Path, run: Run) -> None:
    sites = select(model.attention, recipe.sites, recipe.layers)
    prune_model(model, out, recipe.rule, sites, recipe.method, recipe.layout, run)
