"""Putting an adapter into the weights of a model, one layer of it in memory at a time.

The model's modules stand on the meta device, where they weigh nothing. A layer's weights are read, PEFT puts the
adapter on them and merges it as it would in a whole model, and what came of it is written: so any method that PEFT
knows merges here, with the numbers that PEFT's own merging gives.
"""

from __future__ import annotations

import copy
import platform
import re
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pessa_cli.blocks.compact_format import ModuleNames
from pessa_cli.checkpoint.files import ADAPTER_FILE, CONFIG_FILE, read_json, sha256_of, write_json
from pessa_cli.checkpoint.reader import CheckpointReader, Header
from pessa_cli.checkpoint.staging import Staging, new_folder, run_identity
from pessa_cli.common.errors import PessaError
from pessa_cli.common.jobs import one_thread
from pessa_cli.common.text import listed
from pessa_cli.common.version import VERSION
from pessa_cli.models.load import model_class, quiet_transformers
from pessa_cli.surgery.model import MANIFEST_FILE, Model
from pessa_cli.surgery.output import copy_side_files, hashes_of, write_shards
from pessa_cli.surgery.rewrite import cut_into_files
from pessa_cli.surgery.run import Run

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # of PEFT's names for what is inside the model
KEPT = ("method", "rule", "layout", "ranks", "dropped")  # of the manifest of a pruned model
NOT_MERGED = ("modules_to_save", "trainable_token_indices", "target_parameters")


class Adapter:
    """An adapter's folder: its configuration, and its tensors by name, read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        if not (folder / ADAPTER_FILE).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
            missing = ADAPTER_FILE if not (folder / ADAPTER_FILE).is_file() else ADAPTER_WEIGHTS
            raise PessaError(f"{folder} is no adapter: it has no {missing}", "give what `pessa tune -o` has written")
        self.folder = folder
        try:
            self.config = PeftConfig.from_pretrained(str(folder))
            self._file = _opened(folder / ADAPTER_WEIGHTS)
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise PessaError(f"{folder} is no adapter that can be read: {error!r}", "tune again") from None
        self.names = list(self._file.keys())
        extras = [name for name in NOT_MERGED if getattr(self.config, name, None)]
        extras += ["bias"] if getattr(self.config, "bias", None) not in (None, "none") else []
        if extras:
            raise PessaError(
                f"{folder} changes more than the layers it is on: {', '.join(extras)}",
                "merge it in memory: PeftModel.merge_and_unload",
            )

    def get(self, names: list[str]) -> dict[str, Tensor]:
        return {name: self._file.get_tensor(name) for name in names}

    @property
    def digests(self) -> dict[str, str]:
        return {name: sha256_of(self.folder / name) for name in (ADAPTER_FILE, ADAPTER_WEIGHTS)}


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


class Merger:
    """A model on the meta device, of which one layer at a time becomes real and gets the adapter."""

    def __init__(self, model: Model, adapter: Adapter) -> None:
        self._reader, self._adapter = model.reader, adapter
        self._model = _skeleton(model)
        self._stored = ModuleNames(model.reader.header)
        # PEFT marks what it has seen on the way down; each layer gets a fresh copy of the configuration.
        config = copy.deepcopy(adapter.config)
        targets = [name for name, _ in self._model.named_modules() if name and check_target_module_exists(config, name)]
        self.layers: dict[str, list[str]] = {}
        for name in targets:
            self.layers.setdefault(_layer(name), []).append(name)
        of_targets = tuple(f"{ADAPTER_PREFIX}{name}." for name in targets)
        # What belongs to no layer is shared by all: a bank of directions, say.
        self._shared = [name for name in adapter.names if not name.startswith(of_targets)]
        lost = [name for name in self._shared if _layer(name) != name]
        if not targets or lost:
            found = listed(lost) if lost else listed([str(adapter.config.target_modules)])
            raise PessaError(
                f"{adapter.folder} is not an adapter of {model.reader.folder}, which has not what it is on\n{found}",
                "give the model that it was tuned on",
            )

    def owned(self, layer: str) -> list[str]:
        """The names in the checkpoint of what changes in a layer."""
        found = []
        for target in self.layers[layer]:
            for name, _ in self._model.get_submodule(target).named_parameters(recurse=False):
                stored = self._stored.find(f"{target}.{name}")
                if stored is not None:
                    found.append(stored)
                elif name == "weight":
                    raise PessaError(
                        f"{self._reader.folder} stores no {target}.{name}: it is shared with another layer",
                        "merge in memory: PeftModel.merge_and_unload",
                    )
        return found

    def merged(self, layer: str) -> dict[str, Tensor]:
        """The new tensors of a layer by their names in the checkpoint."""
        module = self._model.get_submodule(layer)
        stored = {name: self._stored.find(f"{layer}.{name}") for name, _ in module.named_parameters()}
        state = {name: self._reader.get(found) for name, found in stored.items() if found is not None}
        module.load_state_dict(state, strict=False, assign=True)
        config = copy.deepcopy(self._adapter.config)
        config.target_modules, config.inference_mode, config.task_type = set(self.layers[layer]), True, None
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if hasattr(config, name):
                setattr(config, name, None)
        prefixes = tuple(f"{ADAPTER_PREFIX}{name}." for name in self.layers[layer])
        mine = [name for name in self._adapter.names if name.startswith(prefixes)] + self._shared
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, about the whole model that it does not see
                tuned = PeftModel(self._model, config)
                unknown = set_peft_model_state_dict(tuned, self._adapter.get(mine)).unexpected_keys
                if unknown:
                    raise ValueError(f"unknown parameters {', '.join(unknown[:3])}")
                self._model = tuned.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            hint = "give the model that it was tuned on"
            if self._reader.config.get("quantization_config"):
                hint = "the model is compact: export it with --layout dense, and merge into that"
            reasons = listed(str(error).splitlines())
            raise PessaError(f"{self._adapter.folder} cannot be merged into {layer}\n{reasons}", hint) from error
        found = {}
        for target in self.layers[layer]:
            linear = self._model.get_submodule(target)
            for name, value in linear.named_parameters(recurse=False):
                found[self._stored.find(f"{target}.{name}")] = value.detach()
        self._model.get_submodule(layer).to("meta")
        return {name: value for name, value in found.items() if name is not None}


def merge_adapter(model: Model, adapter: Path, out: Path, run: Run | None = None) -> dict[str, Any]:
    """Write the model with the adapter in its weights; returns what its pessa.json says.

    Everything but the tuned layers is copied byte for byte. Raises PessaError for an adapter of another model, and
    where a merged number is not finite.
    """
    run = run or Run()
    reader = model.reader
    with quiet_transformers(), new_folder(out, reader.folder, run.force, run.resume) as staging, one_thread():
        opened = Adapter(adapter)
        merger = Merger(model, opened)
        owner = {name: layer for layer in merger.layers for name in merger.owned(layer)}
        files = cut_into_files(_together(reader.header, owner), owner, run.shard_bytes)
        summary = {
            "pessa": VERSION,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in ("torch", "peft")},
            "command": "merge",
            "source": reader.folder.name if run.source is None else run.source,
            "adapter": opened.digests,
            "adapter_method": opened.config.peft_type.value,
            "changed": len(owner),
        }
        names = {file: list(plan) for file, plan in files.items()}
        last = {owner[name]: name for plan in files.values() for name in plan if name in owner}.values()
        staging.begin(run_identity(reader, summary, names))
        with run.progress("merging", sum(info.nbytes for info in reader.header.values()), len(merger.layers)) as tick:
            write_shards(reader, staging, files, lambda plan: _tensors(plan, owner, merger), last, tick)
        return _finish(reader, staging, summary)


def _skeleton(model: Model) -> nn.Module:
    """The model's modules on the meta device, ragged where it is compact."""
    kind = model_class(model)
    config = kind.config_class.from_pretrained(model.reader.folder)
    quantization = model.reader.config.get("quantization_config")
    quantizer = None
    if quantization is not None:
        from pessa_cli.runtime.transformers_loader import PessaConfig, PessaQuantizer

        quantizer = PessaQuantizer(PessaConfig(**quantization))
        config = quantizer.update_attn_implementation(config)
    with torch.device("meta"):
        skeleton: nn.Module = kind(config)
        if quantizer is not None:
            quantizer._process_model_before_weight_loading(skeleton)
    return skeleton.eval()


def _layer(name: str) -> str:
    """The layer that a module is in: what PEFT has to see of the model to put an adapter there."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def _together(header: Header, owner: Mapping[str, str]) -> Header:
    """The header with the tensors of each layer that change one after the other, where the first of them is."""
    of_layer: dict[str, list[str]] = {}
    for name in header:
        if name in owner:
            of_layer.setdefault(owner[name], []).append(name)
    order: dict[str, None] = {}
    for name in header:
        order |= dict.fromkeys(of_layer[owner[name]] if name in owner else [name])
    return {name: header[name] for name in order}


def _tensors(plan: Header, owner: Mapping[str, str], merger: Merger) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of a file in order: None for one to copy."""
    ready: dict[str, Tensor] = {}
    for name in plan:
        if name in owner and name not in ready:
            ready = merger.merged(owner[name])
        yield name, ready.pop(name, None)


def _finish(reader: CheckpointReader, staging: Staging, summary: Mapping[str, Any]) -> dict[str, Any]:
    """Side files, config and manifest."""
    folder = staging.folder
    copy_side_files(reader.folder, folder)
    write_json(folder / CONFIG_FILE, reader.config)
    before = read_json(reader.folder / MANIFEST_FILE) if (reader.folder / MANIFEST_FILE).is_file() else {}
    reader.check_unchanged()
    sources = {file: sha256_of(reader.folder / file) for file in (*reader.files, CONFIG_FILE)}
    manifest = (
        dict(summary)
        | {name: before[name] for name in KEPT if name in before}
        | {
            "source_sha256": dict(sorted(sources.items())),
            "sha256": hashes_of(staging),
        }
    )
    write_json(folder / MANIFEST_FILE, manifest)
    return manifest
