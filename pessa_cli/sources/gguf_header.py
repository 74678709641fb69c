"""Reading of the header of a GGUF file, with every count and length checked against the size of the file.

The gguf package, which reads the file afterwards, believes what it finds there: a file of 49 bytes can keep it busy for
days. Source of the format: the specification in ggml's repository, docs/gguf.md.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size
from pessa_cli.common.text import shortened

MAGIC = b"GGUF"
VERSIONS = (2, 3)
# The codes of struct for the format's types of numbers, by their number there; 8 is a string and 9 an array.
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
MOST_ENTRIES = 100_000  # of tensors, and of keys
MOST_STRINGS = 1_000_000  # in arrays, together; vocabularies and their merges have up to 750,000
MOST_TEXT = 2**20  # bytes of a string; the longest are chat templates
DAMAGED = "the file is damaged or incomplete: download it again"

Scalar = int | float | str


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a GGUF file: its shape, slowest dimension first, the number of its type, and its first byte."""

    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """The keys that hold one number or text, the names of those that hold an array, and the tensors."""

    values: Mapping[str, Scalar]
    arrays: frozenset[str]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        return str(self.values.get("general.architecture", ""))

    @property
    def keys(self) -> list[str]:
        """The names of all keys of the architecture, without the architecture."""
        prefix = f"{self.architecture}."
        return [name.removeprefix(prefix) for name in (*self.values, *self.arrays) if name.startswith(prefix)]

    def number(self, key: str) -> float | None:
        """Return a number of the architecture, or None if the file has none of that name."""
        value = self.values.get(f"{self.architecture}.{key}")
        return value if isinstance(value, int | float) else None


class _Cursor:
    """Reads values from a file; what is longer than the rest of the file is an error before it is read."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.strings = file, size, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise ValueError(f"it has {self.size:,} bytes, but a value of {count:,} at byte {self.file.tell():,}")
        return self.file.read(count)

    def number(self, code: str) -> int:
        return int(struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0])

    def string(self) -> str:
        length = self.number("Q")
        if length > MOST_TEXT:
            raise ValueError(f"a text in it would have {length:,} bytes, more than {MOST_TEXT:,}")
        return self.take(length).decode()

    def value(self) -> Scalar | None:
        """Read a type and a value of it; an array is passed over, and None is returned."""
        kind = self.number("I")
        if kind == STRING:
            return self.string()
        if kind != ARRAY:
            found: Scalar = struct.unpack(f"<{NUMBERS[kind]}", self.take(struct.calcsize(f"<{NUMBERS[kind]}")))[0]
            return found
        inner, count = self.number("I"), self.number("Q")
        if inner != STRING:
            self.skip(count * struct.calcsize(f"<{NUMBERS[inner]}"))
            return None
        self.strings += count
        if self.strings > MOST_STRINGS:
            raise ValueError(f"its arrays hold {self.strings:,} texts, more than {MOST_STRINGS:,}")
        for _ in range(count):
            self.skip(self.number("Q"))
        return None

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError(f"it has {self.size:,} bytes, but a value of {count:,} at byte {self.file.tell():,}")
        self.file.seek(count, 1)


def read_header(path: Path, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    """Read the header of a GGUF file.

    sizes: for each type of tensor, the items and the bytes of one of its blocks. Raises PessaError if the file is
    damaged or incomplete, or has a version or a type that is not known.
    """
    try:
        size = file_size(path)
        with path.open("rb") as file:
            return _header(_Cursor(file, size), sizes)
    except (ValueError, KeyError, OSError, struct.error, OverflowError) as error:
        reason = f"the type {error} is not known" if isinstance(error, KeyError) else shortened(str(error)).strip("'\"")
        raise PessaError(f"{path} is not a readable GGUF file: {reason}", DAMAGED) from error


def _header(cursor: _Cursor, sizes: Mapping[int, tuple[int, int]]) -> GgufHeader:
    if cursor.take(4) != MAGIC or cursor.number("I") not in VERSIONS:
        raise ValueError(f"it is not of version {' or '.join(map(str, VERSIONS))}, little-endian")
    tensor_count, key_count = cursor.number("Q"), cursor.number("Q")
    if max(tensor_count, key_count) > MOST_ENTRIES:
        raise ValueError(f"it would have {tensor_count:,} tensors and {key_count:,} keys; at most {MOST_ENTRIES:,}")
    values: dict[str, Scalar] = {}
    arrays: set[str] = set()
    for _ in range(key_count):
        name = cursor.string()
        if name in values or name in arrays:
            raise ValueError(f"the key {name} occurs twice")
        value = cursor.value()
        if value is None:
            arrays.add(name)
        else:
            values[name] = value
    found: dict[str, GgufTensor] = {}
    for _ in range(tensor_count):
        name = cursor.string()
        dimensions = cursor.number("I")
        if dimensions > 4 or name in found:
            raise ValueError(f"the tensor {name} occurs twice, or has {dimensions:,} dimensions")
        shape = tuple(reversed([cursor.number("Q") for _ in range(dimensions)]))
        found[name] = GgufTensor(shape, cursor.number("I"), cursor.number("Q"))
    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**16 or alignment % 8:
        raise ValueError(f"its alignment of {shortened(alignment)} is not a multiple of 8")
    start = -(-cursor.file.tell() // alignment) * alignment
    for name, tensor in found.items():
        items, nbytes = sizes[tensor.type]
        end = start + tensor.offset + -(-math.prod(tensor.shape) // items) * nbytes
        if end > cursor.size or (tensor.shape and tensor.shape[-1] % items):
            raise ValueError(f"{name} of shape {tensor.shape} ends at byte {end:,}; the file has {cursor.size:,}")
    placed = {name: GgufTensor(t.shape, t.type, start + t.offset) for name, t in found.items()}
    return GgufHeader(values, frozenset(arrays), placed)
