"""Loading models, tokenizers and processors with transformers, without running code from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from pessa_cli.checkpoint.files import INDEX_FILE
from pessa_cli.common.errors import PessaError
from pessa_cli.common.memory import MORE_MEMORY, raise_if_out_of_memory
from pessa_cli.common.text import listed
from pessa_cli.models.classes import LOCAL_ONLY, MISFIT, WEIGHTS_ALONE, class_of
from pessa_cli.surgery.model import Model

# transformers would add an adapter that lies beside the full weights; it looks for one in this folder, which is absent.
WEIGHTS_ONLY = {"adapter_kwargs": {"subfolder": "no-adapter"}}


def load(model: Model, dtype: torch.dtype = torch.float32, **placing: Any) -> Any:
    """Load a model in the class of transformers that it fits (`class_of`), in eval mode.

    placing: options of from_pretrained on where the weights are kept, for example device_map. Raises PessaError when
    no class fits, when transformers cannot load the folder, and when there is not enough memory.
    """
    folder, chosen = model.reader.folder, class_of(model)
    options = (
        {"output_loading_info": True, "ignore_mismatched_sizes": True}
        | LOCAL_ONLY
        | WEIGHTS_ONLY
        | chosen.options
        | placing
    )
    try:
        loaded, info = chosen.kind.from_pretrained(folder, dtype=dtype, **options)
    except Exception as error:  # transformers raises many types, all of them caused by this folder or its size
        size = f"{model.parameters:,} parameters in {str(dtype).removeprefix('torch.')}"
        raise_if_out_of_memory(error, f"load {folder}, {size}", f"{MORE_MEMORY}; or {WEIGHTS_ALONE}")
        bare = isinstance(error, KeyError) and error.args == ("metadata",)  # of the index, which transformers looks up
        hint = f'add "metadata": {{}} to {folder / INDEX_FILE}; or {WEIGHTS_ALONE}' if bare else MISFIT
        raise PessaError(f"transformers cannot load {folder}\n{listed(str(error).splitlines())}", hint) from error
    lost = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
    if lost:  # found in the headers, but not when the weights were loaded
        raise PessaError(f"transformers did not load all weights of {folder}\n{listed(lost)}", MISFIT)
    return loaded.eval()


def from_folder(kind: Any, folder: Path, what: str) -> Any:
    """Load a tokenizer or processor; `what` names it in messages. Raises PessaError when the folder has none."""
    try:
        return kind.from_pretrained(folder, **LOCAL_ONLY)
    except Exception as error:  # transformers raises many types for missing and for broken files
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(f"{folder} has no {what}\n{reason}", "copy it there from the original model") from error


def encodes_alike(first: Any, second: Any) -> bool:
    """Whether two tokenizers or processors have the same state, and so encode and decode everything alike.

    False for slow (pure Python) tokenizers, whose state cannot be compared.
    """
    tokenizers = [getattr(encoder, "tokenizer", encoder) for encoder in (first, second)]
    if type(first) is not type(second) or not all(tokenizer.is_fast for tokenizer in tokenizers):
        return False
    if hasattr(first, "feature_extractor") and first.feature_extractor.to_dict() != second.feature_extractor.to_dict():
        return False
    states = []
    for tokenizer in tokenizers:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        for set_by_each_call in ("truncation", "padding"):
            backend.pop(set_by_each_call, None)
        options = {k: v for k, v in tokenizer.init_kwargs.items() if k != "name_or_path" and not k.endswith("_file")}
        states.append((type(tokenizer), backend, tokenizer.chat_template, options))
    return bool(states[0] == states[1])


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Turn off the progress bars and notes of transformers, which would be mixed into the output of pessa."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
