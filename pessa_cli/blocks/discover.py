"""Discovery of sites: the attention blocks of a checkpoint, found by matching its header with the architecture table.

Every attention tensor must belong to a row of the table. A tensor that no row owns, a missing tensor and a tensor of
the wrong shape are errors, and all of them are reported at once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pessa_cli.blocks.compact_format import ModuleNames, Ragged, Ranks, ragged_modules
from pessa_cli.blocks.site import ROPE, Site, count, head_order, ragged_site
from pessa_cli.blocks.spec import AttentionSpec, Keys, Tower
from pessa_cli.blocks.table import ARCHITECTURES, TOWERS
from pessa_cli.checkpoint.dtypes import FLOATS
from pessa_cli.checkpoint.reader import Header
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed, shortened

MOST_HEADS = 4096
KNOWN = (*ARCHITECTURES, *TOWERS)
LISTED = "`pessa architectures` lists the supported ones"
# A compact block is processed at full size, even if its file stores almost nothing of it. A block is refused as an
# attempt to exhaust memory if its full size exceeds both MOST_GROWTH times the entries of the whole checkpoint and
# ALWAYS_FINE entries.
MOST_GROWTH, ALWAYS_FINE = 64, 2**24


def specs_of(config: Mapping[str, Any], header: Header, architecture: str | None = None) -> tuple[AttentionSpec, ...]:
    """Return the table's rows for a model, by its `model_type` or by `architecture`, the user's --as.

    Raises PessaError if the model type is not supported, and UsageError if --as names no row of the table.
    """
    model_type = architecture or config.get("model_type")
    if isinstance(model_type, str) and model_type in TOWERS:
        return tuple(
            spec for tower in TOWERS[model_type] for spec in tower.specs(tower.rows or _submodel_rows(tower, config))
        )
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return tuple(
            spec
            for spec in ARCHITECTURES[model_type]
            if all(bool(config.get(key, default)) == value for key, default, value in spec.where)
        )
    if architecture is not None:
        raise UsageError(f"--as {architecture} is not a known architecture", LISTED)
    alike = [name for name, specs in ARCHITECTURES.items() if all(any(_complete(spec, header)) for spec in specs)]
    what = f"model_type {shortened(model_type)} is not supported" if model_type else "config.json names no model_type"
    known = LISTED
    if alike:
        known += f"; its tensors are named as in {alike[0]}, so if its attention is the same, try --as {alike[0]}"
    raise PessaError(what, known)


def _submodel_rows(tower: Tower, config: Mapping[str, Any]) -> tuple[AttentionSpec, ...]:
    """Return the rows for the `model_type` in the submodel's config. Raises PessaError if it is not supported."""
    inner = config.get(tower.config)
    model_type = inner.get("model_type") if isinstance(inner, Mapping) else None
    if not isinstance(model_type, str) or model_type not in ARCHITECTURES:
        raise PessaError(
            f"config.json: {tower.config} has model_type {shortened(model_type)}, which is not supported",
            LISTED,
        )
    return specs_of(inner or {}, {}, model_type)


def find_sites(specs: Iterable[AttentionSpec], config: Mapping[str, Any], header: Header) -> list[Site]:
    """Return every attention block in the header, ordered by kind and layer.

    Raises PessaError, which lists all faults, if projections are missing, have a shape that contradicts the config or
    are not floats, or if there are attention tensors that no row owns; also if the model has no attention block, or
    has an operation between W_V and W_O.
    """
    faults: list[str] = []
    sites: list[Site] = []
    owned: set[str] = set()
    ragged = ragged_modules(config)
    ragged_names = ModuleNames(ragged)
    most = max(ALWAYS_FINE, MOST_GROWTH * sum(info.count for info in header.values()))
    found = [(spec, layer, modules) for spec in specs for layer, modules in _layers(spec, header)]
    beside = _tensors_within({_parent(modules["q"]) for _, _, modules in found}, header)
    for spec in specs:
        refused = [key for key in spec.refused if _value(config, spec, (key,))]
        if refused:
            raise PessaError(
                f"config.json sets {refused[0]}, an operation between W_V and W_O that prevents merging them",
                "pessa cannot prune this model",
            )
        gaps = [] if spec.sparse else _layers_without(spec, header)
        faults += [f"{module}: this layer has no {spec.kind} attention" for module in gaps]
    for spec, layer, modules in found:
        owned |= {f"{modules[side]}.{part}" for side in "qkvo" for part in ("weight", "bias")}
        rests = beside[_parent(modules["q"])]
        owned |= {
            f"{_parent(modules['q'])}.{rest}" for rest in rests if _matches_any(rest, (*spec.beside, *spec.norms))
        }
        missing = [f"{modules[side]}.weight: missing" for side in "qkvo" if f"{modules[side]}.weight" not in header]
        faults += dict.fromkeys(missing)
        if missing:
            continue
        entries = {side: ragged.get(ragged_names.find(module) or "") for side, module in modules.items()}
        there = [norm.partition(".")[0] for norm in spec.norms if any(_matches_any(rest, (norm,)) for rest in rests)]
        between = there[0] if there else "norms" * spec.normed
        try:
            sites.append(_site(spec, layer, modules, config, header, entries, most, between))
        except PessaError as error:
            faults.append(error.message)
    named: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        named[site.name].append(site.q)
    faults += [f"{name} was found twice or more: {' and '.join(qs[:8])}" for name, qs in named.items() if len(qs) > 1]
    scopes = {_parent(site.q) for site in sites}
    elsewhere = tuple(end for spec in specs for end in spec.elsewhere)
    for name, info in header.items():
        within = any(name[: dot.start()] in scopes for dot in re.finditer(r"\.", name))
        matrix = len(info.shape) > 1 and re.search(r"attn|attention", name) is not None
        if (within or matrix) and name not in owned and not any(f".{name}".endswith(f".{end}") for end in elsewhere):
            faults.append(f"{name}: no row of the architecture owns this attention tensor")
    if faults and found:
        raise PessaError(
            f"{len(faults)} attention tensors do not fit {_model_type(config)}\n{listed(faults)}",
            "check that config.json belongs to these weights, or give the architecture with --as",
        )
    if not sites:
        raise PessaError(
            f"found no attention block with the tensor names of {_model_type(config)}",
            "check that config.json belongs to these weights, or give the architecture with --as",
        )
    return sites


def _parent(module: str) -> str:
    """Return the name of the parent module."""
    return module.rpartition(".")[0]


def _tensors_within(scopes: set[str], header: Header) -> dict[str, list[str]]:
    """Map each of these modules to the names, relative to it, of all tensors within it."""
    rests: dict[str, list[str]] = defaultdict(list)
    for name in header:
        for dot in re.finditer(r"\.", name):
            if name[: dot.start()] in scopes:
                rests[name[: dot.start()]].append(name[dot.end() :])
    return rests


def _matches_any(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _layers(spec: AttentionSpec, header: Header) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the layers that have any of the row's projections, each with the module names of all four projections."""
    for prefix, layer in _locations(spec, header):
        names = {"q": spec.q, "k": spec.k, "v": spec.v, "o": spec.o}
        yield layer, {side: prefix + name.replace("{i}", str(layer)) for side, name in names.items()}


def _locations(spec: AttentionSpec, header: Header) -> list[tuple[str, int]]:
    """Return (prefix, layer) wherever the header has any of the row's projections."""
    patterns = (spec.q, spec.k, spec.v, spec.o)
    return sorted({place for pattern in patterns for place in _matches(spec, f"{pattern}.weight", header)})


def _layers_without(spec: AttentionSpec, header: Header) -> list[str]:
    """Return the layer modules that have none of the row's projections, though other layers with that prefix do."""
    found = _locations(spec, header)
    prefixes = {prefix for prefix, _ in found}
    stem = spec.q.partition("{i}")[0]
    there = {place for place in _matches(spec, f"{stem}{{i}}.", header) if place[0] in prefixes}
    return [f"{prefix}{stem}{layer}" for prefix, layer in sorted(there.difference(found))]


def _matches(spec: AttentionSpec, pattern: str, header: Header) -> Iterator[tuple[str, int]]:
    """Yield (prefix, layer) for each tensor name that matches the pattern; after a final dot anything may follow."""
    before, after = (re.escape(part) for part in pattern.split("{i}"))
    regex = re.compile(rf"((?:.*\.)?){before}(0|[1-9][0-9]{{0,4}}){after}{'.*' if pattern.endswith('.') else ''}")
    for name in header:
        match = regex.fullmatch(name)
        if match and (not spec.under or any(f".{part}" in f".{match[1]}" for part in spec.under)):
            yield match[1], int(match[2])


def _complete(spec: AttentionSpec, header: Header) -> Iterator[bool]:
    """Yield for each layer of the row whether the header has all of its projections."""
    for _, modules in _layers(spec, header):
        yield all(f"{module}.weight" in header for module in modules.values())


def _value(config: Mapping[str, Any], spec: AttentionSpec, keys: Keys) -> Any:
    """Return the value of the first key that the row's part of config.json has; None if none exists or all are null."""
    inner = config.get(spec.config) if spec.config else None
    for key in keys:
        found: Any = inner if isinstance(inner, Mapping) else config
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _head_count(config: Mapping[str, Any], spec: AttentionSpec, keys: Keys) -> int:
    """Return a number of heads from config.json. Raises PessaError if it is not an integer from 1 to MOST_HEADS."""
    value = _value(config, spec, keys)
    if value is None and isinstance(config.get(spec.config), Mapping):
        value = _default(config[spec.config], keys[0])
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_HEADS:
        key = f"{spec.config}.{keys[0]}" if spec.config else keys[0]
        raise PessaError(f"config.json: {key} is {shortened(value)}, not a number of heads from 1 to {MOST_HEADS}")
    return value


def _default(config: Mapping[str, Any], key: str) -> Any:
    """Return transformers' default for a key. Submodel configs on the hub leave out values equal to the default."""
    from transformers import CONFIG_MAPPING

    model_type = config.get("model_type")
    known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    return getattr(CONFIG_MAPPING[model_type](), key, None) if known else None


def _rotated_directions(config: Mapping[str, Any], spec: AttentionSpec, layer: int, head_dim: int) -> int:
    """Return how many leading directions of each head RoPE rotates in this layer: an even number, or all of them.

    Raises PessaError if config.json has no valid fraction or number of rotated directions.
    """
    rope = spec.rope
    if rope is None or (rope.unless and _value(config, spec, (rope.unless,))):
        return 0
    if rope.layers is not None:
        key, turning = rope.layers
        values = _value(config, spec, (key,))
        if isinstance(values, list) and layer < len(values) and values[layer] != turning:
            return 0
    share, count = _value(config, spec, rope.share), _value(config, spec, rope.count)
    share = rope.default if share is None else share
    if not isinstance(share, (int, float)) or not 0 <= share <= 1 or not isinstance(count or 0, int):
        raise PessaError(
            f"config.json: {(*rope.share, *rope.count)[0]} is {shortened(share)}, not a fraction from 0 to 1 of a head"
        )
    turned = int(head_dim * share) if count is None else count
    return min(head_dim, turned + turned % 2)


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    return model_type if model_type in KNOWN else shortened(model_type)


def _site(
    spec: AttentionSpec,
    layer: int,
    modules: Mapping[str, str],
    config: Mapping[str, Any],
    header: Header,
    entries: Mapping[str, Ragged | None],
    most: int,
    between: str,
) -> Site:
    """Build the site of one block.

    `entries` are its ragged projections, `most` is the largest allowed number of entries at full size, and `between`
    names the operation that prevents merging any direction of Q-K, if there is one.
    Raises PessaError if config, shapes, dtypes and ranks contradict each other.
    """
    heads = kv_heads = _head_count(config, spec, spec.heads)
    if isinstance(spec.kv_heads, int):
        kv_heads = spec.kv_heads
    elif _value(config, spec, spec.kv_heads) is not None:
        kv_heads = _head_count(config, spec, spec.kv_heads)
    if heads % kv_heads:
        raise PessaError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads evenly")
    weights = {side: header[f"{module}.weight"] for side, module in modules.items()}
    for side, info in weights.items():
        if len(info.shape) != 2 or info.dtype not in FLOATS:
            raise PessaError(f"{modules[side]}.weight: expected a matrix of floats, found {info.dtype} {info.shape}")
    biases = {side: header[f"{m}.bias"] for side, m in modules.items() if f"{m}.bias" in header}
    for side, info in biases.items():
        if info.dtype not in FLOATS:
            raise PessaError(f"{modules[side]}.bias: expected floats, found {info.dtype}")
    known = [entry.head_dim for entry in entries.values() if entry is not None]
    orders = {side: head_order(spec, side, kv_heads, heads // kv_heads) for side in "qkvo"}
    shapes = {side: info.shape[::-1] if spec.transposed else info.shape for side, info in weights.items()}
    head_dim = known[0] if known else shapes["q"][0] // len(orders["q"])

    def ranks(side: str) -> Ranks:
        entry = entries[side]
        if entry is None:
            return (head_dim,) * kv_heads
        return tuple(rank for rank, (letter, _) in zip(entry.ranks, orders[side], strict=False) if letter == side)

    unmerged = head_dim if between else _rotated_directions(config, spec, layer, head_dim)
    site = Site(
        spec=spec,
        layer=layer,
        q=modules["q"],
        k=modules["k"],
        v=modules["v"],
        o=modules["o"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        query_width=shapes["q"][1],
        key_width=shapes["k"][1],
        output_width=shapes["o"][0],
        biases=frozenset(biases),
        dtype=max((info.dtype for info in (*weights.values(), *biases.values())), key=FLOATS.index),
        qk_ranks=ranks("k"),
        vo_ranks=ranks("v"),
        pairs=entries["k"].pairs if entries["k"] else None,
        between=between or ROPE * bool(unmerged),
        unmerged=unmerged,
    )
    if head_dim < 1 or not len(site.qk_ranks) == len(site.vo_ranks) == kv_heads:
        raise PessaError(
            f"{site.q}: config.json gives {len(site.qk_ranks)} Q-K and {len(site.vo_ranks)} V-O ranks "
            f"for {kv_heads} key/value heads of {head_dim} directions"
        )
    if site.query_width != site.output_width or ("self" in spec.kind and site.query_width != site.key_width):
        widths = f"W_Q {site.query_width}, W_K {site.key_width}, W_O {site.output_width}"
        raise PessaError(f"{_parent(modules['q'])}: the widths of its inputs and output differ: {widths}")
    if min(site.query_width, site.key_width) < 1:
        raise PessaError(f"{_parent(modules['q'])}: its inputs have width zero")
    if site.by_pairs and head_dim % 2:
        raise PessaError(f"{site.q}: RoPE rotates pairs, but heads have an odd number of directions, {head_dim}")
    if site.qk_ranks != site.full and (site.pairs is not None) != site.by_pairs:
        problem = (
            "frequency pairs, which only heads with RoPE have"
            if site.pairs
            else "ranks, but heads with RoPE need frequency pairs"
        )
        raise PessaError(f"{site.q}: config.json gives queries and keys {problem}")
    if site.pairs is None and min(site.qk_ranks) < unmerged:
        raise PessaError(
            f"{site.q}: config.json gives Q-K rank {min(site.qk_ranks)}, "
            f"but {unmerged} directions cannot be merged ({site.between})"
        )
    size = count(site.shapes(site.full, site.full))
    if size > most:
        raise PessaError(f"{_parent(modules['q'])}: at full size it would have {size:,} entries, more than {most:,}")
    for name, shape in site.tensors.items():
        if header[name].shape != shape:
            raise PessaError(
                f"{name}: the file has shape {header[name].shape}, but {heads} heads of {head_dim} "
                f"({kv_heads} for keys and values) need {shape}"
            )
    if {side: entry for side, entry in entries.items() if entry} != {
        side: entry for side in "qkvo" for entry in [ragged_site(site).get(modules[side])] if entry
    }:
        raise PessaError(f"{site.q}: the ranks that config.json gives q, k, v and o contradict each other")
    return site
