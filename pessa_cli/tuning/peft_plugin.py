"""The hook into HF PEFT: fine-tuning methods registered from outside its tree.

PEFT has no extension point: `register_peft_method` refuses what is no member of its enum `PeftType`. Since 0.21 all
else is delegated to the classes of a method, so that extending the enum is all it takes.
"""

from __future__ import annotations

import sys
from importlib import import_module, metadata
from typing import Any, NamedTuple

# Each has a constant METHODS. A module further down is registered later, nothing else depends on the order.
TUNERS = ("tuner_pessa", "tuner_sorsa", "tuner_pica", "tuner_svft", "tuner_lora_xs")
OLDEST = (0, 21)  # of PEFT, that leaves saving and loading to the classes of a method


class TunerMethod(NamedTuple):
    """A method by its name in lower case; its parameters are called `<name>_...`."""

    name: str
    config: Any  # a subclass of TunerConfig
    model: Any  # a subclass of Tuner


def register_all() -> None:
    """Make all methods known to PEFT; a second call does nothing. An older PEFT is left as it is.

    Called when PEFT has been imported, and when one of our tuners has: a program may import a tuner first, which
    imports PEFT half-way through. Then there is nothing to register yet, and the second call does it.
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
    """Make one method known to PEFT under `name`, unless it is already."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import register_peft_method

    if extend_peft_type(name.upper()) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config, model_cls=model, prefix=f"{name}_")


def extend_peft_type(name: str) -> Any:
    """The member of PEFT's enum of that name, a new one if need be: found by name and by value, copied and pickled."""
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
