"""Options as dataclass fields: the command line and recipes read their names, types, defaults and help from there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from pessa_cli.common.errors import UsageError
from pessa_cli.common.text import shortened

T = TypeVar("T")


class Range(NamedTuple):
    """The values that an option may have, and what is said about others: "--ratio 2 <fault>", with the hint."""

    contains: Callable[[float], bool]
    fault: str
    hint: str


def at_least(least: int) -> Range:
    """The finite numbers from `least` up."""
    return Range(
        lambda value: least <= value < math.inf, "is out of range", f"give a finite number of at least {least}"
    )


@dataclass(frozen=True)
class Option:
    """What a field says about itself as an option.

    help: one sentence. metavar: the value in help texts, by default its type. flags: by default the field's name with
    dashes. parse: makes the value from its text and the name of the option. shown: the default as such a text.
    example: an item of a list. allowed: which numbers. recipe_only: a key of recipes that has no option. group: a word
    for the class that has the field, which knows what its groups mean.
    """

    help: str
    metavar: str | None = None
    flags: tuple[str, ...] = ()
    parse: Callable[[str, str], Any] | None = None
    shown: str | None = None
    example: str = ""
    allowed: Range | None = None
    recipe_only: bool = False
    group: str | None = None


def option(default: Any, help: str, *, factory: Callable[[], Any] | None = None, **more: Any) -> Any:
    """A dataclass field that is an option; `more` are the fields of `Option`."""
    metadata = {"option": Option(help, **more)}
    return (
        field(default=default, metadata=metadata)
        if factory is None
        else field(default_factory=factory, metadata=metadata)
    )


class Setting(NamedTuple):
    """One option: the field that defines it, and its type without None."""

    name: str
    kind: Any
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        """What messages call it: the option on the command line, or the key where there is only that."""
        if self.option.recipe_only:
            return self.name
        return next(iter(self.flags))

    @property
    def flags(self) -> tuple[str, ...]:
        return self.option.flags or (f"--{self.name.replace('_', '-')}",)

    @property
    def choices(self) -> tuple[str, ...]:
        """The values of a Literal; none for any other type."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def items(self) -> Any:
        """The type of the items of a tuple; None for any other type."""
        return get_args(self.kind)[0] if get_origin(self.kind) is tuple else None


def settings_of(kind: type) -> list[Setting]:
    """The options of a dataclass and of the dataclasses in its fields, in order.

    A field that is None or a dataclass is left to the caller: it is a table of its own in a recipe. Raises TypeError
    for any other field without a help text.
    """
    return [
        setting
        for each, inner, known in _fields(kind)
        for setting in ([Setting(each.name, inner, _default(each), known)] if known is not None else settings_of(inner))
    ]


def made(kind: type[T], values: Mapping[str, Any]) -> T:
    """The dataclass from the values of its options by name, also of those in nested dataclasses; others are ignored."""
    given = {
        each.name: made(inner, values) if known is None else values[each.name]
        for each, inner, known in _fields(kind)
        if known is None or each.name in values
    }
    return kind(**given)


def check_options(instance: Any) -> None:
    """Check the values of a frozen dataclass, and convert what Python users may give in another form.

    A text becomes what the option's parser makes of it, and a single item or a list of items a tuple. Raises UsageError
    for a number of the wrong type, a value that is not one of the choices of its field, or outside its range.
    """
    for each, inner, known in _fields(type(instance)):
        value = getattr(instance, each.name)
        if known is None or value is None:
            continue
        setting = Setting(each.name, inner, None, known)
        if known.parse is not None and isinstance(value, str):
            value = known.parse(value, setting.flag)
            object.__setattr__(instance, each.name, value)
        if setting.items is not None:
            given = (value,) if isinstance(value, str | Path) else tuple(value)
            object.__setattr__(instance, each.name, tuple(setting.items(item) for item in given))
            continue
        numbers: tuple[type, ...] = {int: (int,), float: (int, float)}.get(inner, ())
        if numbers and (isinstance(value, bool) or not isinstance(value, numbers)):
            raise UsageError(
                f"{setting.flag} {shortened(value)} has the wrong type, {type(value).__name__}",
                f"give a number of type {inner.__name__}",
            )
        if setting.choices and value not in setting.choices:
            raise UsageError(
                f"{setting.flag} {shortened(value)} is not known", f"give one of {', '.join(setting.choices)}"
            )
        if known.allowed is not None and not known.allowed.contains(value):
            raise UsageError(f"{setting.flag} {value} {known.allowed.fault}", known.allowed.hint)


def _fields(kind: type) -> Iterator[tuple[Field[Any], Any, Option | None]]:
    """Each field with its type, and with what makes it an option; None for a nested dataclass."""
    hints = get_type_hints(kind)
    for each in fields(kind):
        inner, optional = _without_none(hints[each.name])
        known = each.metadata.get("option")
        if is_dataclass(inner) and known is None:
            if not optional:
                yield each, inner, None
        elif known is None or not known.help.strip():
            raise TypeError(f"{kind.__name__}.{each.name} has no help text")
        else:
            yield each, inner, known


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type in `T | None`, and whether None is allowed."""
    if get_origin(hint) not in (Union, UnionType):
        return hint, False
    others = [each for each in get_args(hint) if each is not NoneType]
    if len(others) != 1:
        raise TypeError(f"{hint} is not the type of an option")
    return others[0], True


def _default(each: Field[Any]) -> Any:
    return each.default_factory() if each.default_factory is not MISSING else each.default
