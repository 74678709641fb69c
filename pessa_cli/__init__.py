"""pessa: decompose, prune and verify the attention and the MLPs of transformer checkpoints.

After this package is imported, `from_pretrained` of transformers loads compact models, and PEFT has the fine-tuning
methods of pessa. They are registered only when transformers loads its quantizers or PEFT is imported, so that importing
this package does not import torch. The names of `pessa_cli.api` are available here, and are imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import wrapt

from pessa_cli.common.version import VERSION
from pessa_cli.compat.hooks import guarded
from pessa_cli.tuning.peft_plugin import WAITED_FOR

__version__ = VERSION

if TYPE_CHECKING:
    from pessa_cli.api import *  # noqa: F403
else:

    def __getattr__(name: str) -> Any:
        if name.startswith("_") and name != "__all__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        api = import_module("pessa_cli.api")
        if name == "__all__":  # for `from pessa_cli import *`
            return api.__all__
        if name not in api.__all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(api, name)


def __dir__() -> list[str]:
    api = import_module("pessa_cli.api")

    return ["__version__", *api.__all__]


def _register_loader() -> None:
    from pessa_cli.runtime.transformers_loader import register

    register()


def _register_tuners() -> None:
    from pessa_cli.tuning.peft_plugin import register_all

    register_all()


wrapt.register_post_import_hook(
    guarded("transformers", "compact models cannot be loaded", _register_loader), "transformers.quantizers.auto"
)
for _name in ("peft", *(f"pessa_cli.{module}" for module in WAITED_FOR)):
    wrapt.register_post_import_hook(
        guarded("peft", "the fine-tuning methods of pessa are not available", _register_tuners), _name
    )
