"""The class of transformers that a checkpoint is a model of: the one in config.json, or the one that its tensors fit.

`architectures` in config.json is often missing, names a class that the checkpoint brings itself, or one with a head
that is not in the file. So each class is tried on the names, dtypes and shapes of the file's tensors, without their
data: transformers itself loads them, on the meta device, and reports what is missing and what it does not use.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
import transformers

from pessa_cli.blocks.names import module_names
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.surgery.model import Model

# Whatever a checkpoint asks for, none of its code runs and nothing is downloaded.
LOCAL_ONLY = {"trust_remote_code": False, "local_files_only": True}
WEIGHTS_ALONE = "compare only the weights: --level weights"
MISFIT = "the checkpoint does not match its config.json; to compare only the weights: --level weights"
# Tasks by the names of transformers' mappings from configs to classes. If a file fits several classes equally well,
# the first one is taken: a bare decoder whose output layer is tied to its embedding is also a language model.
TASKS = (
    *("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ", "CTC", "IMAGE_TEXT_TO_TEXT", "MASKED_LM", "CAUSAL_LM"),
    *("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MULTIPLE_CHOICE"),
    *("IMAGE_CLASSIFICATION", "AUDIO_CLASSIFICATION", "AUDIO_FRAME_CLASSIFICATION", "AUDIO_XVECTOR"),
    *("PRETRAINING", "NEXT_SENTENCE_PREDICTION", "MASKED_IMAGE_MODELING"),
)


@dataclass(frozen=True)
class ModelClass:
    """A class of transformers, and the arguments with which it is made."""

    kind: Any
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """What transformers says about the tensors of a file as a model of one class.

    faults: a line for each tensor that is missing or has another shape, and for each attention block that the class
    does not have. unused: the number of tensors that are not loaded. error: why the class cannot be made at all.
    """

    faults: list[str]
    unused: int
    error: Exception | None = None


_chosen: WeakKeyDictionary[CheckpointReader, ModelClass] = WeakKeyDictionary()


def class_of(model: Model) -> ModelClass:
    """Return the class of transformers that a checkpoint is a model of.

    That is the first one under `architectures` in config.json if the file has all of its tensors, and the class has all
    attention blocks of the file. Otherwise it is the class for this `model_type` that leaves the fewest tensors unused.
    None of the checkpoint's code runs. Raises PessaError if no class fits, if transformers does not know the model
    type, or if config.json asks for attention kernels from elsewhere.
    """
    if model.reader not in _chosen:
        _chosen[model.reader] = _choose(model)
    return _chosen[model.reader]


def model_class(model: Model) -> Any:
    """Return the class alone; see `class_of`."""
    return class_of(model).kind


def _choose(model: Model) -> ModelClass:
    folder, words = model.reader.folder, model.reader.config.get("architectures")
    kernels = str(model.reader.config.get("attn_implementation") or "")
    if "/" in kernels:  # the name of a repository, whose code transformers would download and run
        raise PessaError(
            f"{folder}: config.json asks for code from {kernels}", "remove attn_implementation from config.json"
        )
    config, unknown = _config(model)
    first: tuple[str, Fit] | None = None
    best: tuple[int, ModelClass] | None = None
    for named, candidate in _candidates(config, words):
        if best is not None and best[0] == 0:
            break
        fit = _fit(model, candidate)
        if not fit.faults:
            if named:
                return candidate
            if best is None or fit.unused < best[0]:
                best = fit.unused, candidate
        first = first or (candidate.kind.__name__, fit)
    if best is not None:
        return best[1]
    if first is not None:
        name, fit = first
        what = f"does not contain the weights of a {name}" if fit.error is None else f"cannot be loaded as a {name}"
        raise PessaError(f"{folder} {what}\n{listed(fit.faults)}", MISFIT) from fit.error
    raise PessaError(
        f"{folder}: `architectures` in config.json is {words}, which is not a model class of transformers\n"
        f"{listed(str(unknown).splitlines(), most=1)}",
        "add the class it was saved from, or compare only the weights: --level weights",
    ) from unknown


def _config(model: Model) -> tuple[Any | None, Exception | None]:
    """Return the config, or None and the reason if transformers has no config class for it."""
    try:
        return transformers.AutoConfig.from_pretrained(model.reader.folder, **LOCAL_ONLY), None
    except Exception as error:  # transformers raises many types, all of them caused by this folder
        return None, error


def _candidates(config: Any | None, words: Any) -> Iterator[tuple[bool, ModelClass]]:
    """Yield the classes to try, in order, each with whether config.json names it."""
    seen: list[Any] = [transformers.PreTrainedModel]
    modeling = _modeling(config)
    names = [name for name in words if isinstance(name, str)] if isinstance(words, list) else []
    named = [getattr(transformers, name, None) or getattr(modeling, name, None) for name in names[:1]]
    for is_named, kind in [*((True, kind) for kind in named), *((False, kind) for kind in _known(config, modeling))]:
        if isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel) and kind not in seen:
            seen.append(kind)
            yield is_named, ModelClass(kind)
            if "add_pooling_layer" in inspect.signature(kind).parameters:  # often cut off, as no task needs it
                yield is_named, ModelClass(kind, {"add_pooling_layer": False})


def _known(config: Any | None, modeling: Any) -> Iterator[Any]:
    """Yield the classes of transformers for a config: by task, then the base model, then parts, such as encoders."""
    if config is None:
        return
    for name in (*(f"MODEL_FOR_{task}_MAPPING" for task in TASKS), "MODEL_MAPPING", "MODEL_FOR_TEXT_ENCODING_MAPPING"):
        found = getattr(transformers, name, {}).get(type(config), ())
        yield from found if isinstance(found, tuple) else (found,)
    for name, kind in vars(modeling).items():
        part = isinstance(kind, type) and getattr(kind, "config_class", None) is type(config)
        if part and not name.endswith("PreTrainedModel"):
            yield kind


def _modeling(config: Any | None) -> Any:
    """Return the module of transformers with the classes for a config; None if there is none."""
    name = type(config).__module__.replace(".configuration_", ".modeling_")
    return import_module(name) if name.startswith("transformers.models.") and ".modeling_" in name else None


def _fit(model: Model, candidate: ModelClass) -> Fit:
    """Load names, dtypes and shapes of the file's tensors, without their data, as a model of this class."""
    kind, reader = candidate.kind, model.reader
    tensors = {
        name: torch.empty(info.shape, dtype=getattr(torch, TORCH_DTYPES[info.dtype]), device="meta")
        for name, info in reader.header.items()
    }
    try:
        config = kind.config_class.from_pretrained(reader.folder, **LOCAL_ONLY)
        # With ignore_mismatched_sizes transformers reports mismatches with their names, which its exception leaves out.
        empty, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            device_map="meta",
            **candidate.options,
        )
    except Exception as error:  # transformers raises many types, all of them caused by this folder
        return Fit(str(error).splitlines() or [repr(error)], 0, error)
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    faults += [
        f"{name}: {tuple(found)}, the model has {tuple(own)}" for name, found, own in sorted(info["mismatched_keys"])
    ]
    projections = [module for site in model.sites for module in site.modules.values()]
    places = module_names(empty, projections)
    faults += [f"{name}: {kind.__name__} has no such module" for name in projections if name not in places]
    return Fit(faults, len(info["unexpected_keys"]))
