"""Discovery of the MLPs of a checkpoint, found by matching its header with their rows of the architecture table.

Every matrix of a layer must belong to attention or to a row of an MLP, and so must every tensor in a module of an MLP.
A tensor that no row owns, a missing tensor and a tensor of the wrong shape are errors, and all of them are reported at
once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pessa_cli.blocks.compact_format import ModuleNames, Ragged
from pessa_cli.blocks.config_values import default, in_config, number, value
from pessa_cli.blocks.discover import MISFIT, model_type_of
from pessa_cli.blocks.locate import (
    Location,
    in_layers,
    layer_faults,
    matches_any,
    most_entries,
    parent,
    places,
    without_first_part,
    without_spare_layers,
)
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_spec import MlpSpec
from pessa_cli.blocks.mlp_table import MLPS, TOWER_MLPS
from pessa_cli.blocks.spec import AttentionSpec, BlockSpec
from pessa_cli.blocks.stored import check_floats, check_shapes, found_twice
from pessa_cli.blocks.table import TOWERS
from pessa_cli.checkpoint.dtypes import FLOATS
from pessa_cli.checkpoint.reader import Header
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened

MOST_CHANNELS = 99_999  # more do not fit into an entry of `quantization_config`
MOST_RATIO = 64
ACTIVATIONS = (  # the keys of config.json that name the activation of MLPs
    *("hidden_act", "activation_function", "hidden_activation", "activation", "feed_forward_proj", "act_fn"),
    *("encoder_hidden_act", "decoder_hidden_act"),
)
NOT_ZERO_AT_ZERO = re.compile("(.*-)?(sigmoid|laplace|sqrtsoftplus|softplus)")  # names of activations
ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def mlp_specs_of(config: Mapping[str, Any], architecture: str | None = None) -> tuple[MlpSpec, ...]:
    """Return the table's rows of MLPs for a model, by its `model_type` or by `architecture`, the user's --as.

    The model type must be one that `specs_of` accepts.
    """
    model_type = architecture or config["model_type"]
    if model_type not in TOWERS:
        return tuple(spec for spec in MLPS[model_type] if spec.applies(config))
    own = TOWER_MLPS.get(model_type, {})
    return tuple(
        spec
        for tower in TOWERS[model_type]
        for spec in tower.specs(own.get(tower.kind) or mlp_specs_of(config[tower.config]))
    )


def find_mlps(
    specs: Sequence[MlpSpec],
    config: Mapping[str, Any],
    header: Header,
    ragged: Mapping[str, Ragged],
    attention: Sequence[AttentionSpec],
) -> list[MlpSite]:
    """Return every MLP in the header, ordered by row and layer. Routed experts are none.

    ragged: the entries of `quantization_config` by module name. attention: the model's rows of attention, which tell a
    decoder that was saved alone from an encoder. Raises PessaError, which lists all faults, if tensors
    are missing, have a shape that contradicts the config or are not floats, if one matrix of a gated MLP has a bias and
    the other has none, or if the layers have tensors that no row owns.
    """
    rows: Sequence[BlockSpec] = without_first_part((*attention, *specs), header)
    specs = [row for row in rows if isinstance(row, MlpSpec)]
    header = without_spare_layers(specs, config, header)
    found = places(specs, header)
    names, most = ModuleNames(ragged), most_entries(header)
    sites: list[MlpSite] = []
    try:
        faults = layer_faults(specs, config, header)
    except PessaError as error:
        faults = [error.message]
    for place in found:
        missing = [f"{name}.weight" for name in place.modules.values() if f"{name}.weight" not in header]
        faults += [f"{name}: missing" for name in missing]
        if missing:
            continue
        entries = {name: ragged.get(names.find(name) or "") for name in place.modules.values()}
        try:
            sites.append(_site(place, config, header, entries, most))
        except PessaError as error:
            faults.append(error.message)
    faults += [*found_twice(sites), *_layers_without(specs, found, header), *_foreign(specs, found, header)]
    if faults:
        faults = list(dict.fromkeys(faults))
        raise PessaError(f"{len(faults)} MLP tensors do not fit {model_type_of(config)}\n{listed(faults)}", MISFIT)
    if not sites and any(spec.out for spec in specs):
        raise PessaError(f"found no MLP with the tensor names of {model_type_of(config)}", MISFIT)
    return sites


def routed_experts(specs: Sequence[MlpSpec], header: Header) -> list[str]:
    """Return a line for each row of which the header has routed experts, whose channels cannot be cut yet."""
    return [
        f"{spec.kind}: {spec.form}"
        for spec in specs
        if any(matches_any(name, tuple(f"*.{pattern}" for pattern in spec.routed)) for name in header)
    ]


def _site(
    place: Location[MlpSpec],
    config: Mapping[str, Any],
    header: Header,
    entries: Mapping[str, Ragged | None],
    most: int,
) -> MlpSite:
    """Build the site of one MLP; `most` is the largest allowed number of entries at full size.

    Raises PessaError if config, shapes, dtypes and stored channels contradict each other.
    """
    spec = place.spec
    *into, out = place.modules.values()
    biases = frozenset(name for name in (*into, out) if f"{name}.bias" in header)
    tensors = [*(f"{name}.weight" for name in (*into, out)), *(f"{name}.bias" for name in sorted(biases))]
    check_floats(tensors, header)
    if biases and len(biases & {*into}) not in (0, len(into)):
        has, lacks = (name for name in sorted(into, key=lambda name: name not in biases))
        raise PessaError(f"{has}.bias: {lacks} has no bias, and {spec.form} MLPs have both or none")
    shapes = {name: header[f"{name}.weight"].shape for name in (*into, out)}
    if spec.transposed:
        shapes = {name: shape[::-1] for name, shape in shapes.items()}
    rows, input_width = shapes[into[0]]
    output_width, columns = shapes[out]
    if input_width != output_width or input_width < 1:
        raise PessaError(f"{out}: the MLP has inputs of width {input_width} and outputs of width {output_width}")
    declared, key = _channels(spec, config, input_width)
    known = next((entry for entry in entries.values() if entry is not None), None)
    width = known.head_dim if known else declared or columns
    site = MlpSite(
        spec=spec,
        layer=place.layer,
        into=tuple(into),
        out=out,
        width=width,
        input_width=input_width,
        output_width=output_width,
        kept=known.ranks[0] if known else width,
        biases=biases,
        dtype=max((header[name].dtype for name in tensors), key=FLOATS.index),
        zero_at_zero=not any(NOT_ZERO_AT_ZERO.fullmatch(str(value(config, spec, (key,)))) for key in ACTIVATIONS),
    )
    if declared is not None and width != declared:
        raise PessaError(f"{out}: the file was cut from {width} channels, but config.json has {declared} ({key})")
    if site.kept < 1:
        raise PessaError(f"{out}: config.json stores {site.kept} channels of it; an MLP has at least one")
    if {name: entry for name, entry in entries.items() if entry} != site.ragged():
        raise PessaError(f"{out}: the numbers of channels that config.json gives its matrices contradict each other")
    if columns != site.kept and rows == spec.parts * columns:
        where = "quantization_config" if known else key
        raise PessaError(f"{out}: the file has {columns} channels, but config.json {site.kept} ({where})")
    check_shapes(site, header, most, f"{site.kept} channels of {input_width} inputs")
    return site


def _channels(spec: MlpSpec, config: Mapping[str, Any], input_width: int) -> tuple[int | None, str]:
    """Return the number of channels by config.json, None if it does not tell, and where config.json gives it.

    Raises PessaError if the value is no number of channels or no ratio.
    """
    found = number(config, spec, spec.width, "number of channels", MOST_CHANNELS) if spec.width else None
    if found is not None:
        return found, in_config(config, spec, spec.width)
    ratio: Any = spec.ratio
    key = f"{ratio} times the width"
    if isinstance(spec.ratio, tuple):
        ratio = value(config, spec, spec.ratio) or default(config, spec, spec.ratio)
        key = in_config(config, spec, spec.ratio) if spec.ratio else ""
    if ratio is None:
        return None, ""
    if not isinstance(ratio, (int, float)) or isinstance(ratio, bool) or not 1 / input_width <= ratio <= MOST_RATIO:
        raise PessaError(f"config.json: {key} is {shortened(ratio)}, not a ratio from 1/{input_width} to {MOST_RATIO}")
    channels = int(input_width * ratio)
    return (int(channels * 2 / 3) + 7) // 8 * 8 if spec.two_thirds else channels, key


def _in_layers(
    spec: MlpSpec, found: Sequence[Location[MlpSpec]], header: Header
) -> Iterator[tuple[str, int, list[str]]]:
    """Yield (prefix, layer, names of its tensors relative to the layer) for each layer with attention or an MLP."""
    there = {(place.prefix, place.layer) for place in found if place.spec == spec}
    for (prefix, layer), rests in in_layers(spec, spec.layer, header).items():
        if (prefix, layer) in there or any(ATTENTION.search(rest) for rest in rests):
            yield prefix, layer, rests


def _layers_without(specs: Sequence[MlpSpec], found: Sequence[Location[MlpSpec]], header: Header) -> Iterator[str]:
    """Yield a fault for each layer that has no MLP of a row, nor routed experts in place of it."""
    there = {(place.spec, place.prefix, place.layer) for place in found}
    for spec in specs:
        for prefix, layer, rests in _in_layers(spec, found, header):
            routed = any(matches_any(rest, spec.routed) for rest in rests)
            if not (routed or spec.sparse or (spec, prefix, layer) in there):
                yield f"{prefix}{spec.stem}{layer}: this layer has no {spec.title}"


def _foreign(specs: Sequence[MlpSpec], found: Sequence[Location[MlpSpec]], header: Header) -> Iterator[str]:
    """Yield a fault for each tensor of the layers that is neither attention's nor that of a row.

    Vectors beside the modules of the MLPs are norms, scales and the like, and are no fault.
    """
    owned = {f"{name}.{part}" for place in found for name in place.modules.values() for part in ("weight", "bias")}
    for spec in specs:
        scopes = tuple(f"{parent(name) or name}." for name in (*spec.into, spec.out))
        for prefix, layer, rests in _in_layers(spec, found, header):
            for rest in rests:
                name = f"{prefix}{spec.layer.replace('{i}', str(layer))}.{rest}"
                inside = rest.startswith(scopes) or len(header[name].shape) > 1
                if inside and not (
                    name in owned or ATTENTION.search(rest) or matches_any(rest, (*spec.beside, *spec.routed))
                ):
                    yield f"{name}: no row of the architecture owns this tensor of a layer"
