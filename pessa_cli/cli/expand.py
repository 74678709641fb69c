"""Commands whose parameters are dataclasses: on the command line each of their fields is an option."""

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
    """The options that stand for one parameter; `given`: the command gets them by name, without the others."""

    kind: type
    settings: list[Setting]
    given: bool = False

    def value(self, values: dict[str, Any]) -> Any:
        """What the command gets for what the command line says; takes it out of `values`."""
        said = [(setting, values.pop(setting.name)) for setting in self.settings]
        known = {setting.name: _field_value(setting, value) for setting, value in said if value is not None}
        return known if self.given else made(self.kind, known)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each field of the dataclasses among its parameters, in their place."""
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

    # Read by typer; a name that two groups have is refused here.
    run.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def _group(hint: Any) -> _Group | None:
    """The options that a parameter of this type stands for; None for one that typer knows itself."""
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
    """An option as typer reads it; without a default where only what is given counts."""
    known = setting.option
    kind: Any = setting.kind
    default = setting.default
    if known.parse is not None:
        kind, default = str, known.shown
    elif setting.items is Path:  # given again and again
        kind, default = list[Path], None
    elif setting.items is not None:  # given with commas
        kind, default = str, None
    if given:
        default = None
    # Flags are named in full, or typer would add a --no-... to every switch.
    info = typer.Option(*setting.flags, metavar=known.metavar, help=known.help)
    kind = kind if default is not None else kind | None
    annotation = Annotated[kind, info]
    return Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _field_value(setting: Setting, value: Any) -> Any:
    """What a field holds for what the command line says."""
    if setting.option.parse is not None:
        return setting.option.parse(value, setting.flag)
    if setting.items is Path:
        return tuple(value)
    if setting.items is not None:
        return tuple(item.strip() for item in value.split(",")) if value else setting.default
    return value
