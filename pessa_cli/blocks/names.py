"""Names of modules in files and in models of transformers, which need not be the same."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from pessa_cli.blocks.compact_format import ModuleNames


def module_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The modules of a model that a file names so, by those names; those that it has not are left out.

    They are the same but for a prefix, or as transformers renames what it loads.
    """
    # Here, because the loader itself may be what transformers is being imported for.
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
