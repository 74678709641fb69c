"""The order of an MLP's channels: by what their errors do to the model's output, and with a say of the weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pessa_cli.algebra.channels import ChannelWeights
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_table import MLPS
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.spectra import LEVELS
from pessa_cli.statistics import weighing
from pessa_cli.statistics.sums import MlpStatistics
from pessa_cli.statistics.weighing import channel_refit, output_root
from pessa_cli.surgery.decomposed_block import decompose_block
from pessa_cli.surgery.mlp_block import decompose_mlp

D, F = 3, 4


def found(variances: Tensor, metric: Tensor | None = None, mean: Tensor | None = None) -> MlpStatistics:
    """Statistics of 100 frames of uncorrelated channels with these variances and means."""
    mean = torch.zeros(F) if mean is None else mean
    zero = torch.zeros((), dtype=torch.float64)
    return MlpStatistics(
        frames=torch.tensor(100.0, dtype=torch.float64),
        moment=100 * (torch.diag(variances) + torch.outer(mean, mean)).double(),
        total=100 * mean.double(),
        output=zero,
        tried=torch.zeros(1, len(LEVELS), dtype=torch.float64),
        harm=torch.zeros(3, dtype=torch.float64),
        metric=torch.zeros(D, D, dtype=torch.float64) if metric is None else metric.double(),
    )


def mlp(into: Tensor, out: Tensor, biased: bool = False) -> ChannelWeights:
    return ChannelWeights(into.unsqueeze(0), out, None, torch.zeros(D) if biased else None)


ALIKE = mlp(torch.eye(F, D), torch.tensor([[1.0, 0, 0, 0], [0, 1.1, 0, 0], [0, 0, 1.2, 1.3]]))


def test_errors_that_matter_to_the_model_count_more() -> None:
    """By the outputs alone the first channel goes first; with a model that reads the first output alone it stays."""
    sums = torch.ones(F)
    assert decompose_mlp(ALIKE, found(sums))[1].order.tolist()[-1] == 0
    reads_first = torch.zeros(D, D)
    reads_first[0, 0] = 7.0
    spectra, order = decompose_mlp(ALIKE, found(sums, reads_first))
    assert order.order.tolist() == [0, 3, 2, 1]
    # The metric is scaled to a mean diagonal of 1, and the identity is added: weight 3 + 1 of the first output.
    prior = 1 + weighing.CHANNEL_PRIOR
    expected = torch.tensor([4 * 1.0, 1.3**2, 1.2**2, 1.1**2], dtype=torch.float64)
    squares = torch.from_numpy(spectra.seams["mlp"][0]) ** 2
    assert squares / squares[1] == pytest.approx((expected / expected[1]).numpy(), rel=0.2)
    assert squares[3] == pytest.approx(1.1**2 * prior, rel=0.1)


def test_the_root_of_the_metric() -> None:
    metric = torch.tensor([[4.0, 1, 0], [1, 2, 0], [0, 0, 3]], dtype=torch.float64)
    root = output_root(found(torch.ones(F), metric))
    assert torch.allclose(root.mT @ root, metric / 3 + weighing.METRIC_SHRINKAGE * torch.eye(3))
    assert torch.equal(output_root(found(torch.ones(F))), torch.eye(D, dtype=torch.float64))


def test_channels_that_the_data_do_not_use_are_kept_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent channel with large weights is the most important one; by the data alone it is the least important."""
    into, out = torch.eye(F, D) + 0.1, torch.ones(D, F)
    into[3] = 100
    silent = found(torch.tensor([1.0, 1.0, 1.0, 1e-12]))
    assert decompose_mlp(mlp(into, out), silent)[1].order.tolist()[0] == 3
    monkeypatch.setattr(weighing, "CHANNEL_PRIOR", 0.0)
    assert decompose_mlp(mlp(into, out), silent)[1].order.tolist()[-1] == 3


@pytest.mark.parametrize("biased", [False, True])
def test_the_moment_of_the_refit(biased: bool) -> None:
    """Without the mean, if a bias can return it, and with the prior: a tenth of the median ratio to the weights."""
    mean, variances = torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([1.0, 2.0, 4.0, 8.0])
    into = torch.tensor([1.0, 2.0, 1.0, 4.0]).unsqueeze(1).expand(F, D) / D**0.5
    refit = channel_refit(found(variances, mean=mean), mlp(into, torch.ones(D, F), biased))
    centred = torch.diag(variances) + (0 if biased else 1) * torch.outer(mean, mean)
    norms = torch.tensor([1.0, 4.0, 1.0, 16.0])
    ratio = (centred.diagonal() / norms).median()
    assert torch.allclose(refit.moment, (centred + 0.1 * ratio * torch.diag(norms)).double())
    assert torch.allclose(refit.mean, mean.double() * biased)


def test_channels_without_weights_have_no_prior() -> None:
    into = torch.eye(F, D)
    into[3] = 0
    refit = channel_refit(found(torch.tensor([1.0, 1.0, 1.0, 0.0])), mlp(into, torch.ones(D, F)))
    assert float(refit.moment[3, 3]) == 0
    nothing = channel_refit(found(torch.zeros(F)), mlp(torch.zeros(F, D), torch.ones(D, F)))
    assert not nothing.moment.any()


@pytest.mark.parametrize("field", ["moment", "metric"])
def test_damaged_statistics_are_named(field: str) -> None:
    """A second moment has no negative eigenvalues."""
    site = MlpSite(MLPS["bert"][0], 0, ("in",), "out", F, D, D, F, frozenset(), "F32")
    damaged = found(torch.ones(F), torch.eye(D))
    wrong = {"moment": torch.full((F, F), 9.0) - 8 * torch.eye(F), "metric": torch.diag(torch.tensor([3.0, 1.0, -3.9]))}
    damaged = replace(damaged, **{field: wrong[field].double()})
    with pytest.raises(PessaError, match=r"the statistics of encoder.mlp.0 are damaged"):
        decompose_block(ALIKE, site, "calibrated", damaged)
