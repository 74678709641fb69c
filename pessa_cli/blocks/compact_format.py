"""The `quantization_config` of a compact model: which projections are ragged, and the rank of each of their heads.

A ragged projection stores a different number of directions for each head.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import shortened

QUANT_METHOD = "pessa"
# This text is written to config.json as `attn_implementation`, and pessa's loader removes it. Without pessa,
# transformers fails with an error that quotes it; no other entry of config.json is quoted in an error.
HINT_BEGINS = "compact model: "  # also of the hints of earlier versions
LOAD_HINT = f"{HINT_BEGINS}install pessa, and `import pessa_cli` before from_pretrained"
Ranks = tuple[int, ...]  # one rank per head; for a whole block, one per key/value head
# The frequency pairs that one head keeps, as ascending ranges. RoPE rotates directions i and i + d/2 of a head together
# as pair i, so both are kept or both are cut. Ranges rather than single numbers, so that parsing a short text from a
# file cannot take much memory.
PairRuns = tuple[range, ...]


@dataclass(frozen=True)
class Ragged:
    """Which of the `head_dim` rows or columns of each group a compact file stores of one module.

    For a projection of attention these are the first `rank` directions of each head, written as "rows 64: 28 31 0", or
    with `pairs` the frequency pairs of q or k under RoPE, written as "pairs 64: 0-3,7,9-31 0-31 none". For a module of
    an MLP they are its first channels, written as "channel rows 1536: 1024".
    """

    side: str  # "rows" for q, k and v; "columns" for o; with "channel " before it for a module of an MLP
    head_dim: int
    ranks: tuple[int, ...]
    pairs: tuple[PairRuns, ...] | None = None  # one entry per head; each pair counts as two directions of the rank

    @property
    def channels(self) -> bool:
        """Whether the module is part of an MLP, which runs at the stored width."""
        return self.side.startswith("channel ")

    @property
    def rows(self) -> bool:
        """Whether rows of the module are left out; otherwise columns are."""
        return self.side.endswith("rows")

    @staticmethod
    def of_pairs(head_dim: int, pairs: tuple[PairRuns, ...]) -> Ragged:
        """Return the entry of a q or k projection that stores these frequency pairs of each head."""
        return Ragged("rows", head_dim, pair_ranks(pairs), pairs)

    def __str__(self) -> str:
        if self.pairs is not None:
            return f"pairs {self.head_dim}: {pairs_text(self.pairs)}"
        return f"{self.side} {self.head_dim}: {' '.join(map(str, self.ranks))}"

    @staticmethod
    def parse(module: str, text: str) -> Ragged:
        """Parse the entry of one module. Raises PessaError if it is malformed, or a rank or pair exceeds the head."""
        digits = "[0-9]{1,5}"
        pattern = rf"((?:channel )?(?:rows|columns)) ({digits}):((?: {digits})+)"
        match = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if match is None and isinstance(text, str) and (of_pairs := re.fullmatch(rf"pairs ({digits}): (.+)", text)):
            head_dim, pairs = int(of_pairs[1]), parse_pairs(of_pairs[2])
            if pairs is not None and head_dim % 2 == 0:
                if (last := last_pair(pairs)) >= head_dim // 2:
                    raise PessaError(
                        f"config.json gives {module} frequency pair {last}, but its heads have {head_dim // 2} pairs",
                        "write the folder again with pessa",
                    )
                return Ragged.of_pairs(head_dim, pairs)
        if match is None:
            raise PessaError(
                f"quantization_config of config.json has an invalid entry for {module}: {shortened(text)}",
                "write the folder again with pessa",
            )
        ragged = Ragged(match[1], int(match[2]), tuple(int(rank) for rank in match[3].split()))
        if max(ragged.ranks) > ragged.head_dim:
            raise PessaError(
                f"config.json gives {module} {max(ragged.ranks)} of {ragged.head_dim} {_UNITS[ragged.channels]}",
                "write the folder again with pessa",
            )
        return ragged


_UNITS = {False: "directions of a head", True: "channels"}


def pair_ranks(pairs: Iterable[PairRuns]) -> Ranks:
    """Return how many directions each head keeps: two per pair."""
    return tuple(2 * sum(map(len, runs)) for runs in pairs)


def last_pair(pairs: Iterable[PairRuns]) -> int:
    """Return the highest index among the kept pairs of all heads, or -1 if none is kept."""
    return max((runs[-1][-1] for runs in pairs if runs), default=-1)


def pairs_text(pairs: Iterable[PairRuns]) -> str:
    """Format the kept pairs of each head for config.json: "0-3,7,9-31 0-31 none"."""

    def run(pairs: range) -> str:
        return str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]}-{pairs[-1]}"

    return " ".join(",".join(map(run, runs)) or "none" for runs in pairs)


def parse_pairs(text: str) -> tuple[PairRuns, ...] | None:
    """Parse a text written by `pairs_text`; returns None for a text that `pairs_text` would not write."""
    pairs: list[PairRuns] = []
    for head in text.split(" "):
        runs: list[range] = []
        for part in [] if head == "none" else head.split(","):
            match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", part)
            if match is None:
                return None
            runs.append(range(int(match[1]), int(match[2] or match[1]) + 1))
        pairs.append(tuple(runs))
    ascending = all(run for runs in pairs for run in runs) and all(
        before.stop < run.start for runs in pairs for before, run in pairwise(runs)
    )
    return tuple(pairs) if ascending and pairs_text(pairs) == text else None


def ragged_modules(config: Mapping[str, Any]) -> dict[str, Ragged]:
    """Return the ragged projections in `quantization_config` by module name; empty without a `quantization_config`.

    Raises PessaError if an entry is malformed, or if the checkpoint was quantised by another method: its projections
    are then no longer matrices of floats.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != QUANT_METHOD:
        name = method if isinstance(method, str) and method.isidentifier() else shortened(method)
        raise PessaError(
            f"the checkpoint is quantised ({name})",
            "prune the float checkpoint that it was made from, then quantise the dense export",
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise PessaError("quantization_config of config.json lists no modules", "write the folder again with pessa")
    odd = [name for name in modules if len(name) > 256 or name.count(".") > 16 or not name.isprintable()]
    if odd:
        raise PessaError(
            f"quantization_config of config.json lists an invalid module name {shortened(odd[0])}",
            "write the folder again with pessa",
        )
    return {module: Ragged.parse(module, text) for module, text in modules.items()}


class ModuleNames:
    """A set of module names that can be looked up with or without a prefix.

    The same module has a prefix in a model with a task head ("bert.encoder...") and none in the base model alone.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._ending: dict[str, set[str]] = {}
        self._modules = set(modules)
        for module in self._modules:
            for end in _ends(module):
                self._ending.setdefault(end, set()).add(module)

    def find(self, name: str) -> str | None:
        """Return the module equal to `name` up to a prefix of either; None if there is none or more than one."""
        found = self._ending.get(name, set()) | {end for end in _ends(name) if end in self._modules}
        return next(iter(found)) if len(found) == 1 else None


def _ends(name: str) -> Iterator[str]:
    """Yield the name itself, and the rest of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def match_module(name: str, modules: Iterable[str]) -> str | None:
    """Return the one of `modules` equal to `name` up to a prefix of either; None if there is none or more than one."""
    return ModuleNames(modules).find(name)
