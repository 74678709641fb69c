"""Commands with dataclasses as parameters: each field of these becomes an option on the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin, get_type_hints

import typer

from pessa_cli.common.options import Setting, made, settings_of


class Only:
    """`Annotated[Recipe, Only("sites", "layers")]`: the command has options for these fields alone."""

    def __init__(self, *names: str) -> None:
        self.names = names


class Given(NamedTuple):
    """`Annotated[dict[str, Any], Given(Tuning)]`: the options of a dataclass that the user has given, by name."""

    kind: type


class _Group(NamedTuple):
    """The options that stand for one parameter of a command.

    given: the command receives a dict of only those options that the user has given, instead of the dataclass.
    """

    kind: type
    settings: list[Setting]
    given: bool = False

    def value(self, values: dict[str, Any]) -> Any:
        """Return the value of the parameter, and remove its options from `values`."""
        found = [(setting, values.pop(setting.name)) for setting in self.settings]
        known = {setting.name: _field_value(setting, value) for setting, value in found if value is not None}
        return known if self.given else made(self.kind, known)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with each dataclass among its parameters replaced by an option for each of its fields.

    Raises ValueError if two of the options have the same name.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: group for name, hint in hints.items() if (group := _group(hint)) is not None}
    parameters: list[Parameter] = []
    for name, parameter in signature(command).parameters.items():
        if name in groups:
            parameters += [_parameter(setting, groups[name].given) for setting in groups[name].settings]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run(**values: Any) -> None:
        command(**{name: group.value(values) for name, group in groups.items()}, **values)

    # typer reads the signature. `replace` refuses two parameters of the same name.
    run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _group(hint: Any) -> _Group | None:
    """Return the options of a parameter of this type; None for a type that typer handles itself."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    for note in notes:
        if isinstance(note, Given):
            return _Group(note.kind, _on_command_line(note.kind), given=True)
    if not (isinstance(kind, type) and is_dataclass(kind)):
        return None
    settings = _on_command_line(kind)
    for note in notes:
        if isinstance(note, Only):
            if unknown := set(note.names) - {setting.name for setting in settings}:
                raise ValueError(f"{kind.__name__} has no options {sorted(unknown)}")
            settings = [setting for setting in settings if setting.name in note.names]
    return _Group(kind, settings)


def _on_command_line(kind: type) -> list[Setting]:
    return [setting for setting in settings_of(kind) if not setting.option.recipe_only]


def _parameter(setting: Setting, given: bool) -> Parameter:
    """Return an option as typer expects it.

    given: leave out the default, so that options that the user has not given are None.
    """
    known = setting.option
    kind: Any = setting.kind
    default = setting.default
    if known.parse is not None:
        kind, default = str, known.shown
    elif setting.items is Path:  # the option is repeated
        kind, default = list[Path], None
    elif setting.items is not None:  # the items are separated by commas
        kind, default = str, None
    if given:
        default = None
    # The flags are listed explicitly, because otherwise typer adds a --no-... flag to every switch.
    info = typer.Option(*setting.flags, metavar=known.metavar, help=known.help)
    kind = kind if default is not None else kind | None
    annotation = Annotated[kind, info]
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _field_value(setting: Setting, value: Any) -> Any:
    """Convert the value of an option to the value of its field."""
    if setting.option.parse is not None:
        return setting.option.parse(value, setting.flag)
    if setting.items is Path:
        return tuple(value)
    if setting.items is not None:
        return tuple(item.strip() for item in value.split(",")) if value else setting.default
    return value
