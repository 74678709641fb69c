"""What a budget counts: parameters, bytes or multiply-adds, how much of it there is, and how much may remain."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.seam import Seam
from pessa_cli.blocks.site import Site, count
from pessa_cli.checkpoint.dtypes import ITEM_BYTES
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Size
from pessa_cli.ranks.work import Work, check_work

Cost = Callable[[Site, Mapping[str, Ranks]], float]  # of a block with these ranks; linear in each of them


class UnmetBudgetError(PessaError):
    """Raised for a budget that is smaller than what must remain."""


class Budget(NamedTuple):
    """A budget in numbers.

    sites: the blocks that are cut for it. cost: of one of them. what: the things that are counted. now: how many there
    are, and `most`: how many may remain. hint: what to do if it cannot be met.
    """

    sites: Sequence[Site]
    cost: Cost
    what: str
    now: float
    most: float
    hint: str = "give {share:g} or more, or choose more --sites"

    def check(self, left: float, rule: Rule) -> None:
        """Raise UnmetBudgetError if more than the budget is left after dropping all that may be pruned."""
        if left > self.most:
            raise UnmetBudgetError(
                f"{rule}: the budget is {self.most:,.0f} of {self.now:,.0f} {self.what}, but {left:,.0f} remain after "
                "dropping all that may be pruned",
                self.hint.format(share=math.ceil(1000 * left / self.now) / 1000),
            )


def budget_of(sites: Sequence[Site], rule: Rule, whole: Size) -> Budget:
    """Return the budget of a rule for the chosen blocks of a model whose total size is `whole`; not for `max_error`.

    Raises the errors of `check_work`.
    """
    check_work(sites, rule, whole)
    cost, priced = cost_of(rule, whole), sites
    if rule.target_size is not None:
        most = float(rule.target_size)
        return Budget(sites, cost, "bytes", whole.nbytes, most, "give a larger size")
    if rule.target_params is not None:
        return Budget(sites, cost, "parameters", whole.parameters, rule.target_params * whole.parameters)
    if rule.target_flops is not None:
        what, share = "multiply-adds of the chosen blocks", rule.target_flops
    elif rule.target_layers is not None:
        what, share = "parameters of the chosen blocks", rule.target_layers
    else:
        assert rule.target_attention is not None
        what, share = "attention parameters", rule.target_attention
        priced = [site for site in sites if "mlp" not in site.ranks]
    now = sum(cost(site, site.ranks) for site in priced)
    return Budget(priced, cost, what, now, share * now)


def check_budget(sites: Sequence[Site], rule: Rule, whole: Size) -> None:
    """Raise UnmetBudgetError for a budget that no plan can meet, as far as the shapes of the blocks tell.

    Also UsageError if the inputs that a budget of work states do not fit the model.
    """
    if not rule.budgeted or rule.max_error is not None:
        return
    budget = budget_of(sites, rule, whole)
    left = budget.now
    for site in budget.sites:
        least = {seam.name: tuple(_least(seam, rule, rank) for rank in seam.ranks) for seam in site.seams}
        left -= budget.cost(site, site.ranks) - budget.cost(site, least)
    budget.check(left, rule)


def _least(seam: Seam, rule: Rule, rank: int) -> int:
    """Return what surely remains of a group of which `rank` directions or channels are stored."""
    if seam.symmetry == "fixed":
        return rank
    return min(rank, rule.round_to if seam.name == "mlp" else seam.always_kept + rule.min_rank)


def cost_of(rule: Rule, whole: Size) -> Cost:
    """Return what a budget counts; parameters if it is none. Raises UsageError as `Work.of` does."""
    if rule.target_flops is not None:
        return Work.of(rule, whole).multiply_adds
    return parameters if rule.target_size is None else _nbytes


def parameters(site: Site, ranks: Mapping[str, Ranks]) -> float:
    """Return the parameters of a block with these ranks, in weights and biases."""
    return count(site.shapes(ranks))


def _nbytes(site: Site, ranks: Mapping[str, Ranks]) -> float:
    return ITEM_BYTES[site.dtype] * parameters(site, ranks)
