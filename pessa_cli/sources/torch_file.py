"""Reading of files of torch.save: zip archives, and the older form that is a row of pickles followed by the data.

Nothing is unpickled by Python, and a tensor's data is read when it is asked for.
"""

from __future__ import annotations

import struct
import zipfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size
from pessa_cli.common.text import shortened
from pessa_cli.sources.pickle_machine import Machine, Storage, StoredTensor, UnknownNameError

if TYPE_CHECKING:
    import torch


MOST_PICKLE = 32 * 2**20  # bytes of the pickle; the largest state dicts stay below a tenth
MOST_DIRECTORY = 16 * 2**20  # bytes of the list of entries in a zip archive; Python needs up to 15 times as much
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the older form
DAMAGED = "the file is damaged or incomplete: copy or download it again"
SAVE_AGAIN = "ask its author for safetensors, or save its state_dict() again with a newer torch"
NOT_PLAIN = (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, struct.error)
NOT_ZIP = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError)


@dataclass(frozen=True)
class TorchFile:
    """The value in a file of torch.save, in which tensors are a `StoredTensor` each."""

    path: Path
    value: Any

    def read(self, tensor: StoredTensor) -> torch.Tensor:
        """Read a tensor that lies within its storage; the memory is that of what it spans there.

        Raises PessaError if the file has become shorter.
        """
        import torch

        dtype: torch.dtype = getattr(torch, tensor.dtype)
        if not tensor.count:
            return torch.empty(tensor.shape, dtype=dtype)
        storage = tensor.storage
        data = bytearray((tensor.end - tensor.offset) * storage.item)
        with self.path.open("rb") as file:
            file.seek(storage.start + tensor.offset * storage.item)
            if file.readinto(data) != len(data):
                raise PessaError(f"{self.path} became shorter while it was read", "run the command again")
        return torch.frombuffer(data, dtype=dtype).as_strided(tensor.shape, tensor.strides)


def read_torch_file(path: Path) -> TorchFile:
    """Read what a file of torch.save holds, without the data of its tensors.

    Raises PessaError if the file is missing, damaged, compressed or not a file of torch.save, if its pickle refers to
    anything but tensors and plain values, and if a storage has another size than the pickle says.
    """
    try:
        file_size(path)
        with path.open("rb") as file:
            return TorchFile(path, _zipped(path, file) if file.read(4) == b"PK\3\4" else _legacy(path, file))
    except FileNotFoundError as error:
        raise PessaError(f"{path} does not exist", "give the folder of a complete checkpoint") from error
    except UnknownNameError as error:
        raise PessaError(
            f"{path} wants to run code when it is loaded ({error}); none of it was run",
            "do not use this file; ask its author for safetensors",
        ) from error
    except (*NOT_PLAIN, *NOT_ZIP) as error:
        raise PessaError(f"{path} is not a readable file of torch.save: {shortened(str(error))}", DAMAGED) from error


def _zipped(path: Path, file: BinaryIO) -> Any:
    """Return the value in a zip archive NAME/data.pkl with the storages NAME/data/KEY."""
    size = file_size(path)
    if _directory_size(file, size) > MOST_DIRECTORY:
        raise ValueError(f"its list of entries has more than {MOST_DIRECTORY:,} bytes")
    with zipfile.ZipFile(file) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("an entry occurs twice")
        top = next(iter(entries), "").partition("/")[0]
        if f"{top}/constants.pkl" in entries:
            raise PessaError(f"{path} is a TorchScript program, not weights", "give a file of the model's state_dict()")
        compressed = [name for name, entry in entries.items() if entry.compress_type != zipfile.ZIP_STORED]
        if compressed:
            raise PessaError(
                f"{path} is compressed, which torch.save does not do: {shortened(compressed[0])}",
                "save its tensors again with torch.save",
            )
        for name, most in ((f"{top}/data.pkl", MOST_PICKLE), (f"{top}/byteorder", 16)):
            if name in entries and entries[name].file_size > most:
                raise ValueError(f"{shortened(name)} has {entries[name].file_size:,} bytes, more than {most:,}")
        if f"{top}/byteorder" in entries and archive.read(f"{top}/byteorder") != b"little":
            raise PessaError(f"{path} was saved on a big-endian machine", SAVE_AGAIN)
        machine = Machine()
        value = machine.run(BytesIO(archive.read(f"{top}/data.pkl")))
        for key, storage in machine.storages.items():
            entry = entries[f"{top}/data/{key}"]
            storage.start = _data_offset(file, entry)
            _check_size(storage, entry.file_size)
            if entry.file_size != entry.compress_size or storage.start + entry.file_size > size:
                raise ValueError(f"the storage {shortened(key)} ends after the file")
    return value


def _directory_size(file: BinaryIO, size: int) -> int:
    """Return the size of the list of entries as the end of the archive states it: at most 64 bits, unchecked."""
    length = min(size, 22 + 2**16 + 20)  # the record of the end, the longest comment, and where the 64-bit record is
    file.seek(size - length)
    tail = file.read(length)
    at = tail.rfind(b"PK\5\6")
    stated = int.from_bytes(tail[at + 12 : at + 16], "little")
    if tail[max(at - 20, 0) :][:4] != b"PK\6\7":
        return stated
    file.seek(min(int.from_bytes(tail[at - 12 : at - 4], "little"), size))
    return max(stated % (2**32 - 1), int.from_bytes(file.read(56)[40:48], "little"))


def _data_offset(file: BinaryIO, entry: zipfile.ZipInfo) -> int:
    """Return the offset of an entry's first byte, which follows a header with two fields of any length."""
    file.seek(entry.header_offset)
    header = file.read(30)
    if header[:4] != b"PK\3\4":
        raise ValueError(f"{shortened(entry.filename)} is not where its list of entries says")
    name, extra = struct.unpack("<26xHH", header)
    return entry.header_offset + len(header) + int(name) + int(extra)


def _check_size(storage: Storage, nbytes: int) -> None:
    if storage.count * storage.item != nbytes:
        raise ValueError(
            f"the storage {shortened(storage.key)} has {nbytes:,} bytes, but the pickle says "
            f"{storage.count * storage.item:,}"
        )


def _legacy(path: Path, file: BinaryIO) -> Any:
    """Return the value in the form that torch wrote before 1.6: five pickles, then each storage with its count."""
    size = file_size(path)
    file.seek(0)
    begin = file.read(min(size, MOST_PICKLE))
    if begin[257:262] == b"ustar":
        raise PessaError(f"{path} is a tar archive, as torch wrote before version 0.2", SAVE_AGAIN)
    pickles = BytesIO(begin)
    machine = Machine()
    first = machine.run(pickles)
    if first != MAGIC:  # a pickle of another program
        raise ValueError("it does not begin with the magic number of torch.save")
    protocol, system, value, keys = (machine.run(pickles) for _ in range(4))
    if protocol != PROTOCOL or type(system) is not dict or type(keys) is not list:
        raise ValueError("it is of another version of torch.save")
    if system.get("little_endian") is not True:
        raise PessaError(f"{path} was saved on a big-endian machine", SAVE_AGAIN)
    if any(type(key) is not str for key in keys) or sorted(keys) != sorted(machine.storages):
        raise ValueError("it lists other storages than its tensors have")
    at = pickles.tell()
    for key in keys:
        storage = machine.storages[key]
        file.seek(at)
        _check_size(storage, int.from_bytes(file.read(8), "little") * storage.item)
        storage.start = at + 8
        at = storage.start + storage.count * storage.item
        if at > size:
            raise ValueError(f"the storage {shortened(key)} ends after the file")
    return value
