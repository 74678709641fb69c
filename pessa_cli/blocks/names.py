"""The mapping from module names in a checkpoint to module names in a transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pessa_cli.blocks.compact_format import ModuleNames


def module_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Map each name from a checkpoint to the name of the same module in `model`; names without a module are left out.

    The two names are equal up to a prefix, or differ by the renaming that transformers applies when it loads weights.
    """
    names = list(names)
    tree = ModuleNames(name for name, _ in model.named_modules())
    found = {name: place for name in names if (place := tree.find(name)) is not None}
    if len(found) < len(names):
        # Imported here, because it imports torch and transformers.
        from pessa_cli.compat.for_transformers import renamed_tensors

        renamed = renamed_tensors(model, [f"{name}.weight" for name in names if name not in found])
        found |= {name.removesuffix(".weight"): key.removesuffix(".weight") for name, key in renamed.items()}
    return found
