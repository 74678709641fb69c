"""Rank plans, and the rules without a budget that produce them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from pessa_cli.blocks.compact_format import PairRuns, Ranks, pair_ranks
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.seam import TITLES
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.dtypes import UNIT_ROUNDOFF
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra, Spectrum, largest_pairs, pair_shares, smallest_dropped

NO_MLP = "add MLPs with --sites mlp, if `pessa architectures` has them for this model"
ONE_WIDTH, BY_LAYER = "one width for all layers", "widths by layer"  # the plans that --uniform compares
PREDICTED = "predicted harm"  # the unit of harms that nothing was run for
NO_ATTENTION = "MLPs are cut by --mlp-ratio, --mlp-rank, --mlp-thr, or a budget such as --target-layers"

# More data would help if harms are so many times larger on unseen inputs. Measured on the encoder of Whisper tiny.en
# with 0.5 to 0.7 of its layers: 2.6 to 3.6 for 3 minutes of speech, 1.3 to 1.5 for 5, 0.8 to 1.1 for 10 and 18 minutes.
OVERFITTED = 1.3
HARMLESS = 0.01  # nats per token, or relative error

Block = TypeVar("Block", bound=Site)


@dataclass(frozen=True)
class RankPlan:
    """The ranks to keep of each seam of each site.

    ranks: by site name and by the name of the seam, one rank per group. pairs: by site name, the kept frequency pairs
    of each key/value head, for sites whose Q-K is pruned by pairs under RoPE and that do not keep all of them.
    """

    ranks: Mapping[str, Mapping[str, Ranks]]
    pairs: Mapping[str, tuple[PairRuns, ...]] = field(default_factory=dict)

    @staticmethod
    def stored(sites: Iterable[Site]) -> RankPlan:
        """Return the plan that keeps everything that the file stores of these sites."""
        sites = list(sites)
        pairs = {site.name: seam.pairs for site in sites for seam in site.seams if seam.pairs is not None}
        return RankPlan({site.name: site.ranks for site in sites}, pairs)

    @staticmethod
    def full(sites: Iterable[Site]) -> RankPlan:
        """Return the plan that keeps all that the blocks had before any pruning."""
        return RankPlan({site.name: {seam.name: seam.full for seam in site.seams} for site in sites})

    def kept(self, site: Block) -> Block:
        """Return the site as a compact file stores it after pruning by this plan."""
        return site.keeping(self.ranks[site.name], self.pairs.get(site.name))


@dataclass(frozen=True)
class Comparison:
    """The plan that was taken, and the harm of each plan that it was compared with.

    harms: the KL divergence of the model's output in nats per token, or the relative error of its hidden states, by
    what the plan is, on inputs that the statistics have not seen; or what the spectra predict, summed over the blocks.
    unit: which of these. seen: the harm of the taken plan on inputs that the statistics have seen, and data: how many
    data that were, in words; if they were measured. held_out: whether the statistics left inputs out.
    """

    plan: RankPlan
    taken: str
    harms: Mapping[str, float]
    unit: str
    seen: float | None = None
    data: str = ""
    held_out: bool = True

    @property
    def warning(self) -> str | None:
        """A sentence if the cuts are fitted to the calibration data more than to what the data are a sample of.

        Then the harm is much larger on inputs that the statistics have not seen. A harm that is small on these, too, is
        no reason for more data.
        """
        harm = self.harms[self.taken]
        if not self.held_out:
            return "more calibration data would help: with one input none can be held out, so harms come out too small"
        if self.seen is None or harm < HARMLESS or harm <= OVERFITTED * self.seen:
            return None
        return (
            f"more calibration data would help: harm {harm:.2g} on inputs not seen, {self.seen:.2g} on inputs seen "
            f"({self.data})"
        )

    def to_dict(self) -> dict[str, object]:
        """What the manifest says of it."""
        known = {} if self.seen is None else {"harm_on_seen_inputs": self.seen}
        fitted = {} if self.held_out else {"held_out": False}
        return {"taken": self.taken, "harms": dict(self.harms), "unit": self.unit, **known, **fitted}


def check_ranks(sites: Sequence[Site], rule: Rule) -> None:
    """Raise UsageError if the rule has a rank that is larger than every head, or a width larger than every MLP.

    Also if it has options for MLPs, but no MLP was chosen, or a criterion for attention, but no attention.
    """
    heads = max((seam.width for site in sites for seam in site.seams if seam.name != "mlp"), default=0)
    channels = max((seam.width for site in sites for seam in site.seams if seam.name == "mlp"), default=0)
    if rule.of_mlp and not channels:
        raise UsageError(f"{rule.of_mlp[0].flag}: no MLP is among the chosen blocks", NO_MLP)
    if rule.of_attention and not heads:
        raise UsageError(f"{rule.of_attention[0].flag}: no attention is among the chosen blocks", NO_ATTENTION)
    for flag, rank, width, what in (
        ("--rank", rule.rank, heads, "the largest head has {} directions"),
        ("--min-rank", rule.min_rank, heads, "the largest head has {} directions"),
        ("--mlp-rank", rule.mlp_rank, channels, "the widest MLP has {} channels"),
    ):
        if rank is not None and rank > width > 0:
            raise UsageError(
                f"{flag} {rank}: {what.format(width)}, so nothing would be pruned",
                f"give at most {width}",
            )


def plan_ranks(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule) -> RankPlan:
    """Apply a rule without a budget to every site.

    Raises PessaError if the rule would prune all of Q-K or all of V-O or all channels of an MLP, and UsageError if
    --rope-ratio is given but no site has frequency pairs.
    """
    whole = [site for site in sites if "qk" in site.ranks and "qk" not in spectra[site.name].seams]
    pairs = _kept_pairs(whole, spectra, rule)
    dtypes = {site.name: site.dtype for site in sites}
    ranks: dict[str, dict[str, Ranks]] = {site.name: {seam.name: seam.full for seam in site.seams} for site in sites}
    for name in ("qk", "vo"):
        found = {site.name: each for site in sites if (each := spectra[site.name].seams.get(name)) is not None}
        seams = {site.name: site.seam(name) for site in sites if site.name in found}
        for place, kept in _seam_ranks(found, dtypes, rule, name).items():
            ranks[place][name] = tuple(seams[place].always_kept + rank for rank in kept)
    for site in sites:
        if isinstance(site, MlpSite):
            ranks[site.name]["mlp"] = (_channels(site, spectra[site.name], rule),)
    for place, runs in pairs.items():
        ranks[place]["qk"] = pair_ranks(runs)
    return RankPlan(ranks, pairs)


def _kept_pairs(sites: Sequence[Site], spectra: Mapping[str, Spectra], rule: Rule) -> dict[str, tuple[PairRuns, ...]]:
    """Return the frequency pairs that the rule keeps, for sites that do not keep all of them.

    Pairs that the file does not store are never kept. Raises UsageError if --rope-ratio finds no frequency pairs.
    """
    if rule.rope_ratio is None:
        return {site.name: pairs for site in sites if (pairs := site.seam("qk").pairs) is not None}
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


def _seam_ranks(spectra: Mapping[str, Spectrum], dtypes: Mapping[str, str], rule: Rule, seam: str) -> dict[str, Ranks]:
    """Return the ranks of the seams of one name by site name. Raises PessaError if nothing would remain of them."""
    if not spectra:
        return {}
    if rule.ratio is not None:
        counts = smallest_dropped(spectra, rule.ratio)
    else:
        counts = {name: _kept_directions(spectrum, rule, seam, dtypes[name]) for name, spectrum in spectra.items()}
    plan: dict[str, Ranks] = {}
    for name, kept in counts.items():
        plan[name] = tuple(int(r) for r in _rounded(kept, rule, spectra[name].shape[1]))
    if not any(any(ranks) for ranks in plan.values()):
        largest = max(float(spectrum.max()) for spectrum in spectra.values())
        raise PessaError(
            f"the rule ({rule}) would prune all of {TITLES[seam]}: the largest singular value is {largest:.3g}",
            "lower the threshold; `pessa inspect` shows the spectra",
        )
    return plan


def _channels(site: MlpSite, spectra: Spectra, rule: Rule) -> int:
    """Return how many channels an MLP keeps. Raises PessaError if it would keep none."""
    spectrum = spectra.seams["mlp"]
    width = int(spectrum.shape[1])
    if rule.mlp_ratio is not None:
        kept = width - int(rule.mlp_ratio * width)
    elif rule.mlp_rank is not None:
        kept = min(rule.mlp_rank, width)
    elif rule.mlp_thr is not None:
        kept = int((spectrum > rule.mlp_thr).sum())
        if not kept:
            raise PessaError(
                f"the rule ({rule}) would leave {site.name} without channels: its largest value is "
                f"{spectrum.max():.3g}",
                "lower the threshold; `pessa inspect --sites mlp` shows the spectra",
            )
    elif rule.by_rounding and site.zero_at_zero:
        # The weights decide: other inputs may use channels that the calibration data do not use.
        norms = spectrum if spectra.norms is None else spectra.norms[None]
        kept = max(1, int(_without_tail(norms, UNIT_ROUNDOFF[site.dtype])[0]))
    else:
        kept = width
    return min(width, site.kept, -(-kept // rule.round_to) * rule.round_to)  # a compact file may have fewer


def _kept_directions(spectrum: Spectrum, rule: Rule, seam: str, dtype: str) -> NDArray[np.int64]:
    """Return how many leading directions each head keeps, (G,), under a rule that looks at one head at a time.

    `--energy` and lossless compare the norm of the dropped tail with that of the whole spectrum.
    """
    heads, width = spectrum.shape
    if rule.rank is not None:
        return np.full(heads, min(rule.rank, width))
    if rule.qk_thr is not None or rule.vo_thr is not None:
        threshold = rule.qk_thr if seam == "qk" else rule.vo_thr
        return np.full(heads, width) if threshold is None else (spectrum > threshold).sum(-1)
    return _without_tail(spectrum, UNIT_ROUNDOFF[dtype] if rule.energy is None else math.sqrt(1 - rule.energy))


def _without_tail(values: Spectrum, loss: float) -> NDArray[np.int64]:
    """Return how many leading values of each group, (G,), remain without the longest tail that is small enough.

    values: (G, c). The norm of the tail is at most the share `loss` of the norm of all values of the group.
    """
    largest = values.max(-1, keepdims=True)
    relative = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)  # squares cannot overflow
    tails = np.sqrt(np.cumsum(relative[:, ::-1] ** 2, axis=-1))[:, ::-1]  # from each value to the last
    kept: NDArray[np.int64] = (tails > loss * tails[:, :1]).sum(-1)
    return kept
