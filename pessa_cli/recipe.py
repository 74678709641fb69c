"""A run as a file: TOML with the options of `prune` and, if wanted, of the `verify` after it."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pessa_cli.checkpoint import file_size
from pessa_cli.errors import PessaError, UsageError
from pessa_cli.ragged import shortened
from pessa_cli.ranks import WAYS, Rule

MOST_BYTES = 2**20  # of a recipe
MOST_PARTS = 200  # of a list of layers, between its commas
_NUMBER = (int, float)
_PRUNE: Mapping[str, type | tuple[type, ...]] = {
    "qk_thr": _NUMBER,
    "vo_thr": _NUMBER,
    "ratio": _NUMBER,
    "rank": int,
    "energy": _NUMBER,
    "target_params": _NUMBER,
    "target_attention": _NUMBER,
    "target_size": (int, str),
    "max_error": _NUMBER,
    "round_to": int,
    "min_rank": int,
    "rope_ratio": _NUMBER,
    "sites": list,
    "layers": str,
    "method": str,
    "layout": str,
    "calibrate": list,
    "statistics": list,
    "sequential": bool,
    "evaluate": str,
    "max_wer_increase": _NUMBER,
    "max_ppl_increase": str,
}
_VERIFY: Mapping[str, type | tuple[type, ...]] = {"level": str, "tolerance": _NUMBER, "min_agreement": _NUMBER}
_CHOICES = {
    ("prune", "method"): ("svd", "vanilla"),
    ("prune", "layout"): ("compact", "dense"),
    ("verify", "level"): ("weights", "blocks", "outputs"),
}
_RULE = (*WAYS, "round_to", "min_rank", "rope_ratio")


@dataclass(frozen=True)
class Recipe:
    """What `pessa run` does to a model, and `pessa prune` with the same options; `verify` when the file has that table.

    calibrate, statistics: what the rule goes by, and in files of their own; sequential: see `calibrate`. evaluate with
    one of the two increases: prune as far as they allow, see `search`.
    """

    rule: Rule
    sites: tuple[str, ...] = ()
    layers: frozenset[int] | None = None
    method: Literal["svd", "vanilla"] = "svd"
    layout: Literal["compact", "dense"] = "compact"
    calibrate: tuple[Path, ...] = ()
    statistics: tuple[Path, ...] = ()
    sequential: bool = False
    evaluate: Path | None = None
    max_wer_increase: float | None = None
    max_ppl_increase: str | None = None
    verify: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.method == "vanilla" and (self.calibrate or self.statistics):
            raise UsageError("--method vanilla goes by the weights alone", "leave out the data, or the method")
        increase = "--max-wer-increase or --max-ppl-increase"
        if self.searches != (self.evaluate is not None):
            raise UsageError(f"{increase} and --evaluate DATA go together", "give each with the other")
        if self.searches and (self.rule.given or self.sequential or self.method == "vanilla"):
            raise UsageError(f"{increase} is a rule of its own", "leave out other rules, --sequential and --method")

    @property
    def searches(self) -> bool:
        return self.max_wer_increase is not None or self.max_ppl_increase is not None


def load_recipe(path: Path) -> Recipe:
    """The recipe in a TOML file. Raises UsageError for keys that do not exist and values of the wrong type."""
    content = read_toml(path, "prune", "verify")
    prune = checked(path, "prune", content.get("prune", {}), _PRUNE)
    verify = checked(path, "verify", content["verify"], _VERIFY) if "verify" in content else None
    try:
        if verify is not None:
            check_limits(verify.get("tolerance"), verify.get("min_agreement"))
        if isinstance(prune.get("target_size"), str):
            prune["target_size"] = size_of(prune["target_size"], "target_size")
        simple = ("method", "layout", "sequential", "max_wer_increase", "max_ppl_increase")
        return Recipe(
            rule=Rule(**{key: prune[key] for key in _RULE if key in prune}),
            sites=tuple(prune.get("sites", ())),
            layers=parse_layers(prune["layers"]) if "layers" in prune else None,
            calibrate=tuple(map(Path, prune.get("calibrate", ()))),
            statistics=tuple(map(Path, prune.get("statistics", ()))),
            evaluate=Path(prune["evaluate"]) if "evaluate" in prune else None,
            verify=verify,
            **{key: prune[key] for key in simple if key in prune},
        )
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None


def read_toml(path: Path, *tables: str) -> dict[str, Any]:
    """The content of a recipe. Raises UsageError for anything at the top but these tables."""
    try:
        size = file_size(path)
        if size > MOST_BYTES:
            raise ValueError(f"it has {size:,} bytes, more than {MOST_BYTES:,}")
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # UnicodeDecodeError and TOMLDecodeError are ValueErrors
        raise PessaError(f"{path} is not a readable recipe: {error}", "see the examples in configs/") from None
    unknown = [key for key in content if key not in tables]
    if unknown:
        known = " and ".join(f"[{table}]" for table in tables)
        raise UsageError(f"{path}: unknown table or key {shortened(unknown[0])}", f"a recipe has {known}")
    return content


def size_of(text: str, flag: str) -> int:
    """Bytes of a size as people write it: 5GB, 1.5 MB. Raises UsageError for anything else."""
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(kB|KB|MB|GB|TB)", text)
    if match is None:
        raise UsageError(f"{flag} {shortened(text)} is no size", "write it as 5GB or 500MB")
    return int(float(match[1]) * {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2][0].upper()])


def check_limits(tolerance: float | None, min_agreement: float | None) -> None:
    """Raise UsageError for limits that nothing or everything would meet."""
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise UsageError(f"--tolerance {tolerance:g} is no error to allow", "give a number from 0 up, as 1e-3")
    if min_agreement is not None and not 0 <= min_agreement <= 1:
        raise UsageError(f"--min-agreement {min_agreement:g} is no share", "give a number from 0 to 1, as 0.99")


def parse_layers(text: str) -> frozenset[int]:
    """Layers as people write them: "0-15", "3", "0-3,12,20-23"."""
    layers: set[int] = set()
    wrong = UsageError(f"--layers {shortened(text)} is no list of layers", "write them as 0-15 or 0-3,12")
    if text.count(",") > MOST_PARTS:
        raise wrong
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,5})(?:-([0-9]{1,5}))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise wrong
        layers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(layers)


def checked(path: Path, table: str, values: Any, known: Mapping[str, type | tuple[type, ...]]) -> dict[str, Any]:
    """The values of one table, when each key is known and of its type. Raises UsageError otherwise."""
    if not isinstance(values, dict):
        raise UsageError(f"{path}: {table} is no table", f"write [{table}] above its keys")
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"{path}: [{table}] has no key {shortened(key)}", f"it has {', '.join(known)}")
        if not isinstance(value, known[key]) or (isinstance(value, bool) and known[key] is not bool):
            kind = type(value).__name__
            raise UsageError(f"{path}: {key} = {shortened(value)} is a {kind}", "see the examples in configs/")
        if isinstance(value, int) and abs(value) > 2**53:
            raise UsageError(f"{path}: {key} = {shortened(value)} is too large", "see the examples in configs/")
        choices = _CHOICES.get((table, key))
        if choices is not None and value not in choices:
            raise UsageError(f"{path}: {key} = {shortened(value)}", f"it is one of {', '.join(choices)}")
        if isinstance(value, list) and {type(site) for site in value} != {str}:
            example = {"sites": "encoder.self", "targets": "q_proj"}.get(key, "speech/")
            raise UsageError(f"{path}: {key} = {shortened(value)}", f'write it as ["{example}"]')
    return values
