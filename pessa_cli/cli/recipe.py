"""A run as a file: TOML with the options of `prune` and, if wanted, of the `verify` after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pessa_cli.common.errors import UsageError
from pessa_cli.common.toml import checked, read_toml
from pessa_cli.evaluation.limits import check_limits
from pessa_cli.ranks.rule import WAYS, Rule, parse_layers, size_of

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
