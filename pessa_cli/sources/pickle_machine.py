"""A reader of the pickles in files of torch.save that runs nothing: every opcode is carried out here, on plain values.

Only the opcodes and names that a dictionary of tensors needs are known. A name is never looked up in Python: what a
pickle calls becomes a description of a tensor, or an error.
"""

from __future__ import annotations

import math
import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

from pessa_cli.common.text import shortened

MOST_OPCODES = 1_000_000  # a tensor takes about forty
MOST_VALUES = 20_000  # on the stack; pickle adds a thousand items at a time
MOST_DIMENSIONS = 64
MOST_LONG = 16  # bytes of an integer; the longest that torch.save writes is its magic number, of ten
# The names of torch's classes of storages, with the dtype and the bytes of an item.
STORAGES = {
    **{"DoubleStorage": ("float64", 8), "FloatStorage": ("float32", 4), "HalfStorage": ("float16", 2)},
    **{"BFloat16Storage": ("bfloat16", 2), "LongStorage": ("int64", 8), "IntStorage": ("int32", 4)},
    **{"ShortStorage": ("int16", 2), "CharStorage": ("int8", 1), "ByteStorage": ("uint8", 1)},
    **{"BoolStorage": ("bool", 1), "UntypedStorage": ("untyped", 1), "ComplexFloatStorage": ("complex64", 8)},
    **{"ComplexDoubleStorage": ("complex128", 16), "QInt8Storage": ("qint8", 1), "QUInt8Storage": ("quint8", 1)},
    **{"QInt32Storage": ("qint32", 4)},
}
DICTIONARY, SIZE = "collections.OrderedDict", "torch.Size"
TENSORS = ("torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2")
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
# What is no plain dense tensor is described by these words in the list of what a file holds.
OTHERS = {
    "torch._utils._rebuild_tensor_v3": "a tensor of a dtype that pessa does not read",
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data",
    "torch._utils._rebuild_wrapper_subclass": "a tensor of another class",
    "torch.serialization._get_layout": "a layout of torch",
    "torch.device": "a device",
}
KNOWN = frozenset((DICTIONARY, SIZE, *TENSORS, *PARAMETERS, *OTHERS))


class UnknownNameError(ValueError):
    """A pickle refers to a name that a dictionary of tensors does not need, and so could run code."""


@dataclass(eq=False)
class Storage:
    """The data of one or more tensors: dtype, bytes of an item, and items; `start` is its first byte in the file."""

    key: str
    dtype: str
    item: int
    count: int
    start: int = -1


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as torch.save describes it; `offset` and `strides` are in items of the storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> str:
        return self.storage.dtype

    @property
    def count(self) -> int:
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """One more than the index of the last item in the storage; `offset` if there is none."""
        last = sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return self.offset + last + 1 if self.count else self.offset

    @property
    def nbytes(self) -> int:
        return self.count * self.storage.item


class Named(NamedTuple):
    """What a pickle refers to by a name of Python, which is not looked up."""

    name: str


class Other(NamedTuple):
    """A value that is not read; `words` say what it is."""

    words: str


MARK: Any = object()


@dataclass
class Machine:
    """Carries out the opcodes of one pickle after the other; `storages` are those that they refer to, by key.

    `run` raises UnknownNameError for a name that is not needed, and ValueError, IndexError, KeyError or TypeError for a
    damaged pickle and for opcodes and values that a dictionary of tensors does not have. The time and memory that it
    takes are in proportion to the length of the pickle.
    """

    storages: dict[str, Storage] = field(default_factory=dict)

    def run(self, file: BytesIO) -> Any:
        """Return the value of the pickle that begins at the file's position, which is then behind it."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        argument: Any
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MOST_OPCODES or len(stack) > MOST_VALUES:
                raise ValueError(f"it has more than {MOST_OPCODES:,} opcodes, or {MOST_VALUES:,} values on its stack")
            if opcode.name == "STOP":
                return stack.pop()
            if opcode.name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif opcode.name in ("BINPUT", "LONG_BINPUT"):
                memo[argument] = stack[-1]
            elif opcode.name in ("BINGET", "LONG_BINGET"):
                stack.append(memo[argument])
            elif opcode.name in _PUSHES:
                stack.append(_PUSHES[opcode.name](argument))
            elif opcode.name in _CHANGES:
                _CHANGES[opcode.name](stack)
            elif opcode.name == "BINPERSID":
                stack.append(self._storage(stack.pop()))
            elif opcode.name not in ("PROTO", "FRAME"):
                raise ValueError(f"it has the opcode {opcode.name}, which no dictionary of tensors needs")
        raise ValueError("it has no end")

    def _storage(self, identity: Any) -> Storage:
        """Return the storage of a persistent id: ("storage", class, key, device, items), and None in older files."""
        word, kind, key, _, count = identity[:5]
        if word != "storage" or any(item is not None for item in identity[5:]):
            raise ValueError("it refers to something other than a storage")
        if type(kind) is not Named or type(key) is not str or type(count) is not int or count < 0:
            raise ValueError("it describes a storage wrongly")
        dtype, item = STORAGES[kind.name.rpartition(".")[2]]
        storage = self.storages.setdefault(key, Storage(key, dtype, item, count))
        if (storage.dtype, storage.count) != (dtype, count):
            raise ValueError(f"it describes the storage {shortened(key)} in two ways")
        return storage


def _named(text: str) -> Named:
    """Return a name, which pickletools gives as the module, a space, and the name in it."""
    name = ".".join(text.split(" "))
    module, _, last = name.rpartition(".")
    storage = module in ("torch", "torch.cuda", "torch.storage") and last in STORAGES
    constant = module == "torch" and last.islower()  # such as a dtype; it is not looked up, and to call it is an error
    if name not in KNOWN and not storage and not constant:
        raise UnknownNameError(shortened(name).strip("'"))
    return Named(name)


def _long(value: int) -> int:
    if abs(value) >= 256**MOST_LONG:
        raise ValueError(f"it has an integer of more than {MOST_LONG} bytes")
    return value


def _since_mark(stack: list[Any]) -> list[Any]:
    """Take what is above the last mark, and the mark, off the stack."""
    at = len(stack) - 1
    while stack[at] is not MARK:
        if at == 0:
            raise ValueError("it lacks a mark")
        at -= 1
    values = stack[at + 1 :]
    del stack[at:]
    return values


def _set_items(stack: list[Any], values: list[Any]) -> None:
    target = stack[-1]
    if type(target) is not dict or len(values) % 2:
        raise TypeError("it sets items of something other than a dictionary")
    for key, value in zip(values[::2], values[1::2], strict=True):
        # The hash of nested tuples can take exponential time, and equal names would replace each other.
        if type(key) not in (str, int):
            raise TypeError(f"it has a key of type {type(key).__name__}")
        if key in target:
            raise ValueError(f"it has the key {shortened(key)} twice")
        target[key] = value


def _append(stack: list[Any], values: list[Any]) -> None:
    if type(stack[-1]) is not list:
        raise TypeError("it appends to something other than a list")
    stack[-1].extend(values)


def _tuple(count: int) -> Callable[[list[Any]], None]:
    def make(stack: list[Any]) -> None:
        values = tuple(stack[len(stack) - count :])
        if len(values) < count or any(value is MARK for value in values):
            raise IndexError("its stack is empty")
        del stack[len(stack) - count :]
        stack.append(values)

    return make


def _stack_global(stack: list[Any]) -> None:
    name, module = stack.pop(), stack.pop()
    if type(name) is not str or type(module) is not str:
        raise TypeError("it has a name that is not a text")
    stack.append(_named(f"{module} {name}"))


def _reduce(stack: list[Any]) -> None:
    arguments, called = stack.pop(), stack.pop()
    if type(called) is not Named or type(arguments) is not tuple:
        raise TypeError("it calls something that is not a name")
    stack.append(_called(called.name, arguments))


def _called(name: str, arguments: tuple[Any, ...]) -> Any:
    if name == DICTIONARY:
        made: list[Any] = [{}]
        for pair in arguments[0] if arguments else ():
            key, value = pair
            _set_items(made, [key, value])
        return made[0]
    if name in TENSORS:
        return _tensor(*arguments[:4])
    if name in PARAMETERS:
        return arguments[0]
    if name == SIZE:
        return _numbers(arguments[0])
    if name in OTHERS:
        return Other(OTHERS[name])
    raise UnknownNameError(shortened(name).strip("'"))


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> StoredTensor:
    if type(storage) is not Storage or len(_numbers(shape)) != len(_numbers(strides)):
        raise TypeError("it describes a tensor wrongly")
    return StoredTensor(storage, _numbers((offset,))[0], shape, strides)


def _numbers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple or len(values) > MOST_DIMENSIONS or any(type(n) is not int or n < 0 for n in values):
        raise ValueError("a shape, stride or offset is not a list of numbers from 0 up")
    return tuple(values)


def _build(stack: list[Any]) -> None:
    """Leave out the state of a dictionary, which is the `_metadata` of torch's modules."""
    state = stack.pop()
    if type(state) is not dict or type(stack[-1]) is not dict:
        raise TypeError("it sets the state of something other than a dictionary")


def _set_item(stack: list[Any]) -> None:
    value, key = stack.pop(), stack.pop()
    _set_items(stack, [key, value])


_PUSHES: dict[str, Callable[[Any], Any]] = {
    **dict.fromkeys(("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"), lambda a: a),
    **dict.fromkeys(("BININT", "BININT1", "BININT2", "BINFLOAT"), lambda a: a),
    **dict.fromkeys(("LONG1", "LONG4"), _long),
    **{"NONE": lambda _: None, "NEWTRUE": lambda _: True, "NEWFALSE": lambda _: False, "MARK": lambda _: MARK},
    **{"EMPTY_DICT": lambda _: {}, "EMPTY_LIST": lambda _: [], "EMPTY_TUPLE": lambda _: ()},
    "GLOBAL": _named,
}
_CHANGES: dict[str, Callable[[list[Any]], None]] = {
    **{"TUPLE": lambda stack: stack.append(tuple(_since_mark(stack)))},
    **{"TUPLE1": _tuple(1), "TUPLE2": _tuple(2), "TUPLE3": _tuple(3)},
    **{"APPEND": lambda stack: _append(stack, [stack.pop()])},
    **{"APPENDS": lambda stack: _append(stack, _since_mark(stack))},
    **{"SETITEM": _set_item, "SETITEMS": lambda stack: _set_items(stack, _since_mark(stack))},
    **{"STACK_GLOBAL": _stack_global, "REDUCE": _reduce, "BUILD": _build},
}
