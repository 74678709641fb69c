"""Loading models, tokenizers and processors with transformers, without running code of the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.surgery.model import Model

WEIGHTS_ALONE = "compare weights alone: --level weights"
# Whatever a checkpoint asks for: none of its code runs, nothing is fetched.
LOCAL_ONLY = {"trust_remote_code": False, "local_files_only": True}


def load(model: Model, dtype: torch.dtype = torch.float32, **placing: Any) -> Any:
    """The model in its own class from transformers, in eval mode; `placing`: options on where its weights are kept."""
    folder, kind = model.reader.folder, model_class(model)
    hint = "the checkpoint and its config.json do not fit; weights alone compare with --level weights"
    try:
        # Mismatched sizes are asked for as data, because as an exception they come without the names.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True} | LOCAL_ONLY | placing
        loaded, info = kind.from_pretrained(folder, dtype=dtype, **options)
    except Exception as error:  # whatever transformers raises, it is about this folder
        raise PessaError(f"transformers cannot load {folder}\n{listed(str(error).splitlines())}", hint) from error
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name}: {tuple(found)}, the model has {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    if faults:
        raise PessaError(f"{folder} does not have the weights of a {kind.__name__}\n{listed(faults)}", hint)
    return loaded.eval()


def model_class(model: Model) -> Any:
    """The class from transformers that config.json names, and whose construction runs no code of the checkpoint."""
    folder, names = model.reader.folder, model.reader.config.get("architectures")
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    kernels = str(model.reader.config.get("attn_implementation") or "")
    if "/" in kernels:  # transformers would fetch and run it
        raise PessaError(f"{folder}: config.json asks for code from {kernels}", "take attn_implementation out of it")
    if not isinstance(names, list) or not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise PessaError(
            f"{folder}: config.json names no model of transformers under `architectures` ({names})",
            "add the class it was saved from, or compare weights alone: --level weights",
        )
    return kind


def from_folder(kind: Any, folder: Path, what: str) -> Any:
    """A tokenizer or processor. Raises PessaError when the folder has none."""
    try:
        return kind.from_pretrained(folder, **LOCAL_ONLY)
    except Exception as error:  # as above: there are many ways not to have one
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(f"{folder} has no {what}\n{reason}", "copy it there from the original model") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own progress bars and notes would stand among our results."""
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
