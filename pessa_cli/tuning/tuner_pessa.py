"""PESSA as a PEFT tuner: trains a small matrix per head between frozen orthogonal bases (arXiv:2411.17426).

For V-O, and for Q-K without RoPE or norms between W_Q and W_K, the product of a head is U S V^T, and S (d x d) is
trained. Under RoPE each head of W_Q and of W_K is decomposed as W = Q R, and R (d x d) is trained.

The base weights do not change. With A = U^T W_V and B = W_O V, the output y of a head becomes y T, where
T = I + A^-1 (S' - S) B^-1, so that W_V T W_O = U S' V^T. Under RoPE T = I + R^-1 (R' - R). The trained parameter is the
difference S' - S or R' - R, which is zero at the start. A^-1 and B^-1, or R^-1, are constants. They are saved with the
adapter, so that a reloaded adapter does not depend on the signs or the dtype of a new decomposition.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pessa_cli.algebra.decompose import triangular
from pessa_cli.algebra.heads import live
from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.spec import AttentionSpec
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.runtime.compact_linear import RaggedOut
from pessa_cli.tuning.peft_plugin import TunerMethod
from pessa_cli.tuning.tuner_base import Tuner, TunerConfig, TunerLayer, base_weights, option

FORMS = ("full", "diagonal", "banded")
QK_FORMS = ("triangular", "full")


@dataclass
class PessaTunerConfig(TunerConfig):
    """The options of PESSA. Raises ValueError for values that the method does not have.

    By default all attention blocks of a known architecture are adapted: v_proj; without RoPE also k_proj, which carries
    the S of the product Q-K; under RoPE also q_proj and k_proj.
    """

    method: ClassVar[str] = "pessa"

    form: str = option(f"Entries of S to train: {', '.join(FORMS)}.", "full")
    bandwidth: int = option("For 'banded': number of diagonals on each side of the main one.", 1)
    qk: str = option(f"Entries of R to train under RoPE: {', '.join(QK_FORMS)}.", "triangular")
    head_dim: int | None = option("For target modules outside known attention blocks: number of output rows per R.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("form", FORMS), ("qk", QK_FORMS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: give one of {', '.join(allowed)}")
        if self.bandwidth < 0 or (self.head_dim is not None and self.head_dim < 1):
            raise ValueError(
                f"bandwidth={self.bandwidth} must be at least 0, and head_dim={self.head_dim} at least 1 or None"
            )


@dataclass(frozen=True)
class Block:
    """The attention block of a projection, as far as an adapter depends on it.

    partner: the other factor of the product, which is W_O for values and W_Q for keys, or None under RoPE.
    """

    ranks: Ranks  # of each head: head_dim, or fewer in a pruned model
    form: str
    bandwidth: int
    partner: nn.Module | None = None
    side: str = ""  # of the projection: "k" or "v", or "" without a partner

    @property
    def width(self) -> int:
        return _widest(self.ranks)

    def entries(self) -> Tensor | None:
        """The flat indices of the trained entries in (heads, width, width), or None when all are trained."""
        if self.form == "full" and min(self.ranks) == self.width:  # the usual case, which needs no mask
            return None
        place = torch.arange(self.width, device="cpu")
        row, column = place.unsqueeze(1), place
        inside = torch.tensor(self.ranks, device="cpu").reshape(-1, 1, 1) > torch.maximum(row, column)
        chosen = {
            "full": row >= 0,
            "triangular": row <= column,
            "diagonal": row == column,
            "banded": (row - column).abs() <= self.bandwidth,
        }[self.form]
        both = inside & chosen
        return None if bool(both.all()) else both.flatten().nonzero().squeeze(1)


class PessaLayer(TunerLayer):
    """A projection in which the output of each head is multiplied by its T."""

    adapter_layer_names = ("pessa_delta",)  # S' - S or R' - R: the trained entries, (entries,)
    frozen_names = ("pessa_left", "pessa_right")  # A^-1 or R^-1, and B^-1: (heads, width, width) each
    setting_names = ("pessa_entries", "pessa_shape")

    pessa_delta: nn.ParameterDict
    pessa_left: Any
    pessa_right: Any
    pessa_entries: dict[str, Tensor | None]  # flat indices; None when all entries are trained
    pessa_shape: dict[str, tuple[int, int]]  # number of heads, width

    def initial(self, config: Any, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:
        block: Block = context["block"]
        heads, width = len(block.ranks), block.width
        entries = block.entries()
        delta = weight.new_zeros(heads * width * width if entries is None else len(entries))
        if weight.is_meta:
            left = weight.new_empty(heads, width, width)
            right = None if block.partner is None else torch.empty_like(left)
        else:
            left, right, scale = _bases(block, weight, bias)
            if not config.init_weights:
                noise = 0.1 * torch.randn_like(left) * (scale.unsqueeze(-1) * scale.unsqueeze(-2)).sqrt()
                delta = noise.flatten() if entries is None else noise.flatten()[entries.to(noise.device)]
        return {
            "pessa_delta": delta,
            "pessa_left": left,
            "pessa_right": right,
            "pessa_entries": entries,
            "pessa_shape": (heads, width),
        }

    def transform(self, adapter: str) -> Tensor:
        """T - I of each head, (heads, width, width). It is small, so it stays in float32 under autocast."""
        delta, left = self.pessa_delta[adapter], self.pessa_left[adapter]
        heads, width = self.pessa_shape[adapter]
        delta = delta.to(left.dtype)
        entries = self.pessa_entries[adapter]
        if entries is not None:
            if entries.device != delta.device:
                entries = self.pessa_entries[adapter] = entries.to(delta.device)
            delta = delta.new_zeros(heads * width * width).index_copy(0, entries, delta)
        with torch.autocast(delta.device.type, enabled=False):
            change: Tensor = left @ delta.view(heads, width, width)
            return change @ self.pessa_right[adapter] if adapter in self.pessa_right else change

    def adapt(self, adapter: str, x: Tensor, result: Tensor) -> Tensor:  # noqa: ARG002
        heads, width = self.pessa_shape[adapter]
        rows = result.reshape(-1, heads, result.shape[-1] // heads)  # (positions, heads, slots)
        change = torch.bmm(rows[..., :width].transpose(0, 1), self.transform(adapter).to(result.dtype)).transpose(0, 1)
        if width < rows.shape[-1]:  # a pruned model: the remaining slots are zero
            change = nn.functional.pad(change, (0, rows.shape[-1] - width))
        return (rows + change).view(result.shape)

    def merge_into(self, adapter: str, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self.transform(adapter)
        ranks = self._ranks(adapter)

        def merged(rows: Tensor) -> Tensor:  # (rows, in)
            by_head = _by_head(rows, ranks)  # (heads, in, width)
            both = by_head + by_head @ change.to(rows.dtype)
            return both.mT.reshape(-1, rows.shape[1])[live(ranks, _widest(ranks)).to(rows.device)]

        return merged(weight), None if bias is None else merged(bias.unsqueeze(1)).squeeze(1)

    def _ranks(self, adapter: str) -> Ranks:
        base = self.get_base_layer()
        heads, width = self.pessa_shape[adapter]
        return base.ragged.ranks if isinstance(base, RaggedOut) else (width,) * heads


def _merges_qk(spec: AttentionSpec) -> bool:
    """Whether Q and K of an architecture merge in every checkpoint, so that one S between them is trained."""
    return spec.rope is None and not spec.norms and not spec.key_bias_stays


class PessaModel(Tuner):
    """A model with PESSA adapters."""

    prefix = "pessa_"
    tuner_layer_cls = PessaLayer
    target_module_mapping: ClassVar[dict[str, list[str]]] = {
        model_type: sorted(
            {spec.v.rpartition(".")[2] for spec in specs}
            | {spec.k.rpartition(".")[2] for spec in specs}
            | {spec.q.rpartition(".")[2] for spec in specs if not _merges_qk(spec)}
        )
        for model_type, specs in ARCHITECTURES.items()
        if not any(spec.fused for spec in specs)
    }

    def context(self, config: Any, target: nn.Module, name: str) -> dict[str, Any]:
        base: Any = target.get_base_layer() if isinstance(target, PessaLayer) else target
        return {"block": self._attention_block(config, base, name) or _lone_block(config, base, name)}

    def _attention_block(self, config: Any, base: Any, name: str) -> Block | None:
        model_config = self.get_model_config(self.model)
        for spec in ARCHITECTURES.get(model_config.get("model_type", ""), ()):
            found = _side(spec, name)
            if found is None:
                continue
            side, siblings = found
            if isinstance(base, RaggedOut) and base.ragged.pairs is not None:
                only = siblings["v"].rpartition(".")[2]
                raise ValueError(
                    f"{name} has dropped frequency pairs, which R would mix with others: target only {only}"
                )
            if side == "q" and _merges_qk(spec):
                raise ValueError(f"{name}: the S of W_Q W_K^T is trained on the keys: target {siblings['k']} instead")
            heads = model_config[spec.heads[0]]
            if side != "q" and isinstance(spec.kv_heads, tuple):
                heads = next((model_config[key] for key in spec.kv_heads if model_config.get(key)), heads)
            ranks = base.ragged.ranks if isinstance(base, RaggedOut) else (base.out_features // heads,) * heads
            partner = {"q": None, "k": "q" if _merges_qk(spec) else None, "v": "o"}[side]
            if partner is None:
                return Block(ranks, config.qk, 0)
            return Block(ranks, config.form, config.bandwidth, self.model.get_submodule(siblings[partner]), side)
        return None


def _side(spec: AttentionSpec, name: str) -> tuple[str, dict[str, str]] | None:
    """The side of a projection, "q", "k" or "v", and the names of the block's four projections; None for others."""
    patterns = {"q": spec.q, "k": spec.k, "v": spec.v, "o": spec.o}
    for side in "qkv":
        regex = re.escape(patterns[side]).replace(re.escape("{i}"), "([0-9]+)")
        if (match := re.fullmatch(rf"((?:.*\.)?){regex}", name)) and len(set(patterns.values())) == 4:
            return side, {other: match[1] + pattern.replace("{i}", match[2]) for other, pattern in patterns.items()}
    return None


def _lone_block(config: Any, base: Any, name: str) -> Block:
    """A linear layer outside known attention blocks, its rows split into groups of `head_dim`."""
    rows = getattr(base, "out_features", None) or base.weight.shape[-1]  # Conv1D has no out_features
    if config.head_dim is None:
        raise ValueError(
            f"{name} is not a query, key or value projection that pessa knows: give `head_dim` to adapt it"
        )
    width = min(config.head_dim, rows)
    if rows % width:
        raise ValueError(f"{name}: {rows} rows are not a multiple of head_dim={config.head_dim}")
    return Block((width,) * (rows // width), config.qk, 0)


def _widest(ranks: Ranks) -> int:
    """The largest rank of a head, at least 1, so that a block without any direction still has valid shapes."""
    return max(1, *ranks)


def _by_head(rows: Tensor, ranks: Ranks) -> Tensor:
    """Reshape (sum of ranks, in) to (heads, in, width), with zero columns where a head has fewer directions."""
    width = _widest(ranks)
    if len(rows) == len(ranks) * width:
        return rows.reshape(len(ranks), width, -1).mT
    slots = rows.new_zeros(len(ranks) * width, rows.shape[1])
    return slots.index_copy_(0, live(ranks, width).to(rows.device), rows).reshape(len(ranks), width, -1).mT


def _with_bias(weight: Tensor, bias: Tensor | None) -> Tensor:
    """Append the bias as one more input: (rows, in + 1)."""
    return weight if bias is None else torch.cat([weight, bias.unsqueeze(1)], 1)


def _bases(block: Block, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Compute A^-1 and B^-1 of each head, or R^-1 and None under RoPE, and the diagonal of S or R.

    All are in the dtype of the weight. Query and value biases are one more row of their factor. A key bias is left out
    of Q-K, because it adds the same number to every score of a query and softmax removes that. Directions below the
    numerical rank are left out (pseudo-inverse), because multiplication cannot restore a direction that is zero.
    """
    tolerance = block.width * torch.finfo(weight.dtype).eps
    own = _by_head(_with_bias(weight, None if block.side == "k" else bias), block.ranks)
    r = _square(own)
    if block.partner is None:
        signs = r.diagonal(dim1=-2, dim2=-1).sign()
        r = torch.where(signs == 0, 1.0, signs).unsqueeze(-1) * r  # with a positive diagonal R is unique
        diagonal = r.diagonal(dim1=-2, dim2=-1)
        left = torch.linalg.solve_triangular(r, torch.eye(block.width).to(r).expand_as(r), upper=True)
        short = diagonal.amin(-1) <= tolerance * diagonal.amax(-1)
        if short.any():
            left[short] = torch.linalg.pinv(r[short], rtol=tolerance)
        return left.to(weight.dtype), None, diagonal.to(weight.dtype)
    other = _square(_partner(block).to(own.device))
    u, spectrum, vh = torch.linalg.svd(r @ other.mT)
    inverse = torch.where(spectrum > tolerance * spectrum[:, :1], 1 / spectrum, 0.0)
    left = other.mT @ (vh.mT * inverse.unsqueeze(-2))  # B = W_O V, and A B = S
    right = inverse.unsqueeze(-1) * (u.mT @ r)  # A = U^T W_V
    return left.to(weight.dtype), right.to(weight.dtype), spectrum.to(weight.dtype)


def _square(factor: Tensor) -> Tensor:
    """R of the QR decomposition of each head, (heads, width, width), with zero rows for factors of fewer rows."""
    r, _ = triangular(factor)
    return nn.functional.pad(r, (0, 0, 0, r.shape[-1] - r.shape[-2]))


def _partner(block: Block) -> Tensor:
    """The other factor of each head's product, with the query heads of a group stacked: (heads, rows, width)."""
    module: Any = block.partner
    weight, bias = base_weights(module)
    if block.side == "v":  # heads are columns of W_O
        weight, bias = weight.mT, None
    rows = _with_bias(weight, bias)
    group = len(rows) // sum(block.ranks) if sum(block.ranks) else 1
    each = tuple(rank for rank in block.ranks for _ in range(group))
    stacked = _by_head(rows, each)  # (heads * group, in, width)
    return stacked.reshape(len(block.ranks), -1, block.width)


METHODS = (TunerMethod("pessa", PessaTunerConfig, PessaModel),)
