"""The recipe of `pessa prune`, which comes from command-line options, from a TOML file or from Python."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from pessa_cli.common.errors import UsageError
from pessa_cli.common.options import at_least, check_options, option
from pessa_cli.common.toml import from_table, read_toml
from pessa_cli.common.values import parse_layers
from pessa_cli.evaluation.limits import VerifyOptions
from pessa_cli.ranks.rule import Rule

INCREASE = "--max-wer-increase or --max-ppl-increase"


@dataclass(frozen=True)
class Recipe:
    """How a model is pruned: the rule, the blocks that it applies to, the calibration data, and the layout.

    With `evaluate` and one of the two increases, the ranks are searched for, and `rule` may only round them. verify:
    the comparison that `pessa run` makes afterwards; None for none. Raises UsageError for options that exclude each
    other.
    """

    rule: Rule = Rule()
    max_wer_increase: float | None = option(
        None, "Largest allowed increase of the word error rate, in percentage points: prune as much as that allows."
    )
    max_ppl_increase: str | None = option(
        None,
        "Largest allowed increase of the perplexity, e.g. 1% or 0.2: prune as much as that allows.",
        metavar="INCREASE",
    )
    evaluate: Path | None = option(
        None,
        "Data on which the increase is measured: JSON lines of audio clips with transcripts, or a text.",
        metavar="DATA",
    )
    sites: tuple[str, ...] = option(
        (),
        "Use only these kinds of blocks: attention, mlp, a stack such as encoder, or e.g. encoder.self,encoder.mlp.",
        metavar="KINDS",
        example="encoder.self",
    )
    layers: frozenset[int] | None = option(
        None, "Use only these layers, e.g. 0-15 or 0-3,12.", metavar="RANGE", parse=parse_layers
    )
    method: Literal["svd", "vanilla"] = option(
        "svd", "svd: rank singular directions. vanilla: rank the original dimensions by their norms, for comparison."
    )
    layout: Literal["compact", "dense"] = option(
        "compact", "compact: store smaller matrices. dense: keep the original shapes, with zeros in them."
    )
    calibrate: tuple[Path, ...] = option(
        (),
        "Calibration data: rank directions and channels by their effect on these inputs. Audio or text files, folders, "
        "or JSON lines; may be repeated.",
        metavar="DATA",
        example="speech/",
    )
    statistics: tuple[Path, ...] = option(
        (),
        "File for the statistics that --calibrate collects. Without --calibrate: statistics to use; may be repeated.",
        metavar="FILE",
        example="statistics.safetensors",
    )
    augment: int | None = option(
        None,
        "Calibrate on this many windows that are made from the speech of --calibrate: clips joined to 2 to 28 s, with "
        "other speed, gain and noise.",
        metavar="N",
        allowed=at_least(1),
    )
    augment_seed: int = option(0, "Seed of --augment; the same seed gives the same windows.", allowed=at_least(0))
    sequential: bool = option(
        False, "Calibrate each block on the outputs of the pruned blocks before it; this is slower."
    )
    verify: VerifyOptions | None = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.method == "vanilla" and (self.calibrate or self.statistics):
            raise UsageError("--method vanilla uses the weights alone", "leave out the data, or the method")
        if self.augment is not None and not self.calibrate:
            raise UsageError("--augment changes the data of --calibrate", "give --calibrate DATA, or leave it out")
        if self.rule.max_error is not None and not self.calibrate:
            raise UsageError(
                "--max-error is measured by running the model on calibration data, so --statistics is not enough",
                "give it: --calibrate DATA",
            )
        if self.searches != (self.evaluate is not None):
            raise UsageError(f"{INCREASE} and --evaluate DATA go together", "give each with the other")
        if self.searches and (self.rule.given or self.sequential or self.method == "vanilla"):
            raise UsageError(f"{INCREASE} chooses the ranks itself", "leave out other rules, --sequential and --method")

    @property
    def searches(self) -> bool:
        """Whether the ranks are searched for within a limit on the loss of quality."""
        return self.max_wer_increase is not None or self.max_ppl_increase is not None


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from a TOML file. Raises UsageError for unknown keys and invalid values."""
    content = read_toml(path, "prune", "verify")
    recipe = from_table(Recipe, path, "prune", content.get("prune", {}))
    if "verify" not in content:
        return recipe
    return replace(recipe, verify=from_table(VerifyOptions, path, "verify", content["verify"]))
