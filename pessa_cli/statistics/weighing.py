"""What calibration statistics say to the decomposition of a block."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.heads import live
from pessa_cli.algebra.rope import PairWeighting
from pessa_cli.algebra.weighted import Weighting, scales, traces
from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.site import Site
from pessa_cli.statistics.sums import BlockStatistics

SHRINKAGE = 0.3  # towards the plain rule, however much data there is
NOISE = 1e-10  # of a variance, against the second moment that it is the difference of
RIDGE = 1e-2  # of the refits of W_O and of frequency pairs, likewise
UNIFORM = 0.3  # of the keys' weighting: all keys that a query sees alike, beside what the output makes of them


@dataclass(frozen=True)
class Refit:
    """What the statistics of a block contribute once its decomposition is known: the refit to what is kept.

    center: (G, d), the mean input of W_O that a value bias can subtract and the output bias adds again, before the
    value bias; None if the block has no such biases. moment: (H d, H d), the second moment of the inputs of W_O less
    their center. ridge: the regularisation of the refit of W_O. pairs: under RoPE, the weighting by which the kept
    frequency pairs compensate for the others.
    """

    center: Tensor | None
    moment: Tensor
    ridge: float
    pairs: PairWeighting | None


@dataclass(frozen=True)
class Weighed:
    """The statistics of a block in the form that its decomposition takes them.

    qk and vo: the weightings of the two products; that of Q-K is not used if nothing merges there. refit: what is
    needed after the decomposition.
    """

    qk: Weighting
    vo: Weighting
    refit: Refit


def weigh(found: BlockStatistics, site: Site, v_bias: Tensor | None) -> Weighed:
    """The statistics of a block in the form that `factors` takes them; `v_bias` is (G, d) as in the file."""
    g, m, d = site.kv_heads, site.group, site.head_dim
    frames = found.frames.clamp(min=1)
    mean, moment = found.mixture / frames, found.mixtures / frames
    center = None
    if "v" in site.biases and site.moves_v_bias:
        # A group's query heads share their values, and so the one center that these can be given.
        center = mean.reshape(g, m, d).mean(1)
        shift = center.unsqueeze(1).expand(g, m, d).reshape(-1)
        outer = torch.outer(shift, mean)
        moment = moment - outer - outer.mT + torch.outer(shift, shift)
    heads = torch.arange(g * m)
    if float(moment.trace()) <= NOISE * float(found.mixtures.trace() / frames):
        moment = torch.zeros_like(moment)  # always the same: rounding is no second moment
    own = moment.reshape(g * m, d, g * m, d)[heads, :, heads].reshape(g, m, d, d).mean(1)
    few = d / float(frames)  # as many frames as directions say as much of them as the weights do
    return Weighed(
        qk=Weighting(found.queries / frames, _key_side(found) / (frames * d), SHRINKAGE + few),
        vo=Weighting(own, None, SHRINKAGE + few),
        refit=Refit(
            center=center if center is None or v_bias is None else center - v_bias.double(),
            moment=moment,
            ridge=RIDGE + m * g * few,
            pairs=PairWeighting(found.pairs / (frames * d), RIDGE + few) if site.by_pairs else None,
        ),
    )


def _key_side(found: BlockStatistics) -> Tensor:
    """What the keys are weighed by: mostly by what comes of their errors in the output, and so in part are the heads.

    The trace is the geometric mean of those of `keys` and of `influence`, brought to the same sum over the heads.
    """
    if not len(found.influence):
        return found.keys
    seen, counts = traces(found.keys), traces(found.influence)
    if not bool((counts > 0).any()):
        return found.keys
    trace = (seen * counts * (seen.sum() / counts.sum())).sqrt()
    keys, influence = (
        moment / own.where(own > 0, 1.0) for moment, own in ((found.keys, seen), (found.influence, counts))
    )
    return trace * (UNIFORM * keys + (1 - UNIFORM) * influence)


def independent(moment: Tensor) -> int:
    """How many directions a sum of outer products has, at most as many as it had independent terms."""
    _, inverse = scales(moment)
    values = torch.linalg.eigvalsh(inverse.unsqueeze(-1) * moment * inverse)
    return int((values > 1e-10 * values[-1]).sum())


def refit_moment(refit: Refit, transform: Tensor, site: Site) -> Tensor:
    """The second moment of what the new directions of V-O carry, (H d, H d), for their `transform`, (G, d, d)."""
    h, d = site.heads, site.head_dim
    each = transform.repeat_interleave(site.group, 0)  # (H, d, d)
    moment = refit.moment.reshape(h, d, h * d)
    moment = (each.mT @ moment).reshape(h * d, h, d).transpose(0, 1)  # (H, H d, d)
    return (moment @ each).transpose(0, 1).reshape(h * d, h * d)


def kept_directions(site: Site, ranks: Ranks) -> Tensor:
    """Where the kept directions of V-O stand among the inputs of W_O."""
    return live(ranks, site.head_dim, site.group)
