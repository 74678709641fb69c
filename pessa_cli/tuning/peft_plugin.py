"""Registers the fine-tuning methods of pessa with HF PEFT.

PEFT has no extension point: `register_peft_method` accepts only members of its enum `PeftType`. Since version 0.21
everything else is delegated to the classes of a method, so extending the enum suffices.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from typing import Any, NamedTuple

# Each module has a constant METHODS. They are registered in this order, which has no other effect.
TUNERS = ("tuner_pessa", "tuner_sorsa", "tuner_pica", "tuner_svft", "tuner_lora_xs")
OLDEST = (0, 21)  # the first version of PEFT that leaves saving and loading to the classes of a method


class TunerMethod(NamedTuple):
    """A method by its name in lower case. The names of its parameters begin with `<name>_`."""

    name: str
    config: Any  # a subclass of TunerConfig
    model: Any  # a subclass of Tuner


def register_all() -> None:
    """Register all methods with PEFT; a second call does nothing. A PEFT older than OLDEST is left unchanged.

    This is called after the import of PEFT and after that of one of the tuner modules. A program may import a tuner
    first, which imports PEFT while the tuner itself is incomplete. The first call then returns, and the second one
    registers the methods.
    """
    version = tuple(int(part) for part in metadata.version("peft").split(".")[:2])
    if version < OLDEST:
        return
    marks = {"tuner_base": "Tuner", **dict.fromkeys(TUNERS, "METHODS")}
    started = {name: sys.modules.get(f"pessa_cli.tuning.{name}") for name in marks}
    if any(module is not None and not hasattr(module, marks[name]) for name, module in started.items()):
        return
    for tuner in TUNERS:
        for method in import_module(f"pessa_cli.tuning.{tuner}").METHODS:
            register(*method)


def register(name: str, config: Any, model: Any) -> None:
    """Register one method with PEFT under `name`, unless it is registered already."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if extend_peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=f"{name}_")


def extend_peft_type(name: str) -> Any:
    """The member of PEFT's enum of this name, added if it does not exist.

    An added member can be found by name and by value, copied and pickled, like any other.
    """
    from peft.utils import PeftType

    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    type.__setattr__(PeftType, name, member)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    return member
