"""Head weights: one canonical form for every file layout, and the way there and back, bit for bit.

Files store heads one after the other, as rows of W_Q, W_K, W_V and columns of W_O, and a compact file only the
directions each head has kept. The canonical form has an axis for key/value heads (G), one for the query heads
that share each of them (M), and always `head_dim` directions (d), zero where the file stores none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pessa_cli.checkpoint import TORCH_DTYPES, CheckpointReader, Header
from pessa_cli.errors import PessaError, listed
from pessa_cli.ragged import Pairs, Ranks
from pessa_cli.sites import Site

Layout = Literal["compact", "dense"]
PART_BYTES = 8 * 2**20  # of float64 weights at a time: what the processor's cache and the allocator can reuse


@dataclass(frozen=True)
class HeadWeights:
    """The weights of one attention block; widths are D_q and D_k going in, D_o coming out."""

    q: Tensor  # (G, M, d, D_q)
    k: Tensor  # (G, d, D_k)
    v: Tensor  # (G, d, D_k)
    o: Tensor  # (D_o, G, M, d)
    q_bias: Tensor | None = None  # (G, M, d)
    k_bias: Tensor | None = None  # (G, d)
    v_bias: Tensor | None = None  # (G, d)
    o_bias: Tensor | None = None  # (D_o,)

    def to(self, device: str) -> HeadWeights:
        """The same weights on another device."""
        moved: dict[str, Any] = {name: None if t is None else t.to(device) for name, t in self._tensors().items()}
        return HeadWeights(**moved)

    def _tensors(self) -> dict[str, Tensor | None]:
        return vars(self)

    def parts(self) -> Iterator[HeadWeights]:
        """The block a few key/value heads at a time, so that its float64 form need not fit in memory as a whole.

        How many depends on the shapes alone; each part has the whole output bias.
        """
        one = 8 * sum(tensor[0].numel() for tensor in (self.q, self.k, self.v)) + 8 * self.o[:, 0].numel()
        step = max(1, PART_BYTES // one)
        for start in range(0, len(self.v), step):
            cut = slice(start, start + step)
            by_head: dict[str, Any] = {
                name: None if tensor is None else tensor[cut]
                for name, tensor in self._tensors().items()
                if name not in ("o", "o_bias")
            }
            yield HeadWeights(**by_head, o=self.o[:, cut], o_bias=self.o_bias)


def joined(parts: list[HeadWeights], like: HeadWeights) -> HeadWeights:
    """The parts of a block in one again, each tensor in the dtype it has in `like`; the output bias is the last one."""

    def side(name: str, axis: int = 0) -> Any:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        whole = tensors[0] if len(tensors) == 1 else torch.cat(tensors, axis)
        return whole.to(getattr(like, name).dtype)

    letters = {name: side(name) for name in ("q", "k", "v", "q_bias", "k_bias", "v_bias")}
    return HeadWeights(**letters, o=side("o", axis=1), o_bias=parts[-1].o_bias)


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: both would be the smallest or the largest one."""
    return not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def live(ranks: Ranks, head_dim: int, repeats: int = 1, pairs: Sequence[Pairs] | None = None) -> Tensor:
    """Where the kept directions stand among `len(ranks) * repeats * head_dim` slots: (repeats * sum(ranks),).

    The first `rank` of each head, or those of its `pairs`.
    """
    if pairs is not None:
        kept = torch.zeros(len(pairs), head_dim // 2, dtype=torch.bool, device="cpu")
        for row, runs in zip(kept, pairs, strict=True):
            for run in runs:
                row[run.start : run.stop] = True
        return torch.cat([kept, kept], -1).repeat_interleave(repeats, 0).flatten().nonzero().squeeze(1)
    each = [rank for rank in ranks for _ in range(repeats)]
    # On the CPU even where a loader has made another device the default: these are facts, not weights.
    kept = torch.tensor(each, device="cpu").unsqueeze(1) > torch.arange(head_dim, device="cpu")
    return kept.flatten().nonzero().squeeze(1)


def read_site(reader: CheckpointReader, site: Site) -> HeadWeights:
    """The block's weights in the file's dtype. Raises PessaError when an entry is not finite."""
    stored = {name: reader.get(name) for name in site.tensors}
    faults = [
        f"{name}: {int(tensor.isnan().sum())} NaN, {int(tensor.isinf().sum())} infinite"
        for name, tensor in stored.items()
        if not all_finite(tensor)
    ]
    if faults:
        raise NotFiniteError(reader, faults)

    g, m, d = site.kv_heads, site.group, site.head_dim

    def slots(letter: str, part: str) -> Tensor:
        tensor = stored[f"{site.module(letter)}.{part}"]
        if site.spec.transposed and part == "weight":
            tensor = tensor.mT
        ranks = site.stored(letter)
        if min(ranks) < d:
            axis = 1 if letter == "o" else 0
            places = list(tensor.shape)
            places[axis] = len(ranks) * d
            tensor = tensor.new_zeros(places).index_copy_(axis, _live(site, letter), tensor)
        return tensor

    def side(letter: str, *shape: int, part: str = "weight") -> Tensor:
        tensor = slots(letter, part)
        if site.spec.fused and letter != "o":
            tensor = _apart(tensor, site)[letter]
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


def write_site(weights: HeadWeights, site: Site, header: Header, layout: Layout) -> dict[str, Tensor]:
    """The block's tensors under their names in the file, with all cut that `site` does not store.

    Dense: shapes of the original, zeros in the cut directions. Compact: only the kept directions. Each tensor is
    rounded to the dtype that `header` has for its name. With the site as it is in the file this inverts `read_site`.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _in_slots(weights, site).items():
        rounded = tensor.to(getattr(torch, TORCH_DTYPES[header[name].dtype]))
        module, _, part = name.rpartition(".")
        side = next(side for side in "qkvo" if site.module(side) == module)
        if side + part != "obias":
            index, axis = _live(site, side), 1 if side == "o" else 0
            kept = rounded.index_select(axis, index)
            rounded = kept if layout == "compact" else torch.zeros_like(rounded).index_copy_(axis, index, kept)
        if not all_finite(rounded):
            raise PessaError(
                f"{name} would overflow: its numbers become too large for {header[name].dtype}",
                "convert the model to float32 or bfloat16 first",
            )
        tensors[name] = (rounded.mT if site.spec.transposed and part == "weight" else rounded).contiguous()
    return tensors


def _live(site: Site, side: str) -> Tensor:
    """Where the kept directions stand among the slots of a projection's tensor."""
    repeats = site.group if side == "q" else 1
    pairs = None if site.pairs is None or side not in "qk" else [p for p in site.pairs for _ in range(repeats)]
    return live(site.stored(side), site.head_dim, pairs=pairs)


def _in_slots(weights: HeadWeights, site: Site) -> dict[str, Tensor]:
    """The block's tensors with all slots, rows of W_Q, W_K and W_V and columns of W_O, by their names in the file."""
    by_side: dict[str, Tensor | None] = {
        **{f"{side}.weight": getattr(weights, side) for side in "qkv"},
        **{f"{side}.bias": getattr(weights, f"{side}_bias") for side in "qkv"},
    }
    flat = {f"{site.o}.weight": weights.o.flatten(1), f"{site.o}.bias": weights.o_bias}
    for part in ("weight", "bias"):
        q, k, v = (by_side[f"{side}.{part}"] for side in "qkv")
        if site.spec.fused and q is not None and k is not None and v is not None:
            flat[f"{site.q}.{part}"] = _together(q, k, v, site)
            continue
        for side, tensor in (("q", q), ("k", k), ("v", v)):
            axes = 3 if side == "q" else 2
            flat[f"{site.module(side)}.{part}"] = None if tensor is None else tensor.flatten(0, axes - 1)
    return {name: tensor for name, tensor in flat.items() if tensor is not None}


def _together(q: Tensor, k: Tensor, v: Tensor, site: Site) -> Tensor:
    """The slots of a fused tensor; q: (G, M, d, ...), k and v: (G, d, ...)."""
    if site.spec.fused == "grouped":
        return torch.cat([q, k.unsqueeze(1), v.unsqueeze(1)], 1).flatten(0, 2)
    return torch.cat([q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)])


def _apart(slots: Tensor, site: Site) -> dict[str, Tensor]:
    """What `_together` has put together."""
    g, m, d = site.kv_heads, site.group, site.head_dim
    if site.spec.fused == "grouped":
        q, k, v = torch.split(slots.reshape(g, m + 2, d, *slots.shape[1:]), [m, 1, 1], 1)
    else:
        q, k, v = torch.split(slots, [g * m * d, g * d, g * d])
    return {"q": q, "k": k, "v": v}


class NotFiniteError(PessaError):
    """Weights that are NaN or infinite; `faults` has a line for each tensor, so that many sites report at once."""

    def __init__(self, reader: CheckpointReader, faults: list[str]) -> None:
        super().__init__(
            f"{len(faults)} tensors of {reader.folder} are not finite\n{listed(faults)}",
            "the checkpoint is damaged; download it again",
        )
        self.reader = reader
        self.faults = faults
