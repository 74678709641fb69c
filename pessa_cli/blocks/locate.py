"""Where the rows of the architecture table are in a checkpoint: tensor names as prefixes, layers and modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Generic

from pessa_cli.blocks.config_values import MOST_LAYERS, in_config, number, value
from pessa_cli.blocks.spec import BlockSpec, Row
from pessa_cli.checkpoint.reader import Header
from pessa_cli.common.errors import PessaError

# Of models that were saved within a wrapper: patterns of tensor names, what wraps the model, and what to save instead.
# transformers does not find the weights under such names.
WRAPPERS = (
    ("*_orig_mod.*", "torch.compile", "the model within: model._orig_mod.save_pretrained(FOLDER)"),
    ("module.*", "DistributedDataParallel", "the model within: model.module.save_pretrained(FOLDER)"),
    ("*_fsdp_wrapped_module.*", "FSDP", "the model within, with its full state dict"),
    ("*_checkpoint_wrapped_module.*", "activation checkpointing", "the model within"),
    *(
        (pattern, "PEFT", "the merged model: model.merge_and_unload().save_pretrained(FOLDER)")
        for pattern in ("base_model.model.*", "*.base_layer.*", "*.lora_[AB].*", "*.lora_embedding_[AB]*")
    ),
)
SPARE = ("num_nextn_predict_layers",)  # layers behind the last one, which predict further tokens and do nothing else
# A compact block is processed at full size, even if its file stores almost nothing of it. A block is refused as an
# attempt to exhaust memory if its full size exceeds both MOST_GROWTH times the entries of the whole checkpoint and
# ALWAYS_FINE entries.
MOST_GROWTH, ALWAYS_FINE = 64, 2**24


@dataclass(frozen=True)
class Location(Generic[Row]):
    """Where one block is: its row, the prefix of its names, its layer, and the module names of its matrices.

    modules: by what they are in the block, as in `BlockSpec.modules`.
    """

    spec: Row
    prefix: str
    layer: int
    modules: Mapping[str, str]

    @property
    def parent(self) -> str:
        """The module that holds the first matrix: q, for attention."""
        return parent(next(iter(self.modules.values())))


def parent(module: str) -> str:
    """Return the name of the parent module."""
    return module.rpartition(".")[0]


def refuse_wrapped(header: Header) -> None:
    """Raise PessaError if the tensor names are those of a model within a wrapper, under which nothing is found."""
    for pattern, wrapper, instead in WRAPPERS:
        found = [name for name in header if fnmatchcase(name, pattern)]
        if found:
            raise PessaError(
                f"{len(found)} tensors have the names of a model wrapped by {wrapper}, such as {found[0]}",
                f"save {instead}",
            )


def places(specs: Sequence[Row], header: Header) -> list[Location[Row]]:
    """Return every block of which the header has any matrix, by row, prefix and layer."""
    found = []
    for spec in specs:
        for prefix, layer in _locations(spec, header):
            modules = {side: prefix + name.replace("{i}", str(layer)) for side, name in spec.modules.items()}
            found.append(Location(spec, prefix, layer, modules))
    return found


def without_first_part(specs: Sequence[Row], header: Header) -> Sequence[Row]:
    """Return the rows of an encoder or decoder that was saved alone, whose names lack the first part.

    Returns the rows unchanged if the header has a block of any of them, or of no such part all rows.
    """
    if places(specs, header):
        return specs
    parts: dict[str, list[Row]] = {}
    for spec in specs:
        first = spec.stem.partition(".")[0]
        parts.setdefault(first, []).append(spec.within(first))
    # A decoder has blocks of all its rows, an encoder of fewer.
    whole = [part for part in parts.values() if all(_locations(spec, header) for spec in part)]
    return max(whole, key=len, default=specs)


def layer_faults(specs: Sequence[BlockSpec], config: Mapping[str, Any], header: Header) -> list[str]:
    """Return a line for each layer that config.json has and the file has not, or the other way round.

    transformers would fill the first kind with random weights, and ignore the second. Raises PessaError if config.json
    gives no valid number of layers.
    """
    faults: list[str] = []
    prefixes: dict[tuple[object, ...], set[str]] = {}  # of all rows whose blocks are in the same layers
    for place in places(specs, header):
        prefixes.setdefault(_stack(place.spec), set()).add(place.prefix)
    for spec in specs:
        found = set(_locations(spec, header))
        depth = number(config, spec, spec.depth, "number of layers", MOST_LAYERS)
        for prefix in sorted(prefixes.get(_stack(spec), ())):
            there = {layer for where, layer in _matches(spec, f"{spec.stem}{{i}}.", header) if where == prefix}
            last = max(there, default=-1)
            needed = there if depth is None else range(min(depth, last + 1))
            gaps = [] if spec.sparse else sorted(layer for layer in needed if (prefix, layer) not in found)
            faults += [f"{prefix}{spec.stem}{layer}: this layer has no {spec.title}" for layer in gaps]
            if depth is None:
                continue
            key = in_config(config, spec, spec.depth)
            if last + 1 < depth:
                faults.append(
                    f"{prefix}{spec.stem}{last + 1}: config.json has {depth} layers ({key}), the file {last + 1}"
                )
            faults += [
                f"{prefix}{spec.stem}{layer}: config.json has only {depth} layers ({key})"
                for layer in sorted(there)
                if layer >= depth
            ]
    return list(dict.fromkeys(faults))


def without_spare_layers(specs: Sequence[BlockSpec], config: Mapping[str, Any], header: Header) -> Header:
    """Return the header without the layers behind the last one that are there to predict further tokens alone.

    They are no part of the model that transformers runs, and are copied as they are.
    """
    spare: set[str] = set()
    for spec in specs:
        extra, depth = value(config, spec, SPARE), value(config, spec, spec.depth)
        if isinstance(extra, int) and isinstance(depth, int):
            found = ((name, layer) for name in header for _, layer in _matches(spec, f"{spec.stem}{{i}}.", (name,)))
            spare |= {name for name, layer in found if depth <= layer < depth + extra}
    return {name: info for name, info in header.items() if name not in spare} if spare else header


def complete(spec: BlockSpec, header: Header) -> bool:
    """Whether the header has all matrices of the row in each of its layers, and at least one layer."""
    found = places([spec], header)
    return bool(found) and all(f"{module}.weight" in header for place in found for module in place.modules.values())


def in_layers(spec: BlockSpec, layer: str, header: Header) -> dict[tuple[str, int], list[str]]:
    """Map (prefix, layer) to the names of its tensors relative to `layer`, the name of a layer with `{i}`."""
    rests: dict[tuple[str, int], list[str]] = {}
    for prefix, index, rest in _parts(spec, f"{layer}.", header):
        rests.setdefault((prefix, index), []).append(rest)
    return rests


def matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name matches any of the patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def most_entries(header: Header) -> int:
    """Return the largest number of entries that a block may have at full size."""
    return max(ALWAYS_FINE, MOST_GROWTH * sum(info.count for info in header.values()))


def _stack(spec: BlockSpec) -> tuple[object, ...]:
    """Return what rows have in common whose blocks are in the same layers."""
    return spec.stem, spec.under, spec.config


def _locations(spec: BlockSpec, header: Header) -> list[tuple[str, int]]:
    """Return (prefix, layer) wherever the header has any of the row's matrices."""
    return sorted({place for pattern in spec.modules.values() for place in _matches(spec, f"{pattern}.weight", header)})


def _matches(spec: BlockSpec, pattern: str, names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Yield (prefix, layer) for each tensor name that matches the pattern; after a final dot anything may follow."""
    return ((prefix, layer) for prefix, layer, _ in _parts(spec, pattern, names))


def _parts(spec: BlockSpec, pattern: str, names: Iterable[str]) -> Iterator[tuple[str, int, str]]:
    """Yield (prefix, layer, what follows a final dot) for each tensor name that matches the pattern."""
    before, after = (re.escape(part) for part in pattern.split("{i}"))
    end = "(.*)" if pattern.endswith(".") else "()"
    regex = re.compile(rf"((?:.*\.)?){before}(0|[1-9][0-9]{{0,4}}){after}{end}")
    for name in names:
        match = regex.fullmatch(name)
        if match and (not spec.under or any(f".{part}" in f".{match[1]}" for part in spec.under)):
            yield match[1], int(match[2]), match[3]
