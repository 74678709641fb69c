"""Turning the calibration statistics of a block into the weightings of its decomposition and of its refit."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pessa_cli.algebra.channels import ChannelWeights
from pessa_cli.algebra.heads import live
from pessa_cli.algebra.rope import PairWeighting
from pessa_cli.algebra.weighted import Weighting, scales, traces
from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.statistics.sums import AttentionStatistics, MlpStatistics

SHRINKAGE = 0.3  # of the weightings towards the Gram matrices of the weights alone; at least this much with any data
NOISE = 1e-10  # a variance below this share of the second moment from which it was computed is rounding noise
RIDGE = 1e-2  # regularization of the refits of W_O and of frequency pairs; at least this much with any data
CHANNEL_PRIOR = 0.1  # the weight of the second moment of an MLP's channels that follows from its weights alone
METRIC_SHRINKAGE = 1.0  # the weight of the identity in the metric of an MLP's output, relative to the measured one
CHANNEL_RIDGE = 0.03  # regularization of the refit of an MLP's readers, relative to each channel
UNIFORM = 0.3  # the share of `keys`, which treats all visible keys alike, in the keys' weighting; else `influence`


@dataclass(frozen=True)
class Refit:
    """The statistics that a block needs after its decomposition, for the refit to the kept directions.

    center: (G, d), the mean input of W_O without the value bias, which the value bias subtracts and the output bias
    adds again; None if the block does not have both biases. moment: (H d, H d), the second moment of the inputs of W_O
    after subtracting that mean. ridge: the regularization of the refit of W_O. pairs: under RoPE, the weighting by
    which the kept frequency pairs compensate for the pairs that are cut; otherwise None.
    """

    center: Tensor | None
    moment: Tensor
    ridge: float
    pairs: PairWeighting | None


@dataclass(frozen=True)
class ChannelRefit:
    """The statistics for the refit of the matrix that reads the channels of an MLP.

    moment: (F, F), the second moment of the channels, without their means if `mean` can be returned through a bias.
    mean: (F,), zero without a bias. ridge: the regularization of the refit.
    """

    moment: Tensor
    mean: Tensor
    ridge: float


def channel_refit(found: MlpStatistics, weights: ChannelWeights) -> ChannelRefit:
    """Compute the refit of an MLP from its statistics and weights.

    Data of one domain say little of channels that it does not use. So a second moment of uncorrelated channels, with
    variances in proportion to the squared norms of the weights that write them, is added with the weight CHANNEL_PRIOR,
    relative to the median ratio of measured and such variances.
    """
    frames = found.frames.clamp(min=1)
    mean, moment = found.total / frames, found.moment / frames
    if weights.out_bias is None:
        mean = torch.zeros_like(mean)
    moment = moment - torch.outer(mean, mean)
    variances = weights.into.double().square().sum(-1).prod(0).to(moment.device)
    there = variances > 0
    if there.any():
        ratio = (moment.diagonal()[there] / variances[there]).median()
        moment = moment + torch.diag(CHANNEL_PRIOR * ratio * variances)
    return ChannelRefit(moment, mean, CHANNEL_RIDGE)


def output_root(found: MlpStatistics) -> Tensor:
    """Return R, (D_o, D_o), such that `|R e|^2` is how much an error e of an MLP's output matters to the model's.

    R^T R is the Fisher information of the output, scaled to a mean diagonal of 1, plus the identity; without trial cuts
    it is the identity.
    """
    scale, identity = found.metric.diagonal().mean(), torch.eye(len(found.metric)).to(found.metric)
    if float(scale) <= 0:
        return identity
    root: Tensor = torch.linalg.cholesky(found.metric / scale + METRIC_SHRINKAGE * identity).mT
    return root


@dataclass(frozen=True)
class Weighed:
    """The weightings of a block that follow from its statistics.

    qk, vo: the weightings of the two products; that of Q-K is not used if Q-K cannot be merged. refit: for the refit
    after the decomposition.
    """

    qk: Weighting
    vo: Weighting
    refit: Refit


def weigh(found: AttentionStatistics, site: AttentionSite, v_bias: Tensor | None) -> Weighed:
    """Compute the weightings of a block from its statistics.

    v_bias: (G, d), the value bias as in the file, or None without one.
    """
    g, m, d = site.kv_heads, site.group, site.head_dim
    frames = found.frames.clamp(min=1)
    mean, moment = found.mixture / frames, found.mixtures / frames
    center = None
    if "v" in site.biases and site.moves_v_bias:
        # The query heads of a group share the value bias, so that only their common mean can be subtracted.
        center = mean.reshape(g, m, d).mean(1)
        shift = center.unsqueeze(1).expand(g, m, d).reshape(-1)
        outer = torch.outer(shift, mean)
        moment = moment - outer - outer.mT + torch.outer(shift, shift)
    heads = torch.arange(g * m)
    if float(moment.trace()) <= NOISE * float(found.mixtures.trace() / frames):
        moment = torch.zeros_like(moment)  # the inputs are constant, so that only rounding errors are left
    own = moment.reshape(g * m, d, g * m, d)[heads, :, heads].reshape(g, m, d, d).mean(1)
    few = d / float(frames)  # with only d frames, the statistics count as much as the weights alone
    merged = slice(site.always_kept, None)  # the directions of each head that Q-K merges
    queries, keys, influence = (sums[:, merged, merged] for sums in (found.queries, found.keys, found.influence))
    return Weighed(
        qk=Weighting(queries / frames, _key_side(keys, influence) / (frames * d), SHRINKAGE + few),
        vo=Weighting(own, None, SHRINKAGE + few),
        refit=Refit(
            center=center if center is None or v_bias is None else center - v_bias.double(),
            moment=moment,
            ridge=RIDGE + m * g * few,
            pairs=PairWeighting(found.pairs / (frames * d), RIDGE + few) if site.by_pairs else None,
        ),
    )


def _key_side(keys: Tensor, influence: Tensor) -> Tensor:
    """Return the weighting of the keys, (G, c, c): mostly by how their errors change the output, partly uniformly.

    keys, influence: as in AttentionStatistics, for the c directions of each head that are merged. The trace of each
    head, which weights the heads against one another, is the geometric mean of the traces of `keys` and of `influence`
    after both were scaled to the same sum over the heads.
    """
    if not len(influence):
        return keys
    seen, counts = traces(keys), traces(influence)
    if not bool((counts > 0).any()):
        return keys
    trace = (seen * counts * (seen.sum() / counts.sum())).sqrt()
    keys, influence = (moment / own.where(own > 0, 1.0) for moment, own in ((keys, seen), (influence, counts)))
    return trace * (UNIFORM * keys + (1 - UNIFORM) * influence)


def independent(moment: Tensor) -> int:
    """Return the numerical rank of a sum of outer products, which is at most the number of its independent terms."""
    _, inverse = scales(moment)
    values = torch.linalg.eigvalsh(inverse.unsqueeze(-1) * moment * inverse)
    return int((values > 1e-10 * values[-1]).sum())


def refit_moment(refit: Refit, transform: Tensor, site: AttentionSite) -> Tensor:
    """Return the second moment of the inputs of W_O after the transform of V-O, (H d, H d).

    transform: (G, d, d), from the original value dimensions to the new directions.
    """
    h, d = site.heads, site.head_dim
    each = transform.repeat_interleave(site.group, 0)  # (H, d, d)
    moment = refit.moment.reshape(h, d, h * d)
    moment = (each.mT @ moment).reshape(h * d, h, d).transpose(0, 1)  # (H, H d, d)
    return (moment @ each).transpose(0, 1).reshape(h * d, h * d)


def kept_directions(site: AttentionSite, ranks: Ranks) -> Tensor:
    """Return the indices of the kept directions of V-O among the inputs of W_O."""
    return live(ranks, site.head_dim, site.group)
