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

    def side(letter: str, *shape: int, part: str = "weight") -> Tensor:
        tensor = stored[f"{site.module(letter)}.{part}"]
        ranks = site.qk_ranks if letter in "qk" else site.vo_ranks
        if ranks != site.full:
            axis = 1 if letter == "o" else 0
            repeats = site.group if letter in "qo" else 1
            slots = list(tensor.shape)
            slots[axis] = len(ranks) * repeats * site.head_dim
            index = live(ranks, site.head_dim, repeats, site.pairs if letter in "qk" else None)
            tensor = tensor.new_zeros(slots).index_copy_(axis, index, tensor)
        return tensor.reshape(shape)

    def bias(letter: str, *shape: int) -> Tensor | None:
        return side(letter, *shape, part="bias") if letter in site.biases else None

    g, m, d = site.kv_heads, site.group, site.head_dim
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
    g, m, d = site.kv_heads, site.group, site.head_dim
    flat: dict[str, Tensor | None] = {
        f"{site.q}.weight": weights.q.reshape(g * m * d, -1),
        f"{site.k}.weight": weights.k.reshape(g * d, -1),
        f"{site.v}.weight": weights.v.reshape(g * d, -1),
        f"{site.o}.weight": weights.o.reshape(-1, g * m * d),
        f"{site.q}.bias": None if weights.q_bias is None else weights.q_bias.reshape(-1),
        f"{site.k}.bias": None if weights.k_bias is None else weights.k_bias.reshape(-1),
        f"{site.v}.bias": None if weights.v_bias is None else weights.v_bias.reshape(-1),
        f"{site.o}.bias": weights.o_bias,
    }
    tensors: dict[str, Tensor] = {}
    for name, tensor in flat.items():
        if tensor is None:
            continue
        rounded = tensor.to(getattr(torch, TORCH_DTYPES[header[name].dtype]))
        module, _, part = name.rpartition(".")
        side = next(side for side in "qkvo" if site.module(side) == module)
        if side + part != "obias":
            ranks, pairs = (site.qk_ranks, site.pairs) if side in "qk" else (site.vo_ranks, None)
            index = live(ranks, d, m if side in "qo" else 1, pairs)
            axis = 1 if side == "o" else 0
            kept = rounded.index_select(axis, index)
            rounded = kept if layout == "compact" else torch.zeros_like(rounded).index_copy_(axis, index, kept)
        if not all_finite(rounded):
            raise PessaError(
                f"{name} would overflow: its numbers become too large for {header[name].dtype}",
                "convert the model to float32 or bfloat16 first",
            )
        tensors[name] = rounded.contiguous()
    return tensors


class NotFiniteError(PessaError):
    """Weights that are NaN or infinite; `faults` has a line for each tensor, so that many sites report at once."""

    def __init__(self, reader: CheckpointReader, faults: list[str]) -> None:
        super().__init__(
            f"{len(faults)} tensors of {reader.folder} are not finite\n{listed(faults)}",
            "the checkpoint is damaged; download it again",
        )
        self.reader = reader
        self.faults = faults
