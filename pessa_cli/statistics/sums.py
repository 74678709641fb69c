"""The calibration statistics of one block: sums over the frames of the calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.ranks.spectra import LEVELS, Trials


@dataclass(frozen=True)
class BlockStatistics:
    """Sums over the calibration data for one block; all tensors are float64.

    Those of every block are measured with trial cuts on some of the data:
    output: (), the sum of squares of the block's output.
    tried: (seams, LEVELS), the sums of squared differences of that output with these shares of each seam cut.
    harm: (3,), the effect of a trial cut on the model's output (nats, or relative squared errors of hidden states),
    the number of tokens it was measured on, and the sum of squares of the difference that caused it.
    """

    SEAMS: ClassVar[tuple[str, ...]]
    TRIED: ClassVar[tuple[str, ...]] = ("output", "tried", "harm")
    frames: Tensor
    output: Tensor
    tried: Tensor
    harm: Tensor

    @property
    def trials(self) -> Trials | None:
        """The results of the trial cuts relative to the block's output; None if there were none."""
        output, (done, tokens, moved) = float(self.output), self.harm.tolist()
        if output == 0:
            return None
        errors = {name: tuple((each / output).tolist()) for name, each in zip(self.SEAMS, self.tried, strict=True)}
        # The harm is 0 for a block that no output depends on, and for one whose output the trial cut did not change.
        return Trials(errors, done / tokens * output / moved if tokens and moved else 0.0)

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Return the names of the tensors."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def of(cls, tensors: Any) -> Self:
        """Return the statistics with these tensors, by name."""
        return cls(**{name: tensors[name] for name in cls.names()})

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in self.names()})

    @property
    def trial_sums(self) -> dict[str, Tensor]:
        """What trial cuts have measured, by name."""
        return {name: getattr(self, name) for name in self.TRIED}

    def with_trials(self, trials: Mapping[str, Tensor]) -> Self:
        """Return the statistics with other results of trial cuts, which are named as in `trial_sums`."""
        return replace(self, **trials)

    def to(self, device: str | torch.device) -> Self:
        """Return the same statistics on another device."""
        return type(self)(**{name: getattr(self, name).to(device) for name in self.names()})


@dataclass(frozen=True)
class AttentionStatistics(BlockStatistics):
    """Sums over the calibration data for one attention block; all tensors are float64.

    With G key/value heads, H query heads and head_dim d:
    frames: (), the number of queries.
    queries: (G, d, d), the sum of q q^T over the queries and the query heads of a group; q includes its bias.
    keys: (G, d, d), the sum over queries of the covariance of the keys that the query sees. A covariance is used
    because softmax ignores whatever is common to all keys.
    influence: (G, d, d), the sum over queries of C W_O^T W_O C^T, where C is the covariance of keys and values under
    the query's attention weights: to first order, the squared effect of key errors on the output. Under RoPE it is
    replaced by `pairs`, the Gram matrix of the effects of frequency pairs on the output, see
    `algebra.rope.output_gram`; the one of the two that does not apply is (0, d, d).
    mixtures: (H d, H d), the sum of a a^T, where a is the input of W_O with all heads concatenated.
    mixture: (H d,), the sum of a.
    The others are measured with trial cuts on some of the data:
    output, tried, harm: see BlockStatistics; `tried` has a row for Q-K and one for V-O.
    """

    frames: Tensor
    queries: Tensor
    keys: Tensor
    influence: Tensor
    mixtures: Tensor
    mixture: Tensor
    pairs: Tensor
    output: Tensor
    tried: Tensor
    harm: Tensor

    SEAMS = ("qk", "vo")


@dataclass(frozen=True)
class MlpStatistics(BlockStatistics):
    """Sums over the calibration data for one MLP with F channels; all tensors are float64.

    frames: (), the number of inputs. moment: (F, F), the sum of h h^T over the values h of the channels, the inputs of
    the matrix that reads them. total: (F,), the sum of h. output, tried, harm: see BlockStatistics. metric: (D_o, D_o),
    measured with trial cuts: the sum of g g^T over the gradients g, with respect to the block's output, of the
    log-likelihoods of tokens drawn from the model (the Fisher information of the output), or of random projections of
    the hidden states.
    """

    frames: Tensor
    moment: Tensor
    total: Tensor
    output: Tensor
    tried: Tensor
    harm: Tensor
    metric: Tensor

    SEAMS = ("mlp",)
    TRIED = ("output", "tried", "harm", "metric")


def input_moment(found: BlockStatistics) -> Tensor:
    """Return the sum of the outer products of the inputs of the block's last matrix."""
    moment: Tensor = getattr(found, "moment" if isinstance(found, MlpStatistics) else "mixtures")
    return moment


def statistics_of(site: Site) -> type[AttentionStatistics] | type[MlpStatistics]:
    """Return the kind of statistics that a block has."""
    return MlpStatistics if isinstance(site, MlpSite) else AttentionStatistics


def shapes_of(site: Site) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the statistics of a block by name."""
    trials = {"output": (), "tried": (len(site.ranks), len(LEVELS)), "harm": (3,)}
    if isinstance(site, MlpSite):
        metric = (site.output_width, site.output_width)
        return {"frames": (), "moment": (site.width, site.width), "total": (site.width,), **trials, "metric": metric}
    assert isinstance(site, AttentionSite)
    g, d, n = site.kv_heads, site.head_dim, site.heads * site.head_dim
    head, none, rope = (g, d, d), (0, d, d), site.by_pairs
    found = {"frames": (), "queries": head, "keys": head, "influence": none if rope else head}
    return {**found, "mixtures": (n, n), "mixture": (n,), "pairs": head if rope else none, **trials}
