"""Files of torch.save: what torch.load gives, or a refusal; nothing in a pickle is run, nothing is endless."""

from __future__ import annotations

import io
import pickle
import struct
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import WEIGHTS, Pessa, TinyFolder, copy_of, is_refusal
from hostile import bounded
from safetensors.torch import load_file

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import shortened
from pessa_cli.sources.pickle_machine import MOST_OPCODES, Machine
from pessa_cli.sources.pickled import header_of, load_pickle

BASE = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))


def state() -> dict[str, Any]:
    """Tensors of every dtype that is read, views of every kind, and what torch's modules add."""
    torch.manual_seed(0)
    found: dict[str, Any] = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).state_dict()
    assert isinstance(found, OrderedDict)
    assert hasattr(found, "_metadata")
    found |= {
        "part": BASE[1:4, ::2],
        "transposed": BASE.t(),
        "tied": BASE,
        "parameter": torch.nn.Parameter(BASE.half()),
    }
    found |= {"bfloat16": BASE.bfloat16(), "bool": BASE > 0, "empty": torch.empty(0, 3), "scalar": torch.tensor(3.0)}
    for kind in (torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        found[str(kind)] = (BASE * 10).to(kind)
    return found


@pytest.mark.parametrize(
    "options",
    [{}, {"_use_new_zipfile_serialization": False}, {"pickle_protocol": 4}, {"pickle_protocol": 5}],
    ids=["zip", "before torch 1.6", "protocol 4", "protocol 5"],
)
def test_the_tensors_are_those_of_torch_load(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save(state(), path, **options)
    expected = torch.load(path, weights_only=False)  # torch's own list of opcodes ends at protocol 2
    found = load_pickle(path)
    assert list(header_of(path, found.value)) == list(expected)
    for name, tensor in expected.items():
        read = found.read(found.value[name])
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor.detach())
    # The control: in a file with one other byte of data, a tensor is another.
    content = bytearray(path.read_bytes())
    at = content.find(BASE.numpy().tobytes())
    assert at > 0
    content[at + 3] ^= 1
    path.write_bytes(content)
    assert not torch.equal(load_pickle(path).read(found.value["tied"]), expected["tied"])


def archive(path: Path, change: Callable[[str, bytes], tuple[str, bytes]], kind: int = zipfile.ZIP_STORED) -> Path:
    """Save two tensors, and write the archive again with its entries changed and its data in that compression."""
    torch.save({"a": BASE, "b": BASE[0]}, path)
    with zipfile.ZipFile(path) as source:
        entries = [change(name, source.read(name)) for name in source.namelist()]
    with zipfile.ZipFile(path, "w") as target:
        for name, data in entries:
            target.writestr(name, data, kind if "/data/" in name else zipfile.ZIP_STORED)
    return path


def data_as(change: Callable[[bytes], bytes]) -> Callable[[str, bytes], tuple[str, bytes]]:
    return lambda name, data: (name, change(data) if "/data/" in name else data)


def pickle_as(old: bytes, new: bytes) -> Callable[[str, bytes], tuple[str, bytes]]:
    def changed(name: str, data: bytes) -> tuple[str, bytes]:
        if not name.endswith("data.pkl"):
            return name, data
        assert data.count(old) >= 1, "the mutation changes nothing"
        return name, data.replace(old, new, 1)

    return changed


SHAPE, STRIDE = b"K\x06K\x08\x86", b"K\x08K\x01\x86"  # (6, 8) and (8, 1)
NEGATIVE, HUGE = b"J" + struct.pack("<i", -8), b"\x8a\x08" + struct.pack("<q", 2**62)
LIES: dict[str, tuple[Callable[[str, bytes], tuple[str, bytes]], str]] = {
    "a storage shorter than it says": (data_as(lambda data: data[:-4]), "has 188 bytes, but the pickle says 192"),
    "a storage longer than it says": (data_as(lambda data: data + b"1234"), "has 196 bytes, but the pickle says 192"),
    "no storage": (lambda name, data: (name.replace("/data/", "/date/"), data), "not a readable file"),
    "a shape beyond the storage": (pickle_as(SHAPE, b"K\x07K\x08\x86"), "shape (7, 8) but only 192 bytes"),
    "a huge shape": (pickle_as(SHAPE, HUGE + b"K\x08\x86"), "but only 192 bytes"),
    "a stride beyond the storage": (pickle_as(STRIDE, b"K\xffK\x01\x86"), "but only 192 bytes"),
    "a negative stride": (pickle_as(STRIDE, NEGATIVE + b"K\x01\x86"), "not a list of numbers from 0 up"),
    "a negative size": (pickle_as(SHAPE, NEGATIVE + b"K\x08\x86"), "not a list of numbers from 0 up"),
    "strides of zero": (pickle_as(STRIDE, b"K\x00K\x00\x86"), ""),
    "more dimensions than strides": (pickle_as(SHAPE, b"K\x06K\x08K\x01\x87"), "describes a tensor wrongly"),
    "another dtype": (pickle_as(b"FloatStorage", b"HalfStorage"), "the pickle says 96"),
    "a name twice": (pickle_as(b"X\x01\x00\x00\x00b", b"X\x01\x00\x00\x00a"), "twice"),
    "big-endian": (lambda name, data: (name, b"big" if name.endswith("byteorder") else data), "big-endian"),
    "a program": (lambda name, data: (name.replace(".data/serialization_id", "constants.pkl"), data), "TorchScript"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_archive_that_lies_is_refused(lie: str, tmp_path: Path) -> None:
    change, says = LIES[lie]
    path = archive(tmp_path / "m.bin", change)
    if says:
        with bounded(), pytest.raises(PessaError, match=r"m\.bin") as error:
            header_of(path, load_pickle(path).value)
        assert says in error.value.message
    else:  # 48 times the first item, as torch.load gives it
        found = load_pickle(path)
        header_of(path, found.value)
        assert torch.equal(found.read(found.value["a"]), torch.load(path, weights_only=True)["a"])


def test_a_compressed_archive_is_refused(pessa: Pessa, tiny_folder: TinyFolder, place: Path) -> None:
    """Memory-mapped, its bytes were taken for weights."""
    model = copy_of(tiny_folder("bert"), place / "model")
    torch.save(load_file(model / WEIGHTS), model / "pytorch_model.bin")
    (model / WEIGHTS).unlink()
    assert pessa("inspect", model, "--allow-pickle").code == 0  # the control
    archive(model / "pytorch_model.bin", lambda name, data: (name, data), zipfile.ZIP_DEFLATED)
    result = pessa("prune", model, "-o", place / "out", "--allow-pickle")
    is_refusal(result, str(model / "pytorch_model.bin"), "is compressed", "torch.save")
    assert not (place / "out").exists()


def test_a_bomb_of_many_names_for_one_storage_is_refused(tmp_path: Path) -> None:
    torch.save({f"t{i}": BASE.expand(1, 6, 8) for i in range(3000)} | {"x": torch.zeros(10)}, tmp_path / "m.bin")
    big = torch.zeros(100_000)
    torch.save({f"t{i}": big for i in range(50)}, tmp_path / "m.bin")
    with pytest.raises(PessaError, match="its tensors would have 20,000,000"):
        header_of(tmp_path / "m.bin", load_pickle(tmp_path / "m.bin").value)
    torch.save({f"t{i}": big for i in range(3)}, tmp_path / "m.bin")  # tied weights
    assert len(header_of(tmp_path / "m.bin", load_pickle(tmp_path / "m.bin").value)) == 3


@pytest.mark.parametrize(
    "content", [b"\0" * 257 + b"ustar\x0000", b"PK\3\4" + b"\0" * 100, b"\x80\x02.", b"\x80\x02]."]
)
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(content + bytes(300))
    with bounded(), pytest.raises(PessaError, match=r"tar archive|not a readable file"):
        load_pickle(tmp_path / "m.bin")


def test_an_old_file_that_lies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    torch.save({"a": BASE}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    assert header_of(path, load_pickle(path).value)
    count = struct.pack("<q", 48)
    assert content.count(count + BASE.numpy().tobytes()) == 1
    for lie in (-1, 0, 47, 49, 2**62):
        path.write_bytes(
            content.replace(count + BASE.numpy().tobytes(), struct.pack("<q", lie) + BASE.numpy().tobytes())
        )
        with bounded(), pytest.raises(PessaError, match="not a readable file"):
            load_pickle(path)
    path.write_bytes(content[:-4])
    with pytest.raises(PessaError, match="ends after the file"):
        load_pickle(path)


def laughing() -> list[Any]:
    nested: list[Any] = ["a"] * 10
    for _ in range(26):
        nested = [nested, nested]
    return nested


def test_values_that_are_exponential_when_printed(pessa: Pessa, place: Path) -> None:
    for value in ({"dims": {"n_mels": laughing()}, "model_state_dict": {"a": BASE}}, {"dims": laughing()}, laughing()):
        torch.save(value, place / "model.pt")
        start = time.process_time()
        result = pessa("inspect", place / "model.pt")
        assert time.process_time() - start < 1
        is_refusal(result, str(place / "model.pt"))
        assert len(result.err) < 2000
    start = time.process_time()
    assert len(shortened(laughing())) <= 80
    assert shortened({"a": 10**6000}) != ""
    assert shortened(10**6000) == "an integer of 19,932 bits"
    assert time.process_time() - start < 0.1


class Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


def made(*codes: bytes) -> bytes:
    return b"\x80\x02" + b"".join(codes) + b"."


TEXT = b"X\x01\x00\x00\x00a"
TRICKS: dict[str, bytes] = {
    "eval": pickle.dumps(Call(eval, "1"), 2),
    "a method by name": pickle.dumps(Call(getattr, {}, "get"), 4),
    "a name over dots": made(b"X\x05\0\0\0torch", b"X\x08\0\0\0_utils.x", b"\x93", b")R"),
    "torch.load, called": made(b"ctorch\nload\n", b")R"),
    "a dtype, called": made(b"ctorch\nfloat8_e4m3fn\n", b")R"),
    "an instance": made(b"(ios\nsystem\n"),
    "an instance with a class on the stack": made(b"(ccollections\nOrderedDict\no"),
    "a new object": made(b"ccollections\nOrderedDict\n)\x81"),
    "an extension": made(b"\x82\x01"),
    "a persistent id of a line": made(b"Pstorage\n"),
    "state of a name": made(b"ccollections\nOrderedDict\n}", TEXT, b"K\x01sb"),
    "a storage of another kind": made(b"(", TEXT, TEXT, b"tQ"),
    "items of a list": made(b"](", TEXT, b"K\x01u"),
    "a key that takes exponential time": made(b"}(", b")" + b"q\0h\0h\0\x86" * 60, b"K\x01u"),
    "a list that contains itself": made(b"]q\0h\0a"),
    "a memo that is not there": made(b"h\x07"),
    "an empty stack": made(b"0"),
    "two marks": made(b"((((tttt"),
    "a long integer": made(b"\x8b" + struct.pack("<i", 10**6) + b"\1" * 10**6),
    "a text of 4 GB": made(b"X\xff\xff\xff\xff"),
    "bytes of 2^60": made(b"\x8e" + struct.pack("<Q", 2**60)),
    "more opcodes than a model needs": made(b"}", b"q\0" * MOST_OPCODES),
    "more values than a model needs": made(b"]" * MOST_OPCODES),
    "no end": b"\x80\x02}",
    "protocol 0": pickle.dumps({"a": 1}, 0),
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("trick", TRICKS)
def test_opcodes_that_no_state_dict_needs_are_refused(trick: str, zipped: bool, tmp_path: Path) -> None:
    path = tmp_path / "m.bin"
    if zipped:
        archive(path, lambda name, data: (name, TRICKS[trick] if name.endswith("data.pkl") else data))
    else:
        magic, protocol, system = (pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
        path.write_bytes(magic + protocol + system + TRICKS[trick] + pickle.dumps([], 2))
    start = time.process_time()
    with bounded(), pytest.raises(PessaError) as error:
        header_of(path, load_pickle(path).value)
    assert time.process_time() - start < 2
    assert len(error.value.message) < 600


def test_the_machine_reads_what_pickle_writes() -> None:
    """The control: plain values of every kind that is needed, in every protocol from 2."""
    value: dict[str, Any] = {
        "a": [1, -1, 300, 70_000, 2**40, 0.5, None, True, False, "é", (), (1,), (1, 2, 3, 4), {"b": [[]]}],
        "b": {},
    }
    for protocol in (2, 3, 4, 5):
        assert Machine().run(io.BytesIO(pickle.dumps(value, protocol))) == value
