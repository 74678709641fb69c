"""Conversion between the tensors of a block in a file and its weights in the canonical form, without changing a bit.

Files store the heads of attention one after the other, as rows of W_Q, W_K and W_V and as columns of W_O; and the
channels of an MLP as rows of the matrices that write them and as columns of the one that reads them. A compact file
stores only the kept directions of each head and the kept channels. A "slot" is the row or column of one direction or
channel if all of them were stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, overload

import torch
from torch import Tensor

from pessa_cli.algebra.channels import ChannelWeights, Weights
from pessa_cli.algebra.heads import HeadWeights, all_finite, live
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.checkpoint.dtypes import TORCH_DTYPES
from pessa_cli.checkpoint.reader import CheckpointReader, Header
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed

StorageLayout = Literal["compact", "dense"]


@overload
def read_site(reader: CheckpointReader, site: AttentionSite) -> HeadWeights: ...


@overload
def read_site(reader: CheckpointReader, site: MlpSite) -> ChannelWeights: ...


@overload
def read_site(reader: CheckpointReader, site: Site) -> Weights: ...


def read_site(reader: CheckpointReader, site: Site) -> Weights:
    """Read a block's weights in the canonical form and the dtypes of the file; what was cut is zero.

    Raises NotFiniteError when an entry is NaN or infinite.
    """
    stored = {name: reader.get(name) for name in site.tensors}
    faults = [
        f"{name}: {int(tensor.isnan().sum())} NaN, {int(tensor.isinf().sum())} infinite"
        for name, tensor in stored.items()
        if not all_finite(tensor)
    ]
    if faults:
        raise NotFiniteError(reader, faults)
    if isinstance(site, MlpSite):
        return _channels(stored, site)
    assert isinstance(site, AttentionSite)
    return _heads(stored, site)


def _channels(stored: Mapping[str, Tensor], site: MlpSite) -> ChannelWeights:
    """Return the canonical form of the stored tensors of an MLP."""

    def slots(letter: str, part: str) -> Tensor:
        tensor = stored[f"{site.module(letter)}.{part}"]
        if site.spec.transposed and part == "weight":
            tensor = tensor.mT
        if site.kept == site.width:
            return tensor
        axis, index = _live(site, letter)
        places = list(tensor.shape)
        places[axis] = site.width * (1 if letter == "out" else site.spec.parts)
        return tensor.new_zeros(places).index_copy_(axis, index, tensor)

    writers = [letter for letter in site.modules if letter != "out"]
    biased = site.module(writers[0]) in site.biases
    shape = (-1, site.width)
    return ChannelWeights(
        into=torch.cat([slots(letter, "weight").reshape(*shape, site.input_width) for letter in writers]),
        out=slots("out", "weight"),
        into_bias=torch.cat([slots(letter, "bias").reshape(shape) for letter in writers]) if biased else None,
        out_bias=stored[f"{site.out}.bias"] if site.out in site.biases else None,
    )


def _heads(stored: Mapping[str, Tensor], site: AttentionSite) -> HeadWeights:
    """Return the canonical form of the stored tensors of an attention block."""
    g, m, d = site.kv_heads, site.group, site.head_dim

    def slots(letter: str, part: str) -> Tensor:
        tensor = stored[f"{site.module(letter)}.{part}"]
        if site.spec.transposed and part == "weight":
            tensor = tensor.mT
        ranks = site.stored(letter)
        if min(ranks) < d:
            axis, index = _live(site, letter)
            places = list(tensor.shape)
            places[axis] = len(ranks) * d
            tensor = tensor.new_zeros(places).index_copy_(axis, index, tensor)
        return tensor

    def side(letter: str, *shape: int, part: str = "weight") -> Tensor:
        tensor = slots(letter, part)
        if site.spec.fused and letter != "o":
            tensor = split_fused(tensor, site)[letter]
        return tensor.reshape(shape)

    def bias(letter: str, *shape: int) -> Tensor | None:
        return side(letter, *shape, part="bias") if letter in site.biases else None

    return HeadWeights(
        q=side("q", g, m, d, site.query_width),
        k=side("k", g, d, site.key_width),
        v=side("v", g, d, site.key_width),
        o=side("o", site.output_width, g, m, d),
        q_bias=bias("q", g, m, d),
        k_bias=bias("k", g, d),
        v_bias=bias("v", g, d),
        o_bias=stored[f"{site.o}.bias"] if "o" in site.biases else None,
    )


def write_site(weights: Weights, site: Site, header: Header, layout: StorageLayout) -> dict[str, Tensor]:
    """Return the tensors of a block by their names in the file, cut to what `site` keeps.

    layout: "dense" keeps the original shapes, with zeros in the cut directions; "compact" stores only the kept
    directions. Each tensor is rounded to the dtype that `header` gives for its name. With the site as it is stored in
    the file this is the inverse of `read_site`. Raises PessaError when a value overflows in its dtype.
    """
    tensors: dict[str, Tensor] = {}
    letters = {module: letter for letter, module in reversed(list(site.modules.items()))}  # the first of a fused tensor
    for name, tensor in _in_slots(weights, site).items():
        rounded = tensor.to(getattr(torch, TORCH_DTYPES[header[name].dtype]))
        module, _, part = name.rpartition(".")
        if (letters[module], part) != (site.last, "bias"):
            axis, index = _live(site, letters[module])
            kept = rounded.index_select(axis, index)
            rounded = kept if layout == "compact" else torch.zeros_like(rounded).index_copy_(axis, index, kept)
        if not all_finite(rounded):
            raise PessaError(
                f"{name} would overflow: its values become too large for {header[name].dtype}",
                "convert the model to float32 or bfloat16 first",
            )
        tensors[name] = (rounded.mT if site.spec.transposed and part == "weight" else rounded).contiguous()
    return tensors


def _live(site: Site, side: str) -> tuple[int, Tensor]:
    """Return the axis of the slots of a module's tensor, and the indices of the kept ones among them."""
    axis = 1 if side == site.last else 0
    if isinstance(site, MlpSite):
        return axis, live((site.kept,) * (1 if axis else site.spec.parts), site.width)
    assert isinstance(site, AttentionSite)
    repeats = site.group if side == "q" else 1
    pairs = None if site.pairs is None or side not in "qk" else [p for p in site.pairs for _ in range(repeats)]
    return axis, live(site.stored(side), site.head_dim, pairs=pairs)


def _in_slots(weights: Weights, site: Site) -> dict[str, Tensor]:
    """Return the block's tensors with all slots, by their names in the file."""
    if isinstance(weights, ChannelWeights):
        assert isinstance(site, MlpSite)
        return _channel_slots(weights, site)
    assert isinstance(site, AttentionSite)
    by_side: dict[str, Tensor | None] = {
        **{f"{side}.weight": getattr(weights, side) for side in "qkv"},
        **{f"{side}.bias": getattr(weights, f"{side}_bias") for side in "qkv"},
    }
    flat = {f"{site.o}.weight": weights.o.flatten(1), f"{site.o}.bias": weights.o_bias}
    for part in ("weight", "bias"):
        q, k, v = (by_side[f"{side}.{part}"] for side in "qkv")
        if site.spec.fused and q is not None and k is not None and v is not None:
            flat[f"{site.q}.{part}"] = _fused(q, k, v, site)
            continue
        for side, tensor in (("q", q), ("k", k), ("v", v)):
            axes = 3 if side == "q" else 2
            flat[f"{site.module(side)}.{part}"] = None if tensor is None else tensor.flatten(0, axes - 1)
    return {name: tensor for name, tensor in flat.items() if tensor is not None}


def _channel_slots(weights: ChannelWeights, site: MlpSite) -> dict[str, Tensor]:
    """Return the tensors of an MLP with the slots of all channels, by their names in the file."""
    flat: dict[str, Tensor | None] = {f"{site.out}.weight": weights.out, f"{site.out}.bias": weights.out_bias}
    for number, module in enumerate(site.into):
        own = slice(number * site.spec.parts, (number + 1) * site.spec.parts)
        flat[f"{module}.weight"] = weights.into[own].flatten(0, 1)
        flat[f"{module}.bias"] = None if weights.into_bias is None else weights.into_bias[own].flatten()
    return {name: tensor for name, tensor in flat.items() if tensor is not None}


def _fused(q: Tensor, k: Tensor, v: Tensor, site: AttentionSite) -> Tensor:
    """Concatenate q (G, M, d, ...), k and v (G, d, ...) in the order of heads of a fused tensor."""
    if site.spec.fused == "grouped":
        return torch.cat([q, k.unsqueeze(1), v.unsqueeze(1)], 1).flatten(0, 2)
    return torch.cat([q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)])


def split_fused(slots: Tensor, site: AttentionSite) -> dict[str, Tensor]:
    """Split the slots of a fused tensor, (slots, ...), into q, k and v: the inverse of `_fused`."""
    g, m, d = site.kv_heads, site.group, site.head_dim
    if site.spec.fused == "grouped":
        q, k, v = torch.split(slots.reshape(g, m + 2, d, *slots.shape[1:]), [m, 1, 1], 1)
    else:
        q, k, v = torch.split(slots, [g * m * d, g * d, g * d])
    return {"q": q, "k": k, "v": v}


class NotFiniteError(PessaError):
    """Raised for weights that are NaN or infinite.

    faults: a line for each such tensor, so that the errors of several blocks can be reported together.
    """

    def __init__(self, reader: CheckpointReader, faults: list[str]) -> None:
        super().__init__(
            f"{len(faults)} tensors of {reader.folder} are not finite\n{listed(faults)}",
            "the checkpoint is damaged; download it again",
        )
        self.reader = reader
        self.faults = faults
