"""Plans for a budget, compared at the model's output on inputs that the statistics have not seen.

The harms of single cuts do not add up, and they are too small if they are measured on the inputs that the cuts were
fitted to. So the plan of lowest predicted harm is assembled as a whole and compared with plain ones of the same size,
and the one with the lowest harm is taken.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pessa_cli.algebra.compare import kl_divergence
from pessa_cli.blocks.site import Site
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.models.hooks import block_modules, output_of
from pessa_cli.models.inputs import Inputs
from pessa_cli.ranks.budget import candidates
from pessa_cli.ranks.cost import UnmetBudgetError
from pessa_cli.ranks.plan import ONE_WIDTH, Comparison, RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Size, Spectra
from pessa_cli.surgery.decomposition import Decomposition

STEPS = 8  # of the bisection for --max-error: shares are found to 1/256


class OutputHarm:
    """Measures the change of a model's output when its blocks are cut by a plan, on a few inputs.

    The outputs of the whole model are kept in an unnamed temporary file, since those of a language model are large.
    decomposition: of the blocks, by statistics that do not include these inputs.
    """

    def __init__(
        self, loaded: Any, sites: Sequence[Site], inputs: Sequence[Inputs], decomposition: Decomposition
    ) -> None:
        self._loaded, self._sites, self._inputs, self._decomposition = loaded, sites, inputs, decomposition
        self._modules = block_modules(sites, loaded)
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by __exit__
        self._known: list[NDArray[np.float32]] = []
        self.unit = ""
        with torch.inference_mode():
            for given in inputs:
                kind, output = output_of(loaded, given)
                self.unit = kind
                values = output.reshape(-1, output.shape[-1])
                array = np.ascontiguousarray(values.float().cpu().numpy())
                start = self._file.tell()
                self._file.write(array.data)
                self._file.flush()
                known = np.memmap(self._file, np.float32, "r", start, array.shape)
                self._known.append(known)
                self._file.seek(start + array.nbytes)

    def of(self, plan: RankPlan) -> float:
        """Return the harm of a plan; the blocks of the loaded model stay cut."""
        for site in self._sites:
            cut = self._decomposition.cut(plan.kept(site), "dense")
            set_block(site, self._modules[site.name], cut)
        total = whole = 0.0
        with torch.inference_mode():
            for given, known in zip(self._inputs, self._known, strict=True):
                _, output = output_of(self._loaded, given)
                found = output.reshape(-1, output.shape[-1]).float()
                expected = torch.from_numpy(np.array(known)).to(output.device)
                if self.unit == "logits":
                    total += float(kl_divergence(expected, found).sum())
                    whole += len(expected)
                else:
                    total += float((found - expected).double().square().sum())
                    whole += float(expected.double().square().sum())
        harm = total / whole if whole else 0.0
        if not math.isfinite(harm):
            return math.inf
        return max(0.0, harm) if self.unit == "logits" else harm**0.5

    def __enter__(self) -> OutputHarm:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._known.clear()
        self._file.close()


def best_plan(
    harm: OutputHarm,
    sites: Sequence[Site],
    spectra: Mapping[str, Spectra],
    rule: Rule,
    whole: Size,
    progress: Progress,
) -> Comparison:
    """Return the plan that meets a budget with the least harm, of those that `ranks.budget.candidates` names.

    With `uniform` it is the plan with one width for all layers, and the other shows what that costs.
    For `max_error` it is the smallest plan whose harm is at most that. Raises UnmetBudgetError if the budget cannot be
    met, and PessaError if no plan has so little harm.
    """
    unit = {"logits": "nats per token", "hidden states": "relative error of the hidden states"}[harm.unit]

    def best_within(budget: Rule, progress: Progress) -> Comparison:
        named = candidates(sites, spectra, budget, whole)
        harms: dict[str, float] = {}
        with progress("comparing plans", 0, len(named)) as tick:
            for name, plan in named.items():
                harms[name] = harm.of(plan)
                tick(0, 1)
        if min(harms.values()) == math.inf:
            raise PessaError(
                "the outputs of all plans that were tried are not finite on the calibration data",
                "compare the model's own outputs with other data, or give a larger budget",
            )
        taken = ONE_WIDTH if rule.uniform else min(harms, key=lambda name: harms[name])
        return Comparison(named[taken], taken, harms, unit)

    if rule.max_error is None:
        return best_within(rule, progress)
    return _smallest(lambda share: best_within(rule.with_share(share), quietly), rule.max_error, unit, progress)


def on_seen_inputs(comparison: Comparison, harm: OutputHarm, data: str) -> Comparison:
    """Return the comparison with the harm of its plan on inputs that the statistics have seen.

    harm: measures it on these inputs, with the same decomposition. data: how many data they are a part of, in words.
    """
    return replace(comparison, seen=harm.of(comparison.plan), data=data)


def _smallest(best_within: Callable[[float], Comparison], most: float, unit: str, progress: Progress) -> Comparison:
    """Return the plan with the smallest share of the parameters whose harm is at most `most`, by bisection.

    best_within: returns the best plan for a share. Raises PessaError if no plan that was tried has so little harm.
    """
    low, high, least = 0.0, 1.0, float("inf")
    best: Comparison | None = None
    with progress("searching for the smallest plan", 0, STEPS) as tick:
        for _ in range(STEPS):
            share, harm = (low + high) / 2, float("inf")
            with suppress(UnmetBudgetError):  # the share is smaller than what must remain
                tried = best_within(share)
                harm = tried.harms[tried.taken]
            least = min(least, harm)
            if harm <= most:
                best, high = tried, share
            else:
                low = share
            tick(0, 1)
    if best is None:
        raise PessaError(
            f"--max-error {most:g}: the harm of every plan is larger, at least {least:.3g} {unit}",
            "allow more, or calibrate on more data",
        )
    return best
