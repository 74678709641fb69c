"""Fuzzing of every reader of files: mutations that know the format, one number for each case.

`Fuzzer.run(seed)` makes the case of that number, reads it as the program does, and returns what came of it. That must
be success or a PessaError, within SECONDS and within MEMORY_FACTOR times the size of the files and MEMORY bytes.
"""

from __future__ import annotations

import json
import pickletools
import random
import shutil
import signal
import struct
import time
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import numpy as np
import tiny_gguf
import torch
from safetensors.torch import save

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.models.data import read_data
from pessa_cli.models.instructions import read_rows
from pessa_cli.sources import ctranslate2, gguf, openai, pickled
from pessa_cli.statistics.file import SavedStatistics, save_statistics
from pessa_cli.statistics.sums import AttentionStatistics, shapes_of
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.spectra_file import load_spectra
from pessa_cli.tuning.merge import Adapter
from pessa_cli.workflow.recipe import load_recipe

SECONDS = 2.0
MEMORY_FACTOR, MEMORY = 4, 16 * 2**20  # the constant is what libraries take for buffers and at their first use
WORDS = ["", "a", "__proto__", "nan", "\x1b[2J", "\u202e", "é", "\ud800", "[/b]", "x" * 300, "../..", "0", "-1", "\0"]
Read = Callable[[Path], object]


class Outcome(NamedTuple):
    """What came of a case: "read", "PessaError" or "FAILURE: ...", the seconds, and the bytes of memory at the peak."""

    kind: str
    seconds: float
    memory: int


@dataclass(frozen=True)
class Fuzzer:
    """A reader, the folder that a case starts from, and the file in it that `mutate` changes.

    share: the part of the cases that is run, because a case takes longer.
    """

    folder: Path
    file: str
    mutate: Callable[[random.Random, bytes], bytes]
    read: Read
    share: float = 1.0

    def run(self, seed: int, place: Path, measured: bool = True) -> Outcome:
        """Make the case of a number in the folder `place`, which is replaced, and read it."""
        rng = random.Random(seed)
        if not place.exists():
            shutil.copytree(self.folder, place)
        content = self.mutate(rng, (self.folder / self.file).read_bytes())
        (place / self.file).write_bytes(content)
        size = sum(path.stat().st_size for path in place.iterdir())
        if measured:
            tracemalloc.start()
        start = time.perf_counter()
        try:
            with limited():
                self.read(place / self.file)
            kind = "read"
        except PessaError as error:
            text = f"{error.message}\n{error.hint}"
            kind = "PessaError" if len(text) < 20_000 else "FAILURE: a message of a file's making"
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            kind = f"FAILURE: {type(error).__name__}: {str(error)[:150]}"
        seconds = time.perf_counter() - start
        memory = tracemalloc.get_traced_memory()[1] if measured else 0
        tracemalloc.stop()
        if memory > MEMORY_FACTOR * size + MEMORY:
            kind = f"FAILURE: {memory:,} bytes of memory for files of {size:,}"
        return Outcome(kind, seconds, memory)


class Late(BaseException):
    """The time is over; no reader catches it."""


@contextmanager
def limited() -> Iterator[None]:
    """Raise Late after SECONDS."""

    def late(*_: object) -> None:
        raise Late(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# Mutations of bytes.


def some_bytes(rng: random.Random, content: bytes, head: int = 4096) -> bytes:
    """Change a few places, mostly in the first `head` bytes: bits, numbers of 1 to 8 bytes, cuts, and copies."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        end = min(len(changed), head) if rng.random() < 0.8 else len(changed)
        at, what = rng.randint(0, max(end - 1, 0)), rng.randrange(8)
        if what == 0 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif what <= 3:
            width = rng.choice((1, 2, 4, 8))
            changed[at : at + width] = (rng.choice(hostile.EDGES) % 256**width).to_bytes(width, "little")
        elif what == 4:
            changed[at : at + rng.randint(1, 40)] = b""
        elif what == 5:
            changed[at:at] = rng.randbytes(rng.randint(1, 9))
        elif what == 6:
            start = rng.randint(0, max(end - 1, 0))
            changed[at:at] = changed[start : start + rng.randint(1, 60)]
        elif rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def mostly(first: Callable[[random.Random, bytes], bytes]) -> Callable[[random.Random, bytes], bytes]:
    """Use a mutation of a format, one time in five followed by one of its bytes, one time in ten only that."""

    def mutate(rng: random.Random, content: bytes) -> bytes:
        chance = rng.random()
        if chance < 0.1:
            return some_bytes(rng, content)
        changed = first(rng, content)
        return some_bytes(rng, changed) if chance < 0.3 else changed

    return mutate


# Mutations of JSON, of TOML, and of the header of safetensors.


def some_value(rng: random.Random, depth: int = 0) -> Any:
    what = rng.randrange(9 if depth < 3 else 7)
    if what <= 2:
        return rng.choice(hostile.EDGES) if what < 2 else rng.uniform(-10, 10)
    if what == 3:
        return rng.choice([True, False, None, float("nan"), float("inf"), 1e308, 0.5])
    if what <= 5:
        return rng.choice([*WORDS, *hostile.NAMES])
    if what == 6:
        deep = ["[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000, "9" * 5000, "1e999", '"\\ud800"', "-0", "nul"]
        return hostile.Raw(rng.choice(deep))
    if what == 7:
        return [some_value(rng, depth + 1) for _ in range(rng.randint(0, 4))]
    return {rng.choice(WORDS): some_value(rng, depth + 1) for _ in range(rng.randint(0, 3))}


def changed_json(rng: random.Random, value: Any) -> Any:
    """Change one place of a value: replace, leave out, repeat or add something at any depth."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        pairs = hostile.Pairs(value.items())
        at = rng.randrange(len(pairs))
        key, inner = pairs[at]
        what = rng.randrange(8)
        if what <= 3:
            pairs[at] = (key, changed_json(rng, inner))
        elif what == 4:
            pairs[at] = (key, some_value(rng))
        elif what == 5:
            del pairs[at]
        elif what == 6:
            pairs.append((rng.choice([key, *WORDS]), rng.choice([inner, some_value(rng)])))
        else:
            pairs[at] = (rng.choice(WORDS), inner)
        return pairs
    if isinstance(value, list) and value and rng.random() < 0.85:
        items = list(value)
        at = rng.randrange(len(items))
        items[at] = changed_json(rng, items[at])
        return items if rng.random() < 0.8 else items[:at] + items * rng.randint(1, 3)
    if isinstance(value, int) and not isinstance(value, bool) and rng.random() < 0.4:
        return value + rng.choice([-1, 1, value, 2**32])
    return some_value(rng)


def some_json(rng: random.Random, content: bytes) -> bytes:
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 1, 2])):
        value = changed_json(rng, value if not isinstance(value, hostile.Pairs) else dict(value))
    return hostile.emit(value).encode("utf-8", "surrogatepass")


def some_lines(rng: random.Random, content: bytes) -> bytes:
    """Change the JSON in one of the lines, or the order and number of the lines."""
    lines = content.splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        if rng.random() < 0.7:
            try:
                lines[at] = some_json(rng, lines[at])
            except (ValueError, RecursionError):
                lines[at] = some_bytes(rng, lines[at])
        else:
            lines.insert(at, rng.choice([b"", lines[at] * 2, b"\xff", b"null", b"[]", b"\x85", b"1"]))
    return rng.choice([b"\n", b"\r\n", b"\n\n"]).join(lines)


def some_toml(rng: random.Random, content: bytes) -> bytes:
    lines = content.decode().splitlines()
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(lines))
        key = lines[at].partition("=")[0].strip()
        value = some_value(rng)
        shown = rng.choice([hostile.emit(value), str(value), '"x"', "[1, 2]", "{a = 1}", "1979-05-27", "0xffff", "'"])
        what = rng.randrange(4)
        if what == 0:
            lines[at] = f"{key} = {shown}"
        elif what == 1:
            lines.insert(at, rng.choice(lines))
        elif what == 2:
            lines.insert(at, rng.choice([f"{key}.x = {shown}", f"[{key}]", f"[[{key}]]", f"{json.dumps(shown)} = 1"]))
        else:
            del lines[at : at + 1]
            lines = lines or ["x"]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def some_header(rng: random.Random, content: bytes) -> bytes:
    """Change the header of a safetensors file, and sometimes its length or its data."""
    header, data = hostile.header_of(content)
    text = some_json(rng, json.dumps(header).encode())
    length = rng.choice([None] * 9 + [rng.choice(hostile.EDGES)])
    if rng.random() < 0.1:
        data = rng.choice([b"", data[:-1], data + b"\0", data * 2])
    elif rng.random() < 0.2:
        data = some_bytes(rng, data, len(data))
    return struct.pack("<Q", len(text) if length is None else length % 2**64) + text + data


# Mutations of pickles.

NUMBERS = ("BININT", "BININT1", "BININT2", "LONG1", "BINPUT", "BINGET", "LONG_BINPUT", "LONG_BINGET")
GLOBALS = [b"os\nsystem", b"builtins\neval", b"torch\nload", b"torch\nFloatStorage", b"torch\nUntypedStorage"]
GLOBALS += [b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_sparse_tensor", b"collections\nOrderedDict"]


def opcodes_of(content: bytes) -> list[bytes]:
    """The bytes of each opcode of the pickle at the start of the content, with its argument."""
    file = BytesIO(content)
    starts = [at or 0 for _, _, at in pickletools.genops(file)]
    return [content[a:b] for a, b in zip(starts, [*starts[1:], file.tell()], strict=True)]


def some_opcodes(rng: random.Random, content: bytes) -> bytes:
    """Leave out, repeat, exchange and add opcodes of a pickle, and change their arguments."""
    codes = opcodes_of(content)
    every = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(rng.randint(1, 4)):
        at, what = rng.randrange(len(codes)), rng.randrange(8)
        if what == 0:
            del codes[at]
            codes = codes or [b"."]
        elif what == 1:
            codes.insert(at, rng.choice(codes))
        elif what == 2:
            other = rng.randrange(len(codes))
            codes[at], codes[other] = codes[other], codes[at]
        elif what == 3:
            codes.insert(at, rng.choice(every) + rng.randbytes(rng.randint(0, 9)))
        elif what == 4:
            codes.insert(at, b"c" + rng.choice(GLOBALS) + b"\n" + rng.choice([b"", b")R", b"(X\1\0\0\0atR", b"b"]))
        elif what == 5:
            codes[at] = b"J" + struct.pack("<i", rng.choice([-1, 0, 1, 2, 7, 2**31 - 1, -(2**31)]))
        elif what == 6:
            codes[at] = b"\x8a\x09" + (rng.choice(hostile.EDGES) % 2**70).to_bytes(9, "little")
        else:  # nested values of exponential size
            codes.insert(at, b"]" + b"q\x70h\x70h\x70\x86" * rng.randint(1, 60))
    return b"".join(codes)


def some_archive(rng: random.Random, content: bytes) -> bytes:
    """Change the pickle in an archive of torch.save, or the archive's entries."""
    with zipfile.ZipFile(BytesIO(content)) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    file = BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, data in entries:
            kind = zipfile.ZIP_STORED
            if name.endswith("data.pkl") and rng.random() < 0.9:
                data = some_opcodes(rng, data)
            elif rng.random() < 0.03:
                what = rng.randrange(4)
                data = (data[:-1], data * 2, b"", data)[what]
                kind = zipfile.ZIP_DEFLATED if what == 3 else kind
            elif rng.random() < 0.02:
                name = rng.choice([*WORDS, name.upper(), f"../{name}", "other/data/0"]) or "x"
                name = name.replace("\0", "").encode("utf-8", "replace").decode() or "x"
            made.writestr(name, data, kind)
    return file.getvalue()


def some_old_file(rng: random.Random, content: bytes) -> bytes:
    """Change one of the five pickles of torch's older form."""
    parts, at = [], 0
    for _ in range(5):
        codes = opcodes_of(content[at:])
        parts.append(b"".join(codes))
        at += len(parts[-1])
    chosen = rng.choice([0, 1, 2, 3, 3, 3, 3, 4])
    parts[chosen] = some_opcodes(rng, parts[chosen])
    return b"".join(parts) + (content[at:] if rng.random() < 0.8 else some_bytes(rng, content[at:]))


# GGUF and CTranslate2, built from parts, each of which may lie.


def some_gguf(rng: random.Random, _content: bytes) -> bytes:
    def lie(value: int) -> int:
        return value if rng.random() < 0.99 else rng.choice(hostile.EDGES) % 2**64

    def text(value: str) -> bytes:
        encoded = value.encode("utf-8", "replace")
        return struct.pack("<Q", lie(len(encoded))) + encoded

    def value(kind: int, depth: int = 0) -> bytes:
        if kind == 8:
            return text(rng.choice(["llama", "linear", "", "x" * 300, "a"]))
        if kind == 9:
            inner, count = rng.choice([0, 4, 6, 8, 8, 9, 99]), rng.randint(0, 5)
            items = b"".join(value(inner, depth + 1) for _ in range(count)) if depth < 3 else b""
            return struct.pack("<IQ", inner, lie(count)) + items
        code = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}.get(kind)
        return b"" if code is None else rng.randbytes(struct.calcsize(code))

    keys: list[tuple[str, int, bytes]] = [("general.architecture", 8, struct.pack("<Q", 5) + b"llama")]
    numbers = {"block_count": 1, "embedding_length": 8, "attention.head_count": 2, "feed_forward_length": 8}
    numbers |= {"context_length": 64, "vocab_size": 8, "rope.dimension_count": 4}
    keys += [(f"llama.{key}", 4, struct.pack("<I", lie(number) % 2**32)) for key, number in numbers.items()]
    for _ in range(rng.randint(0, 4)):
        kind = rng.choice([0, 4, 5, 6, 7, 8, 9, 9, 10, 12, 13, 99])
        name = rng.choice(["general.alignment", "tokenizer.ggml.tokens", "llama.rope.freq_base", "split.count", "x"])
        keys.insert(rng.randint(0, len(keys)), (name, kind, value(kind)))
    names = ["token_embd.weight", "output_norm.weight", "output.weight", "rope_freqs.weight"]
    names += [f"blk.0.{n}.weight" for n in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "attn_norm")]
    tensors, offset = b"", 0
    for name in names:
        shape = [lie(8) for _ in range(1 if "norm" in name or "freqs" in name else 2)]
        tensors += text(name) + struct.pack("<I", lie(len(shape)) % 2**32)
        tensors += b"".join(struct.pack("<Q", size) for size in shape)
        tensors += struct.pack("<IQ", rng.choice([0] * 9 + [1, 8, 12, 30, 99]), lie(offset))
        offset += 256
    body = b"".join(text(name) + struct.pack("<I", kind) + data for name, kind, data in keys)
    head = b"GGUF" + struct.pack("<IQQ", rng.choice([3] * 20 + [0, 1, 2, 4]), lie(len(names)), lie(len(keys)))
    whole = head + body + tensors
    return whole + bytes(-len(whole) % 32) + rng.randbytes(offset)


def ctranslate2_file() -> bytes:
    """A Whisper of width 2, one layer and a vocabulary of four, as CTranslate2 stores it, in int8."""
    variables: dict[str, np.ndarray[Any, Any]] = {
        "encoder/conv1/weight": np.zeros((2, 4, 3), np.float32),
        "encoder/conv2/weight": np.zeros((2, 2, 3), np.float32),
        "decoder/embeddings/weight": np.zeros((4, 2), np.int8),
        "decoder/embeddings/weight_scale": np.ones(4, np.float32),
    }
    for side in ("encoder", "decoder"):
        variables[f"{side}/position_encodings/encodings"] = np.zeros((5, 2), np.float32)
        variables[f"{side}/num_heads"] = np.array(1, np.int16)
        blocks = [("self_attention", (6, 2))] + [("attention", (2, 4, 2))] * (side == "decoder")
        for block, rows in (*blocks, ("ffn", (3, 2))):
            path = f"{side}/layer_0/{block}"
            for i, count in enumerate(rows):
                columns = 3 if block == "ffn" and i else 2
                variables[f"{path}/linear_{i}/weight"] = np.ones((count, columns), np.int8)
                variables[f"{path}/linear_{i}/weight_scale"] = np.ones(count, np.float32)
                variables[f"{path}/linear_{i}/bias"] = np.zeros(count, np.float32)
            variables[f"{path}/layer_norm/gamma"] = np.ones(2, np.float32)
            variables[f"{path}/layer_norm/beta"] = np.zeros(2, np.float32)
        variables[f"{side}/layer_norm/gamma"] = np.ones(2, np.float32)
        variables[f"{side}/layer_norm/beta"] = np.zeros(2, np.float32)
    for conv in ("conv1", "conv2"):
        variables[f"encoder/{conv}/bias"] = np.zeros(2, np.float32)

    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    kinds = {"float32": 0, "int8": 1, "int16": 2}
    out = struct.pack("<I", 6) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        out += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        out += struct.pack("<BI", kinds[array.dtype.name], array.nbytes) + array.tobytes()
    return out + struct.pack("<I", 1) + text("decoder/projection/weight") + text("decoder/embeddings/weight")


# The readers.


def _torch_file(path: Path) -> None:
    found = pickled.load_pickle(path)
    for name in pickled.header_of(path, found.value):
        found.read(found.value[name])


def _gguf(path: Path) -> None:
    gguf._check_memory(path, gguf._checked_header(path)[0])


def _ctranslate2(path: Path) -> None:
    model = ctranslate2.read_model(path)
    plan = dict(ctranslate2._plan(ctranslate2._sizes(model)))
    ctranslate2._check(model, plan)
    for piece in plan.values():
        ctranslate2._tensor(model, piece)


def _safetensors(path: Path) -> None:
    model = open_model(path.parent)
    for name in model.reader.header:
        for _ in model.reader.checked_chunks(name):
            pass


def _adapter(path: Path) -> None:
    adapter = Adapter(path.parent)
    adapter.get(adapter.names)


def make_fuzzers(folder: Path) -> dict[str, Fuzzer]:
    """Make a small file for each reader below the folder, and return the readers by name."""
    bases = hostile.make_bases(folder)
    sites = open_model(bases["bert"]).attention
    torch.manual_seed(0)
    tensors = {"a.weight": torch.randn(4, 6), "b": torch.ones(3, dtype=torch.float16), "c": torch.randn(6, 4).t()}
    dims = dict.fromkeys(openai.DIMENSIONS, 2) | {"n_audio_layer": 1, "n_text_layer": 1}
    state = {name: torch.zeros(shape) for name, _, shape in openai.tensor_names(dims)}

    def made(name: str, file: str, content: bytes) -> Path:
        (folder / name).mkdir()
        (folder / name / file).write_bytes(content)
        return folder / name

    def saved(value: Any, zipped: bool = True) -> bytes:
        file = BytesIO()
        torch.save(value, file, _use_new_zipfile_serialization=zipped)
        return file.getvalue()

    shapes = {site.name: shapes_of(site) for site in sites}
    sums = {
        name: AttentionStatistics.of({n: torch.rand(s, dtype=torch.float64) for n, s in shapes[name].items()})
        for name in shapes
    }
    (folder / "statistics").mkdir()
    save_statistics(folder / "statistics" / "s.safetensors", sums, {site.name: "0" for site in sites}, ["0" * 64])
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    adapter_folder = made("adapter", "adapter_config.json", json.dumps(adapter).encode())
    low_rank = {f"base_model.model.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    (adapter_folder / "adapter_model.safetensors").write_bytes(save(low_rank))
    recipe = b'[prune]\nrank = 4\nround_to = 2\nsites = ["encoder.self"]\nlayers = "0-3"\nmethod = "svd"\n[verify]\n'
    recipe += b'level = "weights"\ntolerance = 1e-6\n'
    lines = b'{"text": "hello there"}\n{"text": "a b", "audio": null}\n{"text": "x", "more": [1, {"y": 2}]}\n'
    rows = b'[{"text": "hello"}, {"prompt": "a", "completion": "b"}, {"messages": [{"role": "user", "content": "x"}]}]'
    whole = made("whole", "m.gguf", b"")
    tiny_gguf.write(whole / "m.gguf")
    ct2 = made("ctranslate2", "model.bin", ctranslate2_file())

    def opened(path: Path) -> object:
        return open_model(path.parent)

    return {
        "safetensors": Fuzzer(bases["llama"], hostile.WEIGHTS, mostly(some_header), _safetensors),
        "index": Fuzzer(bases["sharded"], hostile.INDEX, mostly(some_json), opened),
        "config": Fuzzer(bases["compact"], hostile.CONFIG, mostly(some_json), opened),
        "manifest": Fuzzer(
            bases["compact"],
            hostile.MANIFEST,
            mostly(some_json),
            lambda path: export_model(open_model(path.parent), path.parent / "out", "dense", Run(jobs=1, dry=True)),
        ),
        "spectra": Fuzzer(
            bases["decomposed"], hostile.SPECTRA, mostly(some_header), lambda path: load_spectra(path.parent, sites)
        ),
        "statistics": Fuzzer(
            folder / "statistics",
            "s.safetensors",
            mostly(some_header),
            lambda path: [SavedStatistics(path).of(site) for site in sites],
        ),
        "GGUF": Fuzzer(made("gguf", "m.gguf", b""), "m.gguf", some_gguf, _gguf),
        "GGUF, whole": Fuzzer(
            whole, "m.gguf", some_bytes, lambda path: gguf.convert(path, path.parent / "into"), share=0.01
        ),
        "CTranslate2": Fuzzer(ct2, "model.bin", some_bytes, _ctranslate2),
        "pickle": Fuzzer(made("pickle", "p.bin", saved(tensors)), "p.bin", mostly(some_archive), _torch_file),
        "old pickle": Fuzzer(made("old", "p.bin", saved(tensors, False)), "p.bin", mostly(some_old_file), _torch_file),
        "openai .pt": Fuzzer(
            made("openai", "p.pt", saved({"dims": dims, "model_state_dict": state})),
            "p.pt",
            mostly(some_archive),
            lambda path: openai.convert(path, path.parent / "into"),
        ),
        "adapter": Fuzzer(adapter_folder, "adapter_config.json", mostly(some_json), _adapter),
        "adapter's weights": Fuzzer(adapter_folder, "adapter_model.safetensors", mostly(some_header), _adapter),
        "recipe": Fuzzer(made("recipe", "r.toml", recipe), "r.toml", mostly(some_toml), load_recipe),
        "JSONL": Fuzzer(made("lines", "d.jsonl", lines), "d.jsonl", mostly(some_lines), lambda path: read_data([path])),
        "examples": Fuzzer(made("rows", "d.json", rows), "d.json", mostly(some_json), read_rows),
        "reader": Fuzzer(bases["bert"], hostile.WEIGHTS, some_bytes, lambda path: CheckpointReader(path.parent)),
    }
