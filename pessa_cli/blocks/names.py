"""The mapping from module names in a checkpoint to module names in a transformers model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pessa_cli.blocks.compact_format import ModuleNames


def module_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Map each name from a checkpoint to the name of the same module in `model`; names without a module are left out.

    The two names are equal up to a prefix, or differ by the renaming that transformers applies when it loads weights.
    """
    # Imported here, because this module may itself be imported while transformers is being imported.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    names = list(names)
    tree = ModuleNames(name for name, _ in model.named_modules())
    found = {name: place for name in names if (place := tree.find(name)) is not None}
    if len(found) < len(names):
        mapping, tensors = get_model_conversion_mapping(model), model.state_dict()
        rules = [[rule for rule in mapping if isinstance(rule, kind)] for kind in (WeightRenaming, WeightConverter)]
        for name in names:
            if name not in found:
                key, _ = rename_source_key(f"{name}.weight", *rules, model.base_model_prefix, tensors)
                if key in tensors:
                    found[name] = key.removesuffix(".weight")
    return found
