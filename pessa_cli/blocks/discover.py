"""Discovery of sites: the attention blocks of a checkpoint, found by matching its header with the architecture table.

Every attention tensor must belong to a row of the table. A tensor that no row owns, a missing tensor and a tensor of
the wrong shape are errors, and all of them are reported at once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from pessa_cli.blocks.compact_format import ModuleNames, Ragged, Ranks, ragged_modules
from pessa_cli.blocks.config_values import default, head_counts, in_config, rotated_directions, value
from pessa_cli.blocks.locate import (
    complete,
    layer_faults,
    matches_any,
    most_entries,
    parent,
    places,
    refuse_wrapped,
    without_first_part,
    without_spare_layers,
)
from pessa_cli.blocks.site import ROPE, AttentionSite, head_order
from pessa_cli.blocks.spec import AttentionSpec, Tower
from pessa_cli.blocks.stored import check_floats, check_shapes, found_twice
from pessa_cli.blocks.table import ARCHITECTURES, TOWERS
from pessa_cli.checkpoint.dtypes import FLOATS
from pessa_cli.checkpoint.reader import Header
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed, shortened

KNOWN = (*ARCHITECTURES, *TOWERS)
MISFIT = "check that config.json belongs to these weights, or give the architecture with --as"
HEADS_WERE_CUT = (
    "some layers have fewer heads (pruned_heads in config.json), which transformers 5 cannot load: give the whole model"
)
LISTED = "`pessa architectures` lists the supported ones"


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
        return tuple(spec for spec in ARCHITECTURES[model_type] if spec.applies(config))
    if architecture is not None:
        raise UsageError(f"--as {architecture} is not a known architecture", LISTED)
    alike = [name for name, specs in ARCHITECTURES.items() if all(complete(spec, header) for spec in specs)]
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


def find_sites(specs: Iterable[AttentionSpec], config: Mapping[str, Any], header: Header) -> list[AttentionSite]:
    """Return every attention block in the header, ordered by kind and layer.

    Raises PessaError, which lists all faults, if projections are missing, have a shape that contradicts the config or
    are not floats, or if there are attention tensors that no row owns; also if the model has no attention block, or
    has an operation between W_V and W_O.
    """
    faults: list[str] = []
    sites: list[AttentionSite] = []
    owned: set[str] = set()
    ragged = ragged_modules(config)
    ragged_names = ModuleNames(ragged)
    most = most_entries(header)
    refuse_wrapped(header)
    specs = without_first_part(tuple(specs), header)
    header = without_spare_layers(specs, config, header)
    found = places(specs, header)
    beside = _tensors_within({place.parent for place in found}, header)
    for spec in specs:
        refused = [key for key in spec.refused if value(config, spec, (key,))]
        if refused:
            raise PessaError(
                f"config.json sets {refused[0]}, an operation between W_V and W_O that prevents merging them",
                "pessa cannot prune this model",
            )
    try:
        faults += layer_faults(specs, config, header)
    except PessaError as error:
        faults.append(error.message)
    for place in found:
        spec, modules = place.spec, place.modules
        owned |= {f"{modules[side]}.{part}" for side in "qkvo" for part in ("weight", "bias")}
        rests = beside[place.parent]
        owned |= {f"{place.parent}.{rest}" for rest in rests if matches_any(rest, (*spec.beside, *spec.norms))}
        missing = [f"{modules[side]}.weight: missing" for side in "qkvo" if f"{modules[side]}.weight" not in header]
        faults += dict.fromkeys(missing)
        if missing:
            continue
        entries = {side: ragged.get(ragged_names.find(module) or "") for side, module in modules.items()}
        there = [norm.partition(".")[0] for norm in spec.norms if any(matches_any(rest, (norm,)) for rest in rests)]
        between = there[0] if there else "norms" * spec.normed
        try:
            sites.append(_site(spec, place.layer, modules, config, header, entries, most, between))
        except PessaError as error:
            faults.append(error.message)
    faults += found_twice(sites)
    scopes = {parent(site.q) for site in sites}
    elsewhere = tuple(end for spec in specs for end in spec.elsewhere)
    for name, info in header.items():
        within = any(name[: dot.start()] in scopes for dot in re.finditer(r"\.", name))
        matrix = len(info.shape) > 1 and re.search(r"attn|attention", name) is not None
        if (within or matrix) and name not in owned and not any(f".{name}".endswith(f".{end}") for end in elsewhere):
            faults.append(f"{name}: no row of the architecture owns this attention tensor")
    if faults and found:
        raise PessaError(
            f"{len(faults)} attention tensors do not fit {model_type_of(config)}\n{listed(faults)}",
            HEADS_WERE_CUT if config.get("pruned_heads") else MISFIT,
        )
    if not sites:
        raise PessaError(
            f"found no attention block with the tensor names of {model_type_of(config)}",
            MISFIT,
        )
    return sites


def _tensors_within(scopes: set[str], header: Header) -> dict[str, list[str]]:
    """Map each of these modules to the names, relative to it, of all tensors within it."""
    rests: dict[str, list[str]] = defaultdict(list)
    for name in header:
        for dot in re.finditer(r"\.", name):
            if name[: dot.start()] in scopes:
                rests[name[: dot.start()]].append(name[dot.end() :])
    return rests


def _head_dim(
    spec: AttentionSpec, config: Mapping[str, Any], module: str, shape: tuple[int, ...], slots: int, heads: int
) -> int:
    """Return the size of each head by config.json. Raises PessaError if W_Q, of this shape, has other rows.

    slots: how many heads W_Q has, with those of W_K and W_V if they are fused. Fewer rows than config.json needs are
    as many narrower heads or fewer heads of the same size, which compute different things.
    """
    rows, width = shape
    head_dim = value(config, spec, spec.head_dim)
    if head_dim is None and rows != slots * (width // heads):
        head_dim = default(config, spec, spec.head_dim)
    if head_dim is None:
        head_dim = width // heads
    if not isinstance(head_dim, int) or isinstance(head_dim, bool):
        raise PessaError(f"config.json: {in_config(config, spec, spec.head_dim)} is {shortened(head_dim)}, not a size")
    if rows != slots * head_dim:
        raise PessaError(
            f"{module}.weight: the file has {rows} rows, but {slots} heads of {head_dim} need {slots * head_dim}"
        )
    return head_dim


def model_type_of(config: Mapping[str, Any]) -> str:
    """Return the `model_type` of config.json, as it is written in messages."""
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
) -> AttentionSite:
    """Build the site of one block.

    `entries` are its ragged projections, `most` is the largest allowed number of entries at full size, and `between`
    names the operation that prevents merging any direction of Q-K, if there is one.
    Raises PessaError if config, shapes, dtypes and ranks contradict each other.
    """
    heads, kv_heads = head_counts(config, spec)
    biases = frozenset(side for side, module in modules.items() if f"{module}.bias" in header)
    tensors = [*(f"{module}.weight" for module in modules.values()), *(f"{modules[side]}.bias" for side in biases)]
    check_floats(tensors, header)
    known = [entry.head_dim for entry in entries.values() if entry is not None]
    orders = {side: head_order(spec, side, kv_heads, heads // kv_heads) for side in "qkvo"}
    shapes = {
        side: header[f"{module}.weight"].shape[:: -1 if spec.transposed else 1] for side, module in modules.items()
    }
    head_dim = known[0] if known else _head_dim(spec, config, modules["q"], shapes["q"], len(orders["q"]), heads)

    def ranks(side: str) -> Ranks:
        entry = entries[side]
        if entry is None:
            return (head_dim,) * kv_heads
        return tuple(rank for rank, (letter, _) in zip(entry.ranks, orders[side], strict=False) if letter == side)

    unmerged = head_dim if between else rotated_directions(config, spec, layer, head_dim)
    site = AttentionSite(
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
        biases=biases,
        dtype=max((header[name].dtype for name in tensors), key=FLOATS.index),
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
        raise PessaError(f"{parent(modules['q'])}: the widths of its inputs and output differ: {widths}")
    if min(site.query_width, site.key_width) < 1:
        raise PessaError(f"{parent(modules['q'])}: its inputs have width zero")
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
    check_shapes(site, header, most, f"{heads} heads of {head_dim} ({kv_heads} for keys and values)")
    if {side: entry for side, entry in entries.items() if entry} != {
        side: entry for side in "qkvo" for entry in [site.ragged().get(modules[side])] if entry
    }:
        raise PessaError(f"{site.q}: the ranks that config.json gives q, k, v and o contradict each other")
    return site
