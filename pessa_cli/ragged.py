"""What config.json of a compact model says: which projections are ragged, and the rank of each of their heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pessa_cli.errors import PessaError

QUANT_METHOD = "pessa"
Ranks = tuple[int, ...]  # one rank a head; for a whole block, one a key/value head


@dataclass(frozen=True)
class Ragged:
    """How a compact file stores one projection: live rows or columns per head of `head_dim` slots."""

    side: str  # "rows" for q, k and v; "columns" for o
    head_dim: int
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.side} {self.head_dim}: {' '.join(map(str, self.ranks))}"

    @staticmethod
    def parse(module: str, text: str) -> Ragged:
        match = re.fullmatch(r"(rows|columns) (\d+):((?: \d+)+)", text) if isinstance(text, str) else None
        if match is None:
            raise PessaError(
                f"quantization_config of config.json says {text!r} for {module}", "write the folder again with pessa"
            )
        ragged = Ragged(match[1], int(match[2]), tuple(int(rank) for rank in match[3].split()))
        if max(ragged.ranks) > ragged.head_dim:
            raise PessaError(
                f"config.json gives {module} rank {max(ragged.ranks)} in heads of {ragged.head_dim}",
                "write the folder again with pessa",
            )
        return ragged


def ragged_modules(config: Mapping[str, Any]) -> dict[str, Ragged]:
    """What `quantization_config` says of a compact model's projections; empty for any other model.

    Raises PessaError for weights that something else has quantised: they are no longer a product of floats.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != QUANT_METHOD:
        raise PessaError(
            f"the checkpoint is quantised ({method})", "prune the float checkpoint, then quantise the dense export"
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise PessaError("quantization_config of config.json lists no modules", "write the folder again with pessa")
    return {module: Ragged.parse(module, text) for module, text in modules.items()}


def match_module(name: str, modules: Iterable[str]) -> str | None:
    """The one of `modules` that names the same projection as `name`, whatever prefix either has.

    A base model saved alone lacks the prefix that the same model has under a head ("bert.encoder...").
    """
    found = [m for m in modules if m == name or m.endswith("." + name) or name.endswith("." + m)]
    return found[0] if len(found) == 1 else None
