"""Registers the fine-tuning methods of pessa with HF PEFT."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple

# Each module has a constant METHODS. They are registered in this order, which has no other effect.
TUNERS = ("tuner_pessa", "tuner_sorsa", "tuner_pica", "tuner_svft", "tuner_lora_xs")

# The modules that import PEFT, with a name that each has once it is complete.
WAITED_FOR = {
    "compat.for_peft": "corda",
    "tuning.tuner_base": "Tuner",
    **{f"tuning.{tuner}": "METHODS" for tuner in TUNERS},
}


class TunerMethod(NamedTuple):
    """A method by its name in lower case. The names of its parameters begin with `<name>_`."""

    name: str
    config: Any  # a subclass of TunerConfig
    model: Any  # a subclass of Tuner


def register_all() -> None:
    """Register all methods with PEFT, and its check before merging; a second call does nothing.

    This is called after the import of PEFT and after that of one of the tuner modules. A program may import a tuner
    first, which imports PEFT while the tuner itself is incomplete. The first call then returns, and the second one
    registers the methods.
    """
    started = {name: sys.modules.get(f"pessa_cli.{name}") for name in WAITED_FOR}
    if any(module is not None and not hasattr(module, WAITED_FOR[name]) for name, module in started.items()):
        return
    for tuner in TUNERS:
        for method in import_module(f"pessa_cli.tuning.{tuner}").METHODS:
            register(*method)
    from pessa_cli.compat.for_peft import check_before_merging

    check_before_merging(_refuse_ragged)


def _refuse_ragged(model: Any) -> None:
    from pessa_cli.tuning.merge_compact import check_mergeable

    check_mergeable(model)


def register(name: str, config: Any, model: Any) -> None:
    """Register one method with PEFT under `name`, unless it is registered already."""
    from pessa_cli.compat.for_peft import register_method

    register_method(name, config, model)
