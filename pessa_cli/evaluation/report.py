"""The result of `pessa verify`: the differences on each level, their limits, and the verdict."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from pessa_cli.common.text import badness
from pessa_cli.evaluation.compare import GeneratedText, OutputDifference
from pessa_cli.evaluation.settings import SettingsComparison

LEVELS = ("settings", "weights", "blocks", "outputs", "texts")
NOT_RUN = "not compared, because the reference does not run it"
MLP_SIDES = {"input": "MLP input", "output": "MLP output"}  # how rows name the matrices of MLPs
MOST_SETTINGS = 8  # that are told one by one


@dataclass(frozen=True)
class Limits:
    """Limits for equivalent models: the largest relative errors, and the least share of equal top-1 predictions."""

    weights: float
    outputs: float
    agreement: float


# By stored dtype: storing factors rounds each product by about the unit roundoff, and the layers amplify that error.
LIMITS = {
    "F64": Limits(1e-6, 1e-4, 0.999),
    "F32": Limits(1e-6, 1e-4, 0.999),
    "F16": Limits(2e-3, 2e-2, 0.98),
    "BF16": Limits(1.6e-2, 1.6e-1, 0.9),
}


@dataclass(frozen=True)
class Difference:
    """A relative error and its place, for example "decoder.cross.2 head 4 Q-K"."""

    where: str
    error: float


@dataclass(frozen=True)
class Check:
    """The result of one comparison with a limit. `badness` sorts the failures of a level."""

    level: str  # one of LEVELS
    where: str
    finding: str
    passed: bool
    badness: float = 0.0


@dataclass(frozen=True)
class Report:
    """All results of `verify`. Errors are relative Frobenius norms.

    settings: of the files beside the weights. unequal: tensors that are missing in one model, have another dtype, or
    differ in a byte outside the blocks, with how they differ. ignored: tensors that only one model has, and that change
    nothing. skipped: blocks whose outputs could not be compared because the reference does not run them, although it
    runs others of their kind; the models do not count as the same. unreached: all blocks of the kinds that no input
    reaches, as the vision part of a model that is given text; only their weights are compared.
    """

    limits: Limits
    parameters: tuple[int, int]  # of the reference and of the candidate
    nbytes: tuple[int, int]  # of the weights, likewise
    weights: list[Difference]
    settings: SettingsComparison
    unequal: dict[str, str]
    blocks: list[Difference] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    unreached: list[str] = field(default_factory=list)
    outputs: OutputDifference | None = None
    texts: list[GeneratedText] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    @property
    def checks(self) -> list[Check]:
        """Every comparison with a limit."""
        limits, out = self.limits, self.outputs
        changed = {found.file for found in self.settings.differences}
        checks = [
            Check("settings", found.where, f"{found.reference} became {found.candidate}", False)
            for found in self.settings.differences
        ]
        checks += [Check("settings", name, "equal", True) for name in self.settings.files if name not in changed]
        checks += [_within("weights", found.where, found.error, limits.weights) for found in self.weights]
        unequal = f"{len(self.unequal)} are not the same: " + "; ".join(
            f"{name} ({how})" for name, how in list(self.unequal.items())[:3]
        )
        checks.append(Check("weights", "tensors outside the blocks", unequal, not self.unequal, float("inf")))
        checks += [_within("blocks", found.where, found.error, limits.outputs) for found in self.blocks]
        checks += [Check("blocks", name, NOT_RUN, False, math.inf) for name in self.skipped]
        if out is not None:
            checks.append(_within("outputs", out.what, out.error, limits.outputs))
            if out.agreement is not None:
                finding = f"agreement {out.agreement:.4f}, at least {limits.agreement:.4f} is needed"
                checks.append(Check("outputs", "top-1", finding, out.agreement >= limits.agreement))
        for text in self.texts:
            finding = f"{text.reference!r} became {text.candidate!r}"
            checks.append(Check("texts", text.name, finding, text.same or not text.judged))
        return checks

    @property
    def failures(self) -> list[str]:
        """A line for each level with failures: the worst one, and their number; of settings a line each."""
        lines, checks = [], self.checks
        for level in LEVELS:
            of_level = [check for check in checks if check.level == level]
            failed = [check for check in of_level if not check.passed]
            if level == "settings":
                lines += [f"{level}: {check.where}: {check.finding}" for check in failed[:MOST_SETTINGS]]
                lines += [f"{level}: {len(failed) - MOST_SETTINGS} more"] if len(failed) > MOST_SETTINGS else []
            elif failed:
                worst = max(failed, key=lambda check: check.badness)
                others = f" ({len(failed)} of {len(of_level)} checks failed)" if len(of_level) > 1 else ""
                lines.append(f"{level}: {worst.where}: {worst.finding}{others}")
        return lines

    @property
    def same(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The largest error of each measure as text: level, measure, error, limit, place."""
        limits, out = self.limits, self.outputs
        changed = self.settings.differences
        count = f"{len(changed)} differ" if changed else "equal"
        places = ", ".join(found.where for found in changed[:2])
        rows = [("settings", "config, tokenizer, ...", count, "equal", places)]
        limit = f"{limits.weights:.1e}"
        for side in ("Q-K", "V-O", "Q", "K", "input", "output", "output bias"):
            found = [d for d in self.weights if d.where.endswith(" " + side)]
            if found:
                worst = max(found, key=lambda d: badness(d.error))
                where = worst.where.removesuffix(" " + side)
                name = MLP_SIDES.get(side, side)
                rows.append(("weights", f"{name}, relative error", f"{worst.error:.2e}", limit, where))
        equal = f"{len(self.unequal)} differ" if self.unequal else "equal"
        rows.append(("weights", "all other tensors, bytes", equal, "equal", ", ".join(list(self.unequal)[:2])))
        limit = f"{limits.outputs:.1e}"
        if self.blocks:
            worst = max(self.blocks, key=lambda d: badness(d.error))
            rows.append(("blocks", "output, relative error", f"{worst.error:.2e}", limit, worst.where))
        for what, names in (("not compared: not run", self.skipped), ("not compared: other input", self.unreached)):
            if names:
                rows.append(("blocks", what, f"{len(names)} blocks", "", ", ".join(names[:2])))
        if out is not None:
            rows.append(("outputs", f"{out.what}, relative error", f"{out.error:.2e}", limit, out.inputs))
            rows.append(("outputs", f"{out.what}, largest difference", f"{out.max_difference:.2e}", "", ""))
            rows.append(("outputs", f"{out.what}, mean difference", f"{out.mean_difference:.2e}", "", ""))
            if out.kl is not None and out.agreement is not None:
                rows.append(("outputs", "KL divergence, nats", f"{out.kl:.2e}", "", ""))
                least = f"{limits.agreement:.2%}"
                rows.append(("outputs", "top-1 agreement", f"{out.agreement:.2%}", least, ""))
        return rows

    @property
    def verdict(self) -> str:
        """The result in one line, for the model card."""
        equal = sum(text.same for text in self.texts)
        texts = f"; {equal} of {len(self.texts)} texts written by both are the same" if self.texts else ""
        return ("the same model within these limits" if self.same else "not the same model") + texts

    @property
    def hint(self) -> str | None:
        """The options with which `verify` would accept the differences that have a limit; None if there are none."""
        over = [found.error for found in self.weights if not found.error <= self.limits.weights]
        measured = [*(found.error for found in self.blocks), *([self.outputs.error] if self.outputs else [])]
        over += [error for error in measured if not error <= self.limits.outputs]
        if not all(map(math.isfinite, over)):
            return None
        options = [f"--tolerance {_rounded_up(max(over))}"] if over else []
        agreement = None if self.outputs is None else self.outputs.agreement
        if agreement is not None and agreement < self.limits.agreement:
            options.append(f"--min-agreement {math.floor(100 * agreement) / 100}")
        return " ".join(options) or None

    @property
    def worst(self) -> Difference:
        """The largest error in the weights."""
        return max(self.weights, key=lambda found: badness(found.error))

    def to_dict(self) -> dict[str, Any]:
        first = {"same": self.same, "failures": self.failures, "hint": self.hint, "worst": asdict(self.worst)}
        return first | asdict(self)


def _rounded_up(error: float) -> str:
    """The error with two significant digits, not below it."""
    unit = 10.0 ** (math.floor(math.log10(error)) - 1)
    return f"{math.ceil(error / unit) * unit:.2g}"


def _within(level: str, where: str, error: float, limit: float) -> Check:
    finding = f"relative error {error:.3g}, limit {limit:.3g}"
    return Check(level, where, finding, error <= limit, badness(error))
