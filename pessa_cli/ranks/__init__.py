"""The choice of ranks from spectra by a rule or a budget. It works on numbers only, without files and torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.ranks.budget import Point as Point
    from pessa_cli.ranks.budget import candidates as candidates
    from pessa_cli.ranks.budget import predicted as predicted
    from pessa_cli.ranks.budget import ranks_for as ranks_for
    from pessa_cli.ranks.budget import trade_off as trade_off
    from pessa_cli.ranks.cost import UnmetBudgetError as UnmetBudgetError
    from pessa_cli.ranks.cost import check_budget as check_budget
    from pessa_cli.ranks.plan import ONE_WIDTH as ONE_WIDTH
    from pessa_cli.ranks.plan import PREDICTED as PREDICTED
    from pessa_cli.ranks.plan import Comparison as Comparison
    from pessa_cli.ranks.plan import RankPlan as RankPlan
    from pessa_cli.ranks.plan import check_ranks as check_ranks
    from pessa_cli.ranks.rule import Rule as Rule
    from pessa_cli.ranks.spectra import LEVELS as LEVELS
    from pessa_cli.ranks.spectra import Size as Size
    from pessa_cli.ranks.spectra import Spectra as Spectra
    from pessa_cli.ranks.spectra import Spectrum as Spectrum
    from pessa_cli.ranks.spectra import Trials as Trials
    from pessa_cli.ranks.spectra import largest_pairs as largest_pairs
    from pessa_cli.ranks.spectra import pair_shares as pair_shares
    from pessa_cli.ranks.spectra import smallest_dropped as smallest_dropped
    from pessa_cli.ranks.work import work_of as work_of
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "budget": ["Point", "candidates", "predicted", "ranks_for", "trade_off"],
            "cost": ["UnmetBudgetError", "check_budget"],
            "plan": ["ONE_WIDTH", "PREDICTED", "Comparison", "RankPlan", "check_ranks"],
            "rule": ["Rule"],
            "spectra": [
                "LEVELS",
                "Size",
                "Spectra",
                "Spectrum",
                "Trials",
                "largest_pairs",
                "pair_shares",
                "smallest_dropped",
            ],
            "work": ["work_of"],
        },
    )
