"""Rank plans, and the rules without a budget that produce them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from pessa_cli.blocks.compact_format import PairRuns, Ranks, pair_ranks
from pessa_cli.blocks.site import Site, with_ranks
from pessa_cli.checkpoint.dtypes import UNIT_ROUNDOFF
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra, Spectrum, largest_pairs, pair_shares, smallest_dropped


@dataclass(frozen=True)
class RankPlan:
    """The ranks to keep for each site, by site name.

    qk, vo: one rank per key/value head. pairs: the kept frequency pairs of each key/value head, for sites whose Q-K is
    pruned by pairs under RoPE and that do not keep all of them.
    """

    qk: Mapping[str, Ranks]
    vo: Mapping[str, Ranks]
    pairs: Mapping[str, tuple[PairRuns, ...]] = field(default_factory=dict)

    @staticmethod
    def stored(sites: Iterable[Site]) -> RankPlan:
        """Return the plan that keeps everything that the file stores of these sites."""
        sites = list(sites)
        pairs = {site.name: site.pairs for site in sites if site.pairs is not None}
        return RankPlan(
            {site.name: site.qk_ranks for site in sites}, {site.name: site.vo_ranks for site in sites}, pairs
        )

    def kept(self, site: Site) -> Site:
        """Return the site as a compact file stores it after pruning by this plan."""
        return with_ranks(site, self.qk[site.name], self.vo[site.name], self.pairs.get(site.name))


def check_ranks(sites: Iterable[Site], rule: Rule) -> None:
    """Raise UsageError if the rule has a rank that is larger than every head of the sites."""
    width = max(site.head_dim for site in sites)
    for flag, rank in (("--rank", rule.rank), ("--min-rank", rule.min_rank)):
        if rank is not None and rank > width:
            raise UsageError(
                f"{flag} {rank}: the largest head has {width} directions, so nothing would be pruned",
                f"give at most {width}",
            )


def plan_ranks(sites: list[Site], spectra: Mapping[str, Spectra], rule: Rule) -> RankPlan:
    """Apply a rule without a budget to every site.

    Raises PessaError if the rule would prune all of Q-K or all of V-O, and UsageError if --rope-ratio is given but no
    site has frequency pairs.
    """
    qk = {site.name: spectra[site.name].qk for site in sites}
    vo = {site.name: spectra[site.name].vo for site in sites}
    dtypes = {site.name: site.dtype for site in sites}
    always_kept = {site.name: site.always_kept for site in sites}
    rotated = [site for site in sites if qk[site.name] is None]
    pairs = _kept_pairs(rotated, spectra, rule)
    return RankPlan(
        qk={
            name: tuple(always_kept[name] + rank for rank in ranks)
            for name, ranks in _side_ranks(
                {name: spectrum for name, spectrum in qk.items() if spectrum is not None}, dtypes, rule, "Q-K"
            ).items()
        }
        | {site.name: pair_ranks(pairs[site.name]) if site.name in pairs else site.full for site in rotated},
        vo=_side_ranks(vo, dtypes, rule, "V-O"),
        pairs=pairs,
    )


def _kept_pairs(sites: list[Site], spectra: Mapping[str, Spectra], rule: Rule) -> dict[str, tuple[PairRuns, ...]]:
    """Return the frequency pairs that the rule keeps, for sites that do not keep all of them.

    Pairs that the file does not store are never kept. Raises UsageError if --rope-ratio finds no frequency pairs.
    """
    if rule.rope_ratio is None:
        return {site.name: site.pairs for site in sites if site.pairs is not None}
    worth = {site.name: found for site in sites if (found := spectra[site.name].pairs) is not None}
    if not worth:
        raise UsageError(
            "--rope-ratio: none of the chosen blocks has Q-K that can be pruned by RoPE frequency pairs", "leave it out"
        )
    shares = {name: pair_shares(found) for name, found in worth.items()}
    plan: dict[str, tuple[PairRuns, ...]] = {}
    for name, counts in smallest_dropped(shares, rule.rope_ratio).items():
        width = 2 * worth[name].shape[1]
        kept = -(-_rounded(2 * counts, rule, width) // 2)
        there = (worth[name] > 0).sum(-1)  # the other pairs are zero already
        pairs = largest_pairs(worth[name], np.minimum(kept, there))
        if sum(pair_ranks(pairs)) < width * len(pairs):
            plan[name] = pairs
    return plan


def _rounded(kept: NDArray[np.int64], rule: Rule, width: int) -> NDArray[np.int64]:
    """Round ranks up to a multiple of `round_to` and to at least `min_rank`, but not above `width`, the head size."""
    step, least = min(rule.round_to, width), min(rule.min_rank, width)  # numpy rejects integers of more than 64 bits
    return (-(-kept // step) * step).clip(least, width)


def _side_ranks(spectra: Mapping[str, Spectrum], dtypes: Mapping[str, str], rule: Rule, what: str) -> dict[str, Ranks]:
    """Return the ranks of one side, `what` is "Q-K" or "V-O", of all sites. Raises PessaError if all are zero."""
    if not spectra:
        return {}
    if rule.ratio is not None:
        counts = smallest_dropped(spectra, rule.ratio)
    else:
        counts = {name: _kept_directions(spectrum, rule, what, dtypes[name]) for name, spectrum in spectra.items()}
    plan: dict[str, Ranks] = {}
    for name, kept in counts.items():
        plan[name] = tuple(int(r) for r in _rounded(kept, rule, spectra[name].shape[1]))
    if not any(any(ranks) for ranks in plan.values()):
        largest = max(float(spectrum.max()) for spectrum in spectra.values())
        raise PessaError(
            f"the rule ({rule}) would prune all of {what}: the largest singular value is {largest:.3g}",
            "lower the threshold; `pessa inspect` shows the spectra",
        )
    return plan


def _kept_directions(spectrum: Spectrum, rule: Rule, what: str, dtype: str) -> NDArray[np.int64]:
    """Return how many leading directions each head keeps, (G,), under a rule that looks at one head at a time.

    `--energy` and lossless compare the norm of the dropped tail with that of the whole spectrum.
    """
    heads, width = spectrum.shape
    if rule.rank is not None:
        return np.full(heads, min(rule.rank, width))
    if rule.qk_thr is not None or rule.vo_thr is not None:
        threshold = rule.qk_thr if what == "Q-K" else rule.vo_thr
        return np.full(heads, width) if threshold is None else (spectrum > threshold).sum(-1)
    loss = UNIT_ROUNDOFF[dtype] if rule.energy is None else math.sqrt(1 - rule.energy)
    largest = spectrum[:, :1]
    relative = np.divide(spectrum, largest, out=np.zeros_like(spectrum), where=largest > 0)  # squares cannot overflow
    tails = np.sqrt(np.cumsum(relative[:, ::-1] ** 2, axis=-1))[
        :, ::-1
    ]  # the norm of the spectrum from each direction to the last
    kept: NDArray[np.int64] = (tails > loss * tails[:, :1]).sum(-1)
    return kept
