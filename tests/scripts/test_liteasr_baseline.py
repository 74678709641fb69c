"""The baseline by LiteASR's method: projections on principal components of outputs, and how many are kept."""

from __future__ import annotations

import pytest
import torch
from liteasr_baseline import (
    RULES,
    Components,
    by_energy,
    by_ratio,
    components,
    compressed,
    level_for,
    linears,
    low_rank,
)
from speech_scores import layer_parameters
from tiny import build, inputs
from torch import nn

WIDTH, FRAMES = 12, 400


def layer_and_outputs(rank: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A layer, inputs in a subspace around a mean, and its outputs, which have as many components."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        linear = nn.Linear(WIDTH, 2 * WIDTH).double()
    given = (
        torch.randn(FRAMES, rank, generator=generator).double() @ torch.randn(rank, WIDTH, generator=generator).double()
    )
    given += torch.randn(WIDTH, generator=generator).double()
    return linear, given, linear(given).detach()


def found_in(outputs: torch.Tensor) -> Components:
    return Components.of(outputs.sum(0), outputs.T @ outputs, len(outputs))


def test_the_components_of_the_outputs_are_kept_and_their_mean() -> None:
    linear, given, outputs = layer_and_outputs(rank=3)
    found = found_in(outputs)
    # A covariance has half of the digits, so directions without variance are known to the root of the rounding error.
    torch.testing.assert_close(low_rank(linear, found, 3)(given), outputs, rtol=0, atol=1e-6)
    centred = outputs - outputs.mean(0)
    best = torch.linalg.svdvals(centred)[2:].square().sum().sqrt()  # Eckart and Young
    assert torch.linalg.norm(low_rank(linear, found, 2)(given) - outputs).item() == pytest.approx(best.item())
    torch.testing.assert_close(low_rank(linear, found, 2)(given).mean(0), outputs.mean(0), rtol=0, atol=1e-6)


def test_rules() -> None:
    linear = nn.Linear(WIDTH, 2 * WIDTH)
    found = Components(torch.zeros(4), torch.tensor([8.0, 4, 3, 1]), torch.eye(4))
    assert [by_energy(linear, found, level) for level in (0.0, 0.4, 0.6, 0.76, 0.95, 1.0)] == [1, 1, 2, 3, 4, 4]
    assert [by_ratio(linear, found, level) for level in (0.0, 0.5, 0.99, 1.0)] == [1, 4, 7, 8]


@pytest.mark.parametrize("rule", RULES)
def test_a_share_of_the_layers_is_kept_and_no_more(rule: str) -> None:
    model = build("whisper")
    found = components(model, [inputs(model)["input_features"]])
    whole = layer_parameters(model)[0]
    for share in (0.9, 0.7):
        new = compressed(model, found, RULES[rule], level_for(model, found, RULES[rule], share))
        left = layer_parameters(new)[0] / whole
        assert share - 0.1 < left <= share
        assert layer_parameters(new)[1] == layer_parameters(model)[1]
    assert layer_parameters(model)[0] == whole, "the original is not changed"
    with pytest.raises(ValueError, match="one component each leaves"):
        level_for(model, found, RULES[rule], 0.01)


def test_layers_that_would_not_be_smaller_are_left_alone() -> None:
    model = build("whisper")
    given = inputs(model)
    found = components(model, [given["input_features"]])
    full = compressed(model, found, lambda linear, *_: linear.out_features, 1.0)
    assert linears(full).keys() == linears(model).keys()
    torch.testing.assert_close(full(**given).logits, model(**given).logits)
    cut = compressed(model, found, by_ratio, 0.5)
    assert not torch.allclose(cut(**given).logits, model(**given).logits)
