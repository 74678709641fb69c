"""Loading models, tokenizers and processors with transformers, without running code from the checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.surgery.model import Model

WEIGHTS_ALONE = "compare only the weights: --level weights"
# Whatever a checkpoint asks for, none of its code runs and nothing is downloaded.
LOCAL_ONLY = {"trust_remote_code": False, "local_files_only": True}
# transformers would add an adapter that lies beside the full weights; it looks for one in this folder, which is absent.
WEIGHTS_ONLY = {"adapter_kwargs": {"subfolder": "no-adapter"}}


def load(model: Model, dtype: torch.dtype = torch.float32, **placing: Any) -> Any:
    """Load a model in its own class of transformers, in eval mode.

    placing: options of from_pretrained on where the weights are kept, for example device_map. Raises PessaError when
    transformers cannot load the folder, and when weights are missing or have other shapes than the model.
    """
    folder, kind = model.reader.folder, model_class(model)
    hint = "the checkpoint does not match its config.json; to compare only the weights: --level weights"
    try:
        # With ignore_mismatched_sizes transformers reports mismatches with their names, which its exception leaves out.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True} | LOCAL_ONLY | WEIGHTS_ONLY | placing
        loaded, info = kind.from_pretrained(folder, dtype=dtype, **options)
    except Exception as error:  # transformers raises many types, all of them caused by this folder
        raise PessaError(f"transformers cannot load {folder}\n{listed(str(error).splitlines())}", hint) from error
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name}: {tuple(found)}, the model has {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    if faults:
        raise PessaError(f"{folder} does not contain the weights of a {kind.__name__}\n{listed(faults)}", hint)
    return loaded.eval()


def model_class(model: Model) -> Any:
    """The class of transformers that config.json names. Making one runs no code from the checkpoint.

    Raises PessaError when config.json names no such class, or asks for attention kernels from elsewhere.
    """
    folder, names = model.reader.folder, model.reader.config.get("architectures")
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    kernels = str(model.reader.config.get("attn_implementation") or "")
    if "/" in kernels:  # the name of a repository, whose code transformers would download and run
        raise PessaError(
            f"{folder}: config.json asks for code from {kernels}", "remove attn_implementation from config.json"
        )
    if not isinstance(names, list) or not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise PessaError(
            f"{folder}: `architectures` in config.json is {names}, which is not a model class of transformers",
            "add the class it was saved from, or compare only the weights: --level weights",
        )
    return kind


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
