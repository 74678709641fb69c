"""TOML files with known tables, whose keys, types and choices are the options of a dataclass."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import file_size
from pessa_cli.common.options import Setting, made, settings_of
from pessa_cli.common.text import shortened

MOST_BYTES = 2**16  # the largest recipe that is read
MOST_DOTS = 1000  # in a line of a recipe: the time to parse a key grows with the square of the number of its parts
PLAIN: Mapping[Any, tuple[type, ...]] = {float: (float, int), int: (int,), bool: (bool,), str: (str,), Path: (str,)}
TOML_NAMES: Mapping[type, str] = {
    float: "a number",
    int: "an integer",
    bool: "true or false",
    str: "a string",
    list: "a list of strings",
    dict: "a table",
}
EXAMPLES = "see the examples in configs/"
T = TypeVar("T")


def read_toml(path: Path, *tables: str) -> dict[str, Any]:
    """Return the content of a recipe file whose top level may hold only the given tables.

    Raises PessaError if the file cannot be read or parsed, and UsageError if it has another table or key at the top.
    """
    try:
        size = file_size(path)
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
        text = path.read_text(encoding="utf-8")
        for number, line in enumerate(text.split("\n"), 1):
            if line.count(".") > MOST_DOTS:
                raise ValueError(f"line {number} has {line.count('.'):,} dots, more than {MOST_DOTS:,}")
        content = tomllib.loads(text)
    except FileNotFoundError as error:
        raise PessaError(
            f"the recipe {path} does not exist", "give the path of a TOML file, such as those in configs/"
        ) from error
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise PessaError(f"{path} is not a readable recipe: {error}", EXAMPLES) from error
    unknown = [key for key in content if key not in tables]
    if unknown:
        known = " and ".join(f"[{table}]" for table in tables)
        raise UsageError(f"{path}: unknown table or key {shortened(unknown[0])}", f"a recipe has {known}")
    return content


def from_table(kind: type[T], path: Path, table: str, values: Any) -> T:
    """Make a dataclass from a table of a recipe; keys that are missing have their defaults.

    Raises UsageError, with the path, for unknown keys, wrong types, and values that the dataclass itself refuses.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {table} is not a table", f"write [{table}] above its keys")
    known = {setting.name: setting for setting in settings_of(kind)}
    for key in values:
        if key not in known:
            raise UsageError(f"{path}: [{table}] has no key {shortened(key)}", f"it has {', '.join(known)}")
    try:
        return made(kind, {key: _value(known[key], value) for key, value in values.items()})
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from error


def toml_types(setting: Setting) -> tuple[type, ...]:
    """The types of an option's value in TOML: strings for paths and choices, lists for tuples."""
    if setting.choices:
        return (str,)
    if setting.items is not None:
        return (list,)
    if get_origin(setting.kind) is Mapping:
        return (dict,)
    plain = PLAIN.get(setting.kind, ())
    return plain if setting.option.parse is None else (*plain, str)


def _value(setting: Setting, value: Any) -> Any:
    """The value of a field for a value in TOML. Raises UsageError if that has another type or is not a choice."""
    key, types = setting.name, toml_types(setting)
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        wanted = " or ".join(TOML_NAMES[kind] for kind in types if not (kind is int and float in types))
        found = "a list" if isinstance(value, list) else TOML_NAMES.get(type(value), "a date or time")
        raise UsageError(f"{key} = {shortened(value)} is {found}", f"give {wanted}")
    if isinstance(value, int) and abs(value) > 2**53:
        raise UsageError(f"{key} = {shortened(value)} is too large", EXAMPLES)
    if setting.choices and value not in setting.choices:
        raise UsageError(
            f"{key} = {shortened(value)} is not a known value", f"it is one of {', '.join(setting.choices)}"
        )
    if isinstance(value, list):
        if {type(item) for item in value} != {str}:
            raise UsageError(
                f"{key} = {shortened(value)} is not a list of strings", f'write it as ["{setting.option.example}"]'
            )
        return tuple(setting.items(item) for item in value)
    if setting.option.parse is not None and isinstance(value, str):
        return setting.option.parse(value, key)
    return Path(str(value)) if setting.kind is Path else value
