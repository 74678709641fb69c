"""What config.json of a compact model says: which projections are ragged, and the rank of each of their heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import shortened

QUANT_METHOD = "pessa"
# Stands in config.json as `attn_implementation`. The loader takes it out again; where there is no loader, transformers
# stops and quotes it, which it does with nothing else that a model folder says.
LOAD_HINT = "compact model: pip install pessa, and `import pessa_cli` before from_pretrained"
Ranks = tuple[int, ...]  # one rank a head; for a whole block, one a key/value head
# Under RoPE directions i and i + d/2 turn together as pair i, and are kept or cut together: the runs of pairs that one
# head keeps, ascending. Runs, and not one number a pair, so that a text takes no more memory than it is long.
PairRuns = tuple[range, ...]


@dataclass(frozen=True)
class Ragged:
    """How a compact file stores one projection: live rows or columns per head of `head_dim` slots.

    The first `rank` of each head, or, where `pairs` says so, the frequency pairs of q and k under RoPE: in text
    "rows 64: 28 31 0", or "pairs 64: 0-3,7,9-31 0-31 none".
    """

    side: str  # "rows" for q, k and v; "columns" for o
    head_dim: int
    ranks: tuple[int, ...]
    pairs: tuple[PairRuns, ...] | None = None  # one a head; each takes two of its rank

    @staticmethod
    def of_pairs(head_dim: int, pairs: tuple[PairRuns, ...]) -> Ragged:
        return Ragged("rows", head_dim, pair_ranks(pairs), pairs)

    def __str__(self) -> str:
        if self.pairs is not None:
            return f"pairs {self.head_dim}: {pairs_text(self.pairs)}"
        return f"{self.side} {self.head_dim}: {' '.join(map(str, self.ranks))}"

    @staticmethod
    def parse(module: str, text: str) -> Ragged:
        digits = "[0-9]{1,5}"
        pattern = rf"(rows|columns) ({digits}):((?: {digits})+)"
        match = re.fullmatch(pattern, text) if isinstance(text, str) else None
        if match is None and isinstance(text, str) and (of_pairs := re.fullmatch(rf"pairs ({digits}): (.+)", text)):
            head_dim, pairs = int(of_pairs[1]), parse_pairs(of_pairs[2])
            if pairs is not None and head_dim % 2 == 0:
                if (last := last_pair(pairs)) >= head_dim // 2:
                    raise PessaError(
                        f"config.json gives {module} pair {last} in heads of {head_dim // 2} pairs",
                        "write the folder again with pessa",
                    )
                return Ragged.of_pairs(head_dim, pairs)
        if match is None:
            raise PessaError(
                f"quantization_config of config.json says {shortened(text)} for {module}",
                "write the folder again with pessa",
            )
        ragged = Ragged(match[1], int(match[2]), tuple(int(rank) for rank in match[3].split()))
        if max(ragged.ranks) > ragged.head_dim:
            raise PessaError(
                f"config.json gives {module} rank {max(ragged.ranks)} in heads of {ragged.head_dim}",
                "write the folder again with pessa",
            )
        return ragged


def pair_ranks(pairs: Iterable[PairRuns]) -> Ranks:
    """How many directions each head keeps: two a pair."""
    return tuple(2 * sum(map(len, runs)) for runs in pairs)


def last_pair(pairs: Iterable[PairRuns]) -> int:
    """The highest pair that any head keeps, -1 for none."""
    return max((runs[-1][-1] for runs in pairs if runs), default=-1)


def pairs_text(pairs: Iterable[PairRuns]) -> str:
    """The kept pairs of each head in words: "0-3,7,9-31 0-31 none"."""

    def run(pairs: range) -> str:
        return str(pairs[0]) if len(pairs) == 1 else f"{pairs[0]}-{pairs[-1]}"

    return " ".join(",".join(map(run, runs)) or "none" for runs in pairs)


def parse_pairs(text: str) -> tuple[PairRuns, ...] | None:
    """What `pairs_text` wrote; None for anything that it would not have written so."""
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
    """What `quantization_config` says of a compact model's projections; empty for any other model.

    Raises PessaError for weights that something else has quantised: they are no longer a product of floats.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        return {}
    method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
    if method != QUANT_METHOD:
        name = method if isinstance(method, str) and method.isidentifier() else shortened(method)
        raise PessaError(
            f"the checkpoint is quantised ({name})", "prune the float checkpoint, then quantise the dense export"
        )
    modules = quantization.get("modules")
    if not isinstance(modules, dict) or not modules:
        raise PessaError("quantization_config of config.json lists no modules", "write the folder again with pessa")
    odd = [name for name in modules if len(name) > 256 or name.count(".") > 16 or not name.isprintable()]
    if odd:
        raise PessaError(
            f"quantization_config of config.json lists a module {shortened(odd[0])}",
            "write the folder again with pessa",
        )
    return {module: Ragged.parse(module, text) for module, text in modules.items()}


class ModuleNames:
    """Names of modules, to be found whatever prefix they or what is looked for have.

    A base model saved alone lacks the prefix that the same model has under a head ("bert.encoder...").
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self._ending: dict[str, set[str]] = {}
        self._modules = set(modules)
        for module in self._modules:
            for end in _ends(module):
                self._ending.setdefault(end, set()).add(module)

    def find(self, name: str) -> str | None:
        """The one module that names the same projection as `name`."""
        found = self._ending.get(name, set()) | {end for end in _ends(name) if end in self._modules}
        return next(iter(found)) if len(found) == 1 else None


def _ends(name: str) -> Iterator[str]:
    """The name itself, and what is left of it after each dot."""
    while name:
        yield name
        name = name.partition(".")[2]


def match_module(name: str, modules: Iterable[str]) -> str | None:
    """The one of `modules` that names the same projection as `name`, whatever prefix either has."""
    return ModuleNames(modules).find(name)
