"""An attention block of two heads of width 4, for tests of ranks, and its spectra, trials and plans."""

from __future__ import annotations

from collections.abc import Mapping

from pessa_cli.blocks.compact_format import PairRuns, Ranks
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.spectra import Spectra, Spectrum, Trials

SITE = AttentionSite(
    spec=ARCHITECTURES["whisper"][0],
    layer=0,
    q="q",
    k="k",
    v="v",
    o="o",
    heads=2,
    kv_heads=2,
    head_dim=4,
    query_width=8,
    key_width=8,
    output_width=8,
    biases=frozenset(),
    dtype="F32",
    qk_ranks=(4, 4),
    vo_ranks=(4, 4),
)


def spectra_by(
    qk: Spectrum | None,
    vo: Spectrum,
    calibrated: bool = False,
    trials: Trials | None = None,
    pairs: Spectrum | None = None,
) -> Spectra:
    """Return the spectra of an attention block; without `qk` Q-K has no spectrum."""
    return Spectra({"vo": vo} if qk is None else {"qk": qk, "vo": vo}, calibrated, trials, pairs)


def trials_by(qk: tuple[float, ...], vo: tuple[float, ...], harm: float) -> Trials:
    """Return the trials of an attention block."""
    return Trials({"qk": qk, "vo": vo}, harm)


def plan_by(
    qk: Mapping[str, Ranks], vo: Mapping[str, Ranks], pairs: Mapping[str, tuple[PairRuns, ...]] | None = None
) -> RankPlan:
    """Return a plan for attention blocks from the ranks of Q-K and of V-O by site name."""
    return RankPlan({name: {"qk": qk[name], "vo": vo[name]} for name in qk}, pairs or {})


def ranks_by(plan: RankPlan, seam: str) -> dict[str, Ranks]:
    """Return the ranks of one seam of a plan by site name."""
    return {name: ranks[seam] for name, ranks in plan.ranks.items() if seam in ranks}
