"""Merging an adapter into the weights of a checkpoint, with one layer in memory at a time.

The model is built on the meta device, which needs no memory for weights. For each layer its weights are read, PEFT puts
the adapter on them and merges it as in a complete model, and the result is written. Any method that PEFT can merge
is thus supported, with the same numbers as merging in memory.
"""

from __future__ import annotations

import copy
import platform
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from pessa_cli.blocks.compact_format import ModuleNames
from pessa_cli.checkpoint.contents import Contents
from pessa_cli.checkpoint.files import ADAPTER_FILE, CONFIG_FILE, read_json, sha256_of, write_json
from pessa_cli.checkpoint.manifest import MANIFEST_FILE, write_manifest
from pessa_cli.checkpoint.reader import CheckpointReader, Header
from pessa_cli.checkpoint.staging import Staging, new_folder, run_identity
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import check_there
from pessa_cli.common.jobs import one_thread
from pessa_cli.common.memory import raise_if_out_of_memory
from pessa_cli.common.text import listed
from pessa_cli.common.version import VERSION
from pessa_cli.models.classes import model_class
from pessa_cli.models.load import quiet_transformers
from pessa_cli.surgery.generation import generation_notes, write_generation_config
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.output import hashes_of, write_shards
from pessa_cli.surgery.rewrite import cut_into_files
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.side_files import copy_side_files, output_contents
from pessa_cli.tuning.adapter_config import check_adapter_config
from pessa_cli.tuning.merge_compact import RaggedLayer, brings_back, narrow, whole
from pessa_cli.tuning.tuner_base import TunerConfig

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_PREFIX = "base_model.model."  # in PEFT's names of modules of the base
KEPT = (
    "method",
    "rule",
    "layout",
    "ranks",
    "dropped",
)  # keys of a pruned model's manifest that also hold for the merged one
NOT_MERGED = ("modules_to_save", "trainable_token_indices", "target_parameters")  # changes outside adapted layers


class Adapter:
    """The configuration of an adapter and the names of its tensors, which are read on request.

    Raises PessaError for folders that are not adapters, and for adapters that change more than the adapted layers.
    """

    def __init__(self, folder: Path) -> None:
        hint = "give a folder that `pessa tune -o` wrote, or PEFT's save_pretrained"
        check_there(folder, hint)
        if not (folder / ADAPTER_FILE).is_file() or not (folder / ADAPTER_WEIGHTS).is_file():
            missing = ADAPTER_FILE if not (folder / ADAPTER_FILE).is_file() else ADAPTER_WEIGHTS
            if (folder / "adapter_model.bin").is_file():
                hint = "load adapter_model.bin with PEFT if you trust it; its save_pretrained writes safetensors"
            raise PessaError(f"{folder} is not an adapter: it has no {missing}", hint)
        self.folder = folder
        try:
            content = read_json(folder / ADAPTER_FILE)  # which PEFT reads without limits
            self._file = _opened(folder / ADAPTER_WEIGHTS)
            self.names = list(self._file.keys())
            _check_config(folder, content, (tuple(self._file.get_slice(name).get_shape()) for name in self.names))
            self.config = PeftConfig.from_pretrained(str(folder))
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            raise PessaError(
                f"the adapter {folder} cannot be read: {error!r}", "copy the adapter again, or tune again"
            ) from error
        extras = [name for name in NOT_MERGED if getattr(self.config, name, None)]
        extras += ["bias"] if getattr(self.config, "bias", None) not in (None, "none") else []
        if extras:
            raise PessaError(
                f"{folder} also changes parameters outside its adapted layers: {', '.join(extras)}",
                "merge it in memory: PeftModel.merge_and_unload",
            )

    def get(self, names: list[str]) -> dict[str, Tensor]:
        """Read tensors by name."""
        return {name: self._file.get_tensor(name) for name in names}

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of the adapter's files."""
        return {name: sha256_of(self.folder / name) for name in (ADAPTER_FILE, ADAPTER_WEIGHTS)}


def _check_config(folder: Path, content: Mapping[str, Any], shapes: Iterable[tuple[int, ...]]) -> None:
    try:
        check_adapter_config(content, shapes)
    except ValueError as error:
        raise PessaError(
            f"the adapter {folder} cannot be read: {ADAPTER_FILE}: {error}",
            "copy the adapter again, or correct this key",
        ) from error


def _opened(path: Path) -> Any:
    return safe_open(path, framework="pt")


class Merger:
    """A model on the meta device. One layer at a time gets its weights and the adapter, and is merged.

    Raises PessaError when the adapter has no target modules, or tensors for other modules than those of the model.
    """

    def __init__(self, model: Model, adapter: Adapter) -> None:
        self._reader, self._adapter = model.reader, adapter
        self._model = _meta_model(model)
        self._stored = ModuleNames(model.reader.header)
        targets = _adapted_modules(self._model, adapter.names)
        self.layers: dict[str, list[str]] = {}  # names of the adapted modules of each layer
        for name in targets:
            self.layers.setdefault(_layer_of(name), []).append(name)
        of_targets = tuple(f"{ADAPTER_PREFIX}{name}." for name in targets)
        # Tensors that belong to no single module, such as the bank of PiCa, are shared by all layers.
        self._shared = [name for name in adapter.names if not name.startswith(of_targets)]
        lost = [name for name in self._shared if _layer_of(name) != name]
        if not targets or lost:
            found = listed(lost) if lost else listed([str(adapter.config.target_modules)])
            raise PessaError(
                f"{adapter.folder} is not an adapter of {model.reader.folder}, which lacks these modules\n{found}",
                "give the model that it was tuned on",
            )
        back = brings_back(model.attention, adapter.config, targets)
        if back:
            folder = model.reader.folder
            raise PessaError(
                f"{adapter.folder} gives directions that were cut from {folder} an effect again\n{listed(back)}",
                f"write the full shapes first: pessa export {folder} -o dense --layout dense; then merge into that: "
                f"pessa merge dense {adapter.folder} -o merged",
            )

    def owned(self, layer: str) -> list[str]:
        """The names in the checkpoint of the tensors that merging changes in a layer.

        Raises PessaError when a weight is tied to another one, and so not stored under its name.
        """
        found = []
        for target in self.layers[layer]:
            for name, _ in self._model.get_submodule(target).named_parameters(recurse=False):
                stored = self._stored.find(f"{target}.{name}")
                if stored is not None:
                    found.append(stored)
                elif name == "weight":
                    raise PessaError(
                        f"{self._reader.folder} stores no {target}.{name}, because it is tied to another weight",
                        "merge in memory: PeftModel.merge_and_unload",
                    )
        return found

    def merged(self, layer: str) -> dict[str, Tensor]:
        """Merge the adapter into a layer; returns the changed tensors by their names in the checkpoint.

        Raises PessaError when PEFT cannot merge the adapter, or a merged entry is not finite.
        """
        module = self._model.get_submodule(layer)
        stored = {name: self._stored.find(f"{layer}.{name}") for name, _ in module.named_parameters()}
        state = {name: self._reader.get(found) for name, found in stored.items() if found is not None}
        module.load_state_dict(state, strict=False, assign=True)
        config = copy.deepcopy(self._adapter.config)  # PEFT changes a configuration when it matches modules
        config.target_modules, config.inference_mode, config.task_type = set(self.layers[layer]), True, None
        for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
            if hasattr(config, name):
                setattr(config, name, None)
        ragged = {} if isinstance(config, TunerConfig) else self._ragged(layer)
        for target, each in ragged.items():
            self._model.set_submodule(target, whole(each))
        prefixes = tuple(f"{ADAPTER_PREFIX}{name}." for name in self.layers[layer])
        mine = [name for name in self._adapter.names if name.startswith(prefixes)] + self._shared
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # from PEFT, about the rest of the model, which is not there
                tuned = PeftModel(self._model, config)
                unknown = set_peft_model_state_dict(tuned, self._adapter.get(mine)).unexpected_keys
                if unknown:
                    raise ValueError(f"unknown parameters {', '.join(unknown[:3])}")
                self._model = tuned.merge_and_unload(safe_merge=True)
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise_if_out_of_memory(error, f"merge {self._adapter.folder} into {layer}")
            reasons = listed(str(error).splitlines())
            raise PessaError(
                f"{self._adapter.folder} cannot be merged into {layer}\n{reasons}",
                "give the model that it was tuned on",
            ) from error
        found = {}
        for target in self.layers[layer]:
            linear: Any = self._model.get_submodule(target)
            parameters = dict(linear.named_parameters(recurse=False))
            if target in ragged:
                parameters = narrow(linear, ragged[target])
            for name, value in parameters.items():
                found[self._stored.find(f"{target}.{name}")] = value.detach()
        self._model.get_submodule(layer).to("meta")
        return {name: value for name, value in found.items() if name is not None}

    def _ragged(self, layer: str) -> dict[str, RaggedLayer]:
        """The ragged modules among the adapted ones of a layer, by name."""
        modules = {name: self._model.get_submodule(name) for name in self.layers[layer]}
        return {name: each for name, each in modules.items() if isinstance(each, RaggedLayer)}


def merge_adapter(model: Model, adapter: Path, out: Path, run: Run | None = None) -> dict[str, Any]:
    """Write the model with the adapter merged into its weights.

    Returns the contents of its pessa.json, and "copied" and "left_out", the fields of `Contents`.

    All tensors that the adapter does not change are copied byte for byte. Raises PessaError for an adapter of another
    model, and when a merged entry is not finite.
    """
    run = run or Run()
    reader, contents = model.reader, output_contents(model.reader, run.unknown_weights)
    sources = [reader.folder, adapter]
    with quiet_transformers(), new_folder(out, sources, run.force, run.resume) as staging, one_thread():
        opened = Adapter(adapter)
        merger = Merger(model, opened)
        owner = {name: layer for layer in merger.layers for name in merger.owned(layer)}
        files = cut_into_files(_grouped_by_layer(reader.header, owner), owner, run.shard_bytes)
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
        return _finish(reader, staging, contents, summary)


def _meta_model(model: Model) -> nn.Module:
    """The modules of a model on the meta device, with compact layers where the checkpoint is compact."""
    kind = model_class(model)
    config = kind.config_class.from_pretrained(model.reader.folder)
    quantization = model.reader.config.get("quantization_config")
    quantizer = None
    if quantization is not None:
        from pessa_cli.runtime.transformers_loader import PessaConfig, PessaQuantizer

        quantizer = PessaQuantizer(PessaConfig(**quantization))
        quantizer.before_attention_is_chosen(config)
    with torch.device("meta"):
        empty: nn.Module = kind(config)
        if quantizer is not None:
            quantizer.before_loading(empty)
    return empty.eval()


def _adapted_modules(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the modules without submodules that an adapter has tensors for, in the order of the model.

    The names of its tensors tell them. PEFT would run the regular expressions of the adapter's file instead, and some
    of these take endless time.
    """
    beginnings: set[str] = set()
    for name in names:
        parts = name.removeprefix(ADAPTER_PREFIX).split(".")
        beginnings.update(".".join(parts[:end]) for end in range(1, len(parts)))
    return [name for name, module in model.named_modules() if name in beginnings and not any(module.children())]


def _layer_of(name: str) -> str:
    """The name of the layer that contains a module, up to the first number, or the name itself."""
    match = re.match(r"(.*?\.\d+)\.", name)
    return match[1] if match else name


def _grouped_by_layer(header: Header, owner: Mapping[str, str]) -> Header:
    """Reorder a header so that the changed tensors of each layer follow the first of them.

    owner: the layer of each changed tensor.
    """
    of_layer: dict[str, list[str]] = {}
    for name in header:
        if name in owner:
            of_layer.setdefault(owner[name], []).append(name)
    order: dict[str, None] = {}
    for name in header:
        order |= dict.fromkeys(of_layer[owner[name]] if name in owner else [name])
    return {name: header[name] for name in order}


def _tensors(plan: Header, owner: Mapping[str, str], merger: Merger) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the tensors of a file in order, with None for each one to copy unchanged."""
    ready: dict[str, Tensor] = {}
    for name in plan:
        if name in owner and name not in ready:
            ready = merger.merged(owner[name])
        yield name, ready.pop(name, None)


def _finish(
    reader: CheckpointReader, staging: Staging, contents: Contents, summary: Mapping[str, Any]
) -> dict[str, Any]:
    """Write side files, config and manifest; returns the manifest."""
    folder = staging.folder
    copy_side_files(reader.folder, folder, contents.copied)
    write_generation_config(reader.folder, folder, reader.config)
    write_json(folder / CONFIG_FILE, reader.config)
    before = read_json(reader.folder / MANIFEST_FILE) if (reader.folder / MANIFEST_FILE).is_file() else {}
    reader.check_unchanged()
    sources = {file: sha256_of(reader.folder / file) for file in (*reader.files, CONFIG_FILE)}
    kept = {name: before[name] for name in KEPT if name in before}
    kept |= {"notes": notes} if (notes := generation_notes(reader.folder, reader.config)) else {}
    about = dict(summary) | kept | {"source_sha256": dict(sorted(sources.items()))}
    manifest = write_manifest(folder, about, hashes_of(staging))
    return manifest | {"copied": contents.copied, "left_out": contents.left_out}
