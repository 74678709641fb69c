"""From a table row and a header to sites: the attention blocks a checkpoint really has, with their shapes.

The world is closed: an attention tensor that no row owns, a tensor of the wrong shape or a missing one is an
error, and all of them are reported at once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from pessa_cli.architectures import ARCHITECTURES, AttentionSpec
from pessa_cli.checkpoint import Header
from pessa_cli.errors import PessaError, UsageError, listed
from pessa_cli.ragged import ModuleNames, Pairs, Ragged, Ranks, pair_ranks, ragged_modules, shortened

FLOATS = ("F64", "F32", "F16", "BF16")  # from the finest rounding to the coarsest
MOST_HEADS = 4096
# A compact block is worked on at full size, of which its file may hold next to nothing. More than this many times
# what the whole checkpoint holds, and more than the second number of entries, is no model but an attack on memory.
MOST_GROWTH, ALWAYS_FINE = 64, 2**24


@dataclass(frozen=True)
class Site:
    """One attention block of one checkpoint.

    `q`, `k`, `v`, `o` are module names as in the file; `query_width`, `key_width` and `output_width` are the
    widths D of what goes in and comes out. `qk_ranks` and `vo_ranks` say how many directions the file stores for
    each key/value head: `head_dim` everywhere in a dense file, less in a compact one. `pairs`: under RoPE, where Q-K
    stores less, the frequency pairs that it stores for each key/value head.
    """

    spec: AttentionSpec
    layer: int
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    query_width: int
    key_width: int
    output_width: int
    biases: frozenset[str]  # the letters of the projections that have one
    dtype: str  # of its weights and biases; the coarsest, should they differ
    qk_ranks: Ranks
    vo_ranks: Ranks
    pairs: tuple[Pairs, ...] | None = None

    @property
    def name(self) -> str:
        """Short and unique within a model: "encoder.self.3"."""
        return f"{self.spec.kind}.{self.layer}"

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.heads // self.kv_heads

    @property
    def merges_qk(self) -> bool:
        return not self.spec.rope

    @property
    def full(self) -> Ranks:
        return (self.head_dim,) * self.kv_heads

    def module(self, side: str) -> str:
        return {"q": self.q, "k": self.k, "v": self.v, "o": self.o}[side]

    def shapes(self, qk_ranks: Ranks, vo_ranks: Ranks) -> dict[str, tuple[int, ...]]:
        """The names and shapes of this site's tensors when just so many directions are stored."""
        q, k, v = self.group * sum(qk_ranks), sum(qk_ranks), sum(vo_ranks)
        o = self.group * v
        weights = {
            "q": (q, self.query_width),
            "k": (k, self.key_width),
            "v": (v, self.key_width),
            "o": (self.output_width, o),
        }
        shapes: dict[str, tuple[int, ...]] = {}
        for side, shape in weights.items():
            shapes[f"{self.module(side)}.weight"] = shape
            if side in self.biases:
                shapes[f"{self.module(side)}.bias"] = shape[:1]
        return shapes

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The names and shapes of this site's tensors in its file."""
        return self.shapes(self.qk_ranks, self.vo_ranks)


def specs_of(config: Mapping[str, Any], header: Header, architecture: str | None = None) -> tuple[AttentionSpec, ...]:
    """The table's rows for a model, by its `model_type` or by the name the user gave with --as."""
    model_type = architecture or config.get("model_type")
    if isinstance(model_type, str) and model_type in ARCHITECTURES:
        return ARCHITECTURES[model_type]
    if architecture is not None:
        raise UsageError(f"--as {architecture} is no known architecture", f"known are {', '.join(ARCHITECTURES)}")
    alike = [name for name, specs in ARCHITECTURES.items() if all(any(_complete(spec, header)) for spec in specs)]
    what = f"model_type {shortened(model_type)} is not supported" if model_type else "config.json names no model_type"
    known = f"supported are {', '.join(ARCHITECTURES)}"
    if alike:
        known += f"; its tensors are named as in {alike[0]}, so if it is built alike, try --as {alike[0]}"
    raise PessaError(what, known)


def find_sites(specs: Iterable[AttentionSpec], config: Mapping[str, Any], header: Header) -> list[Site]:
    """Every attention block in the header, kind by kind and layer by layer.

    Raises PessaError with all faults at once: projections missing, of a shape that the config contradicts or of
    a dtype that holds no floats, and attention tensors that no row owns.
    """
    faults: list[str] = []
    sites: list[Site] = []
    owned: set[str] = set()
    ragged = ragged_modules(config)
    ragged_names = ModuleNames(ragged)
    most = max(ALWAYS_FINE, MOST_GROWTH * sum(info.count for info in header.values()))
    known = False
    for spec in specs:
        faults += [f"{module}: a layer without its {spec.kind} attention" for module in _gaps(spec, header)]
        for layer, modules in _layers(spec, header):
            known = True
            owned |= {f"{modules[side]}.{part}" for side in "qkvo" for part in ("weight", "bias")}
            scope = modules["q"].rpartition(".")[0]
            owned |= {f"{scope}.{name}" for name in spec.beside}
            missing = [f"{modules[side]}.weight: missing" for side in "qkvo" if f"{modules[side]}.weight" not in header]
            faults += missing
            if missing:
                continue
            entries = {side: ragged.get(ragged_names.find(module) or "") for side, module in modules.items()}
            try:
                sites.append(_site(spec, layer, modules, config, header, entries, most))
            except PessaError as error:
                faults.append(error.message)
    named: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        named[site.name].append(site.q)
    faults += [f"{name} is there twice: {' and '.join(qs[:8])}" for name, qs in named.items() if len(qs) > 1]
    scopes = {site.q.rpartition(".")[0] for site in sites}
    for name, info in header.items():
        inside = any(name[: dot.start()] in scopes for dot in re.finditer(r"\.", name))
        matrix = len(info.shape) > 1 and re.search(r"attn|attention", name) is not None
        if (inside or matrix) and name not in owned:
            faults.append(f"{name}: no row of the architecture owns this attention tensor")
    if faults and known:
        raise PessaError(
            f"{len(faults)} attention tensors do not fit {_model_type(config)}\n{listed(faults)}",
            "check config.json against the weights, or give the architecture with --as",
        )
    if not sites:
        raise PessaError(
            f"no attention block found that is named as in {_model_type(config)}",
            "check that config.json belongs to these weights, or give the architecture with --as",
        )
    return sites


def select(sites: list[Site], kinds: tuple[str, ...] = (), layers: frozenset[int] | None = None) -> list[Site]:
    """The sites of the given kinds and layers; no kinds means all, None means every layer."""
    known = list(dict.fromkeys(site.spec.kind for site in sites))
    unknown = [kind for kind in kinds if kind not in known]
    if unknown:
        raise UsageError(f"--sites {unknown[0]}: this model has no such block", f"it has {', '.join(known)}")
    top = max(site.layer for site in sites)
    if layers is not None and max(layers) > top:
        raise UsageError(f"--layers {max(layers)}: the model's last layer is {top}", f"give layers from 0 to {top}")
    chosen = [
        site for site in sites if (not kinds or site.spec.kind in kinds) and (layers is None or site.layer in layers)
    ]
    if not chosen:
        raise UsageError("--sites and --layers together choose no block", f"the model's last layer is {top}")
    return chosen


def ragged_site(site: Site) -> dict[str, Ragged]:
    """The entries of `modules` for one site, by module name; only for those that are not full."""
    entries: dict[str, Ragged] = {}
    for ranks, rows, columns in ((site.qk_ranks, "qk", ""), (site.vo_ranks, "v", "o")):
        if ranks == site.full:
            continue
        each = tuple(rank for rank in ranks for _ in range(site.group))
        for side in rows:
            if side != "v" and site.pairs is not None:
                repeats = site.group if side == "q" else 1
                pairs = tuple(runs for runs in site.pairs for _ in range(repeats))
                entries[site.module(side)] = Ragged.of_pairs(site.head_dim, pairs)
            else:
                entries[site.module(side)] = Ragged("rows", site.head_dim, each if side == "q" else ranks)
        for side in columns:
            entries[site.module(side)] = Ragged("columns", site.head_dim, each)
    return entries


def _layers(spec: AttentionSpec, header: Header) -> Iterator[tuple[int, dict[str, str]]]:
    """The layers that have any of the row's projections, with the module names of all four under the same prefix."""
    for prefix, layer in _found(spec, header):
        names = {"q": spec.q, "k": spec.k, "v": spec.v, "o": spec.o}
        yield layer, {side: prefix + name.replace("{i}", str(layer)) for side, name in names.items()}


def _found(spec: AttentionSpec, header: Header) -> list[tuple[str, int]]:
    """The prefixes and layers that have any of the row's projections."""
    patterns = (spec.q, spec.k, spec.v, spec.o)
    return sorted({place for pattern in patterns for place in _places(f"{pattern}.weight", header)})


def _gaps(spec: AttentionSpec, header: Header) -> list[str]:
    """The layers that are there, but have none of the row's projections, beside layers that do."""
    found = _found(spec, header)
    prefixes = {prefix for prefix, _ in found}
    stem = spec.q.partition("{i}")[0]
    there = {place for place in _places(f"{stem}{{i}}.", header) if place[0] in prefixes}
    return [f"{prefix}{stem}{layer}" for prefix, layer in sorted(there.difference(found))]


def _places(pattern: str, header: Header) -> Iterator[tuple[str, int]]:
    """Prefix and layer of each name that the pattern describes: to its end, or with more behind a final dot."""
    before, after = (re.escape(part) for part in pattern.split("{i}"))
    regex = re.compile(rf"((?:.*\.)?){before}(0|[1-9][0-9]{{0,4}}){after}{'.*' if pattern.endswith('.') else ''}")
    for name in header:
        if match := regex.fullmatch(name):
            yield match[1], int(match[2])


def _complete(spec: AttentionSpec, header: Header) -> Iterator[bool]:
    """For each layer of the row whether all of its projections are there."""
    for _, modules in _layers(spec, header):
        yield all(f"{module}.weight" in header for module in modules.values())


def _head_count(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_HEADS:
        raise PessaError(f"config.json: {key} is {shortened(value)}, not a number of heads")
    return value


def _model_type(config: Mapping[str, Any]) -> str:
    model_type = config.get("model_type")
    return model_type if model_type in ARCHITECTURES else shortened(model_type)


def _site(
    spec: AttentionSpec,
    layer: int,
    modules: Mapping[str, str],
    config: Mapping[str, Any],
    header: Header,
    entries: Mapping[str, Ragged | None],
    most: int,
) -> Site:
    """One block. Raises PessaError where config, shapes, dtypes and ranks contradict each other."""
    heads = _head_count(config, spec.heads)
    kv_heads = heads
    if spec.kv_heads is not None and config.get(spec.kv_heads) is not None:
        kv_heads = _head_count(config, spec.kv_heads)
    if heads % kv_heads:
        raise PessaError(f"config.json: {heads} heads cannot share {kv_heads} key/value heads evenly")
    weights = {side: header[f"{module}.weight"] for side, module in modules.items()}
    for side, info in weights.items():
        if len(info.shape) != 2 or info.dtype not in FLOATS:
            raise PessaError(f"{modules[side]}.weight: a matrix of floats is expected, found {info.dtype} {info.shape}")
    biases = {side: header[f"{m}.bias"] for side, m in modules.items() if f"{m}.bias" in header}
    for side, info in biases.items():
        if info.dtype not in FLOATS:
            raise PessaError(f"{modules[side]}.bias: stored as {info.dtype}, not as floats")
    known = [entry.head_dim for entry in entries.values() if entry is not None]
    head_dim = known[0] if known else weights["q"].shape[0] // heads
    stored = (head_dim,) * kv_heads
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
        query_width=weights["q"].shape[1],
        key_width=weights["k"].shape[1],
        output_width=weights["o"].shape[0],
        biases=frozenset(biases),
        dtype=max((info.dtype for info in (*weights.values(), *biases.values())), key=FLOATS.index),
        qk_ranks=entries["k"].ranks if entries["k"] else stored,
        vo_ranks=entries["v"].ranks if entries["v"] else stored,
        pairs=entries["k"].pairs if entries["k"] else None,
    )
    if head_dim < 1 or not len(site.qk_ranks) == len(site.vo_ranks) == kv_heads:
        raise PessaError(f"{site.q}: config.json gives no ranks for just {kv_heads} key/value heads of {head_dim}")
    if site.query_width != site.output_width or ("self" in spec.kind and site.query_width != site.key_width):
        widths = f"W_Q {site.query_width}, W_K {site.key_width}, W_O {site.output_width}"
        raise PessaError(f"{modules['q'].rpartition('.')[0]}: the widths of its inputs and output differ: {widths}")
    if min(site.query_width, site.key_width) < 1:
        raise PessaError(f"{modules['q'].rpartition('.')[0]}: its inputs have no width")
    if spec.rope and head_dim % 2:
        raise PessaError(f"{site.q}: heads of {head_dim} directions have no pairs to rotate")
    if site.qk_ranks != site.full and (site.pairs is None) == spec.rope:
        known_as = "pairs, which only rotated ones have" if site.pairs else "ranks, but rotated ones are kept by pairs"
        raise PessaError(f"{site.q}: config.json gives queries and keys {known_as}")
    size = sum(math.prod(shape) for shape in site.shapes(site.full, site.full).values())
    if size > most:
        raise PessaError(f"{modules['q'].rpartition('.')[0]}: at full size it would have {size:,} entries")
    for name, shape in site.tensors.items():
        if header[name].shape != shape:
            raise PessaError(
                f"{name}: the file has shape {header[name].shape}, {heads} heads of {head_dim} "
                f"({kv_heads} for keys and values) need {shape}"
            )
    if {side: entry for side, entry in entries.items() if entry} != {
        side: entry for side in "qkvo" for entry in [ragged_site(site).get(modules[side])] if entry
    }:
        raise PessaError(f"{site.q}: config.json gives its projections ranks that do not fit each other")
    return site


def with_ranks(site: Site, qk_ranks: Ranks, vo_ranks: Ranks, pairs: tuple[Pairs, ...] | None = None) -> Site:
    """The same site as a compact file of those ranks, or with those pairs of Q-K, would store it."""
    if pairs is not None and pair_ranks(pairs) == site.full:
        pairs = None
    return replace(site, qk_ranks=qk_ranks, vo_ranks=vo_ranks, pairs=pairs)


def in_full(site: Site) -> Site:
    """The same site as a dense file stores it."""
    return with_ranks(site, site.full, site.full)
