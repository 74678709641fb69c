"""SVFT: W = U (diag(s) + M) V^T, where M is sparse and its entries are trained (Lingam et al. 2024, arXiv:2405.19597).

The entries start at zero, so that the start is the base model. (The released code draws them at random.) The adapter's
file contains U, V and the positions of the entries, because recomputed singular vectors may have other signs. It is
therefore about as large as the adapted weights, unless `r` limits the number of singular triplets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pessa_cli.common.errors import UsageError
from pessa_cli.tuning.peft_plugin import TunerMethod
from pessa_cli.tuning.truncated_svd import triplets
from pessa_cli.tuning.tuner_base import AdditiveLayer, Tuner, TunerConfig, option, working_dtype

PATTERNS = ("plain", "banded", "random", "top-k")


@dataclass
class SvftConfig(TunerConfig):
    """The options of SVFT. Raises UsageError for an unknown pattern."""

    method: ClassVar[str] = "svft"

    pattern: str = option(
        "Entries of M to train: 'plain' the diagonal, 'banded' a band around it, 'random' random ones, 'top-k' those "
        "whose left and right singular vectors are most aligned.",
        "plain",
    )
    band: int = option(
        "Diagonals on each side of the main one; 'random' and 'top-k' train as many entries as such a band has.", 1
    )
    r: int | None = option("Number of largest singular triplets to use; the default is all.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern not in PATTERNS:
            raise UsageError(f"there is no pattern {self.pattern!r}", "give one of " + ", ".join(PATTERNS))


class SvftLayer(AdditiveLayer):
    """A linear layer with SVFT adapters."""

    adapter_layer_names = ("svft_M",)  # (entries,)
    frozen_names = ("svft_U", "svft_V", "svft_index")  # (out, k), (k, in), (2, entries): row and column of each
    setting_names = ("svft_plain",)

    svft_M: nn.ParameterDict  # noqa: N815
    svft_U: Any  # noqa: N815
    svft_V: Any  # noqa: N815
    svft_index: Any
    svft_plain: dict[str, bool]

    def initial(self, config: SvftConfig, weight: Tensor, bias: Tensor | None, **context: Any) -> dict[str, Any]:  # noqa: ARG002
        u, s, v = triplets(weight, config.r)
        index = _pattern(config, u, v)
        m = s.new_zeros(index.shape[1])
        return {
            "svft_M": m if config.init_weights else m.normal_(std=0.1),
            "svft_U": u,
            "svft_V": v,
            "svft_index": index,
            "svft_plain": config.pattern == "plain",
        }

    def _middle(self, adapter: str, dtype: torch.dtype) -> Tensor:
        """M as a dense matrix, (k, k)."""
        size = len(self.svft_V[adapter])
        rows, columns = self.svft_index[adapter]
        values = self.svft_M[adapter].to(dtype)
        middle: Tensor = values.new_zeros(size, size).index_put((rows, columns), values)
        return middle

    def delta(self, adapter: str) -> Tensor:
        dtype = working_dtype(self.svft_M[adapter].dtype)
        u, v = self.svft_U[adapter].to(dtype), self.svft_V[adapter].to(dtype)
        delta: Tensor = u @ self._middle(adapter, dtype) @ v
        return delta

    def change(self, adapter: str, x: Tensor) -> Tensor:
        u, v = self.svft_U[adapter].to(x.dtype), self.svft_V[adapter].to(x.dtype)
        inner = nn.functional.linear(x, v)
        if self.svft_plain[adapter]:
            inner = inner * self.svft_M[adapter].to(x.dtype)
        else:
            inner = nn.functional.linear(inner, self._middle(adapter, x.dtype))
        return nn.functional.linear(inner, u)


def _pattern(config: SvftConfig, u: Tensor, v: Tensor) -> Tensor:
    """The row and column of each trained entry of M (k, k), as (2, entries)."""
    size = len(v)
    band = 0 if config.pattern == "plain" else min(config.band, size - 1)
    entries = size * (2 * band + 1) - band * (band + 1)
    if config.pattern == "random":
        chosen = torch.randperm(size * size, device=u.device)[:entries]
    elif config.pattern == "top-k":
        # The paper compares u_i with v_j, which have the same length only for a square weight; otherwise the shared
        # coordinates are compared. The absolute value is used because the sign of singular vectors is arbitrary.
        shared = min(len(u), v.shape[1])
        chosen = (u[:shared].mT @ v[:, :shared].mT).abs().flatten().topk(entries).indices
    else:
        row = torch.arange(size, device=u.device)
        inside = (row[:, None] - row).abs() <= band
        chosen = inside.flatten().nonzero().flatten() if not u.is_meta else row.new_empty(entries)
    return torch.stack([chosen // size, chosen % size])


class SvftTuner(Tuner):
    """A model with SVFT adapters."""

    prefix = "svft_"
    tuner_layer_cls = SvftLayer


METHODS = (TunerMethod("svft", SvftConfig, SvftTuner),)
