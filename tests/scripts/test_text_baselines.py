"""Published ways to cut a LLaMA: cases whose right answer is known, and how scores are compared."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from text_baselines import (
    METHODS,
    MOST,
    cells,
    cut_attention,
    flap,
    leverage,
    losses,
    modegpt,
    moments,
    readers,
    size,
    spaced,
)
from tiny import build
from torch import Tensor

from pessa_cli.evaluation.likelihood import Likelihoods

SMALL = 0.05  # of the redundant channels to those that they repeat


@cache
def windows() -> Tensor:
    return torch.randint(5, 90, (6, 24), generator=torch.Generator().manual_seed(2))


def logits(model: Any) -> Tensor:
    found: Tensor = model(windows()).logits.detach()
    return found


@torch.no_grad()
def loud() -> Any:
    """A tiny LLaMA whose MLPs matter, too."""
    model, generator = build("llama"), torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            part.weight.normal_(0, 0.4, generator=generator)
    return model


@torch.no_grad()
def redundant() -> Any:
    """A tiny LLaMA whose layers need half of what they have.

    Half of the channels are small multiples of the others, half of the pairs of queries are zero, and the values of
    each head are in a subspace of half their width.
    """
    model, generator = loud(), torch.Generator().manual_seed(1)
    for layer in model.model.layers:
        half, width = layer.mlp.up_proj.out_features // 2, layer.self_attn.head_dim
        layer.mlp.gate_proj.weight[half:] = layer.mlp.gate_proj.weight[:half]
        layer.mlp.up_proj.weight[half:] = SMALL * layer.mlp.up_proj.weight[:half]
        query = layer.self_attn.q_proj.weight.view(-1, 2, width // 2, layer.self_attn.q_proj.in_features)
        query[:, :, : width // 4] = 0
        value = layer.self_attn.v_proj.weight.view(-1, width, layer.self_attn.v_proj.in_features)
        value[:, width // 2 :] = torch.randn(width // 2, width // 2, generator=generator) @ value[:, : width // 2]
    return model


def test_what_is_redundant_goes_without_loss() -> None:
    model = redundant()
    before, sums = logits(model), moments(model, list(windows()))
    cut = modegpt(model, sums, 0.5, math.inf)
    assert cut.share == pytest.approx(0.5)
    torch.testing.assert_close(logits(cut.model), before, rtol=1e-3, atol=1e-4)
    for layer in cut.model.model.layers:
        stays = layer.mlp.down_proj.weight.norm(dim=0) > 0
        assert stays.tolist() == [number < len(stays) // 2 for number in range(len(stays))]
    less = modegpt(model, sums, 0.4, math.inf)
    assert less.share <= 0.4
    assert float((logits(less.model) - before).abs().max()) > 0.05
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0, msg="the original is not changed")


@pytest.mark.parametrize("method", METHODS)
def test_a_share_of_the_layers_is_kept_and_no_more(method: str) -> None:
    model = loud()
    before, sums = logits(model), moments(model, list(windows()))
    whole = METHODS[method](model, sums, 1.0 if method != "flap" else 1.1, 0.1)
    torch.testing.assert_close(logits(whole.model), before, rtol=1e-4, atol=1e-5)
    cut = METHODS[method](model, sums, 0.8, 0.1)
    assert 0.76 < cut.share <= 0.8
    assert not torch.allclose(logits(cut.model), before, atol=1e-3)


def test_ridge_leverage_by_hand() -> None:
    assert leverage(torch.tensor([[3.0, 0], [0, 1]]).double()).tolist() == pytest.approx([3 / 4, 1 / 2])
    # C = [[2, 1], [1, 2]]: (C + I)^-1 = [[3, -1], [-1, 3]] / 8, and C of it has 5/8 on the diagonal.
    assert leverage(torch.tensor([[2.0, 1], [1, 2]]).double()).tolist() == pytest.approx([5 / 8, 5 / 8])


def test_shares_of_layers_by_hand() -> None:
    assert losses([0.3, 0.1, 0.5], 0.2, math.inf) == pytest.approx([0.2] * 3)
    # Weights of 1, 1/e and 1/e^2 of a sum of 0.6.
    weights = np.exp([0, -1, -2.0])
    assert losses([0.0, 0.1, 0.2], 0.2, 0.1) == pytest.approx((0.6 * weights / weights.sum()).tolist())
    most, *others = losses([0.0, 0.1, 0.2], 0.45, 0.1)
    assert most == pytest.approx(MOST)
    assert others == pytest.approx(((1.35 - MOST) * weights[1:] / weights[1:].sum()).tolist())


def test_moments_are_those_of_the_inputs() -> None:
    model = build("llama")
    seen: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    one = moments(model, list(windows()))[1]
    hook.remove()
    values = torch.cat(seen).flatten(0, -2).detach().double()
    assert one.hidden.tokens == len(values) == windows().numel()
    torch.testing.assert_close(one.hidden.second, values.mT @ values, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(one.hidden.variances, values.var(0, correction=0), rtol=1e-4, atol=1e-9)
    assert 0 < one.influence / one.read.tokens < 2


def test_flap_takes_what_varies_least_and_keeps_the_mean() -> None:
    model = loud()
    sums = moments(model, list(windows()))
    cut = flap(model, sums, 0.8)
    varied = []
    for before, after, one in zip(model.model.layers, cut.model.model.layers, sums, strict=True):
        for old, new, each in zip(readers(before), readers(after), (one.attended, one.hidden), strict=True):
            mean = each.mean.float()
            torch.testing.assert_close(new(mean), old(mean), rtol=1e-4, atol=1e-5)
        stays = after.mlp.down_proj.weight.norm(dim=0) > 0
        score = one.hidden.variances * before.mlp.down_proj.weight.double().square().sum(0)
        assert bool(score[stays].min() > score[~stays].max())
        varied.append(int(stays.sum()))
    assert min(varied) < before.mlp.down_proj.in_features


def test_pairs_are_ranked_by_both_norms() -> None:
    model = build("llama")
    attention: Any = model.model.layers[0].self_attn
    half = attention.head_dim // 2
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj):
            part.weight.fill_(1e-3)
            part.weight.view(-1, attention.head_dim, part.in_features)[:, [1, 1 + half]] = 1.0
        for part, pair in ((attention.k_proj, 0), (attention.q_proj, 2)):  # what is large on one side alone
            part.weight.view(-1, attention.head_dim, part.in_features)[:, [pair, pair + half]] = 10.0
        kept = cut_attention(attention, torch.eye(attention.q_proj.in_features).double(), 1 / half)
    rows = attention.q_proj.weight.view(-1, attention.head_dim, attention.q_proj.in_features).norm(dim=-1) > 0
    assert rows.tolist() == [[number % half == 1 for number in range(attention.head_dim)]] * len(rows)
    assert kept == pytest.approx(size_of_attention(attention) / half, rel=1e-9)


def size_of_attention(attention: Any) -> int:
    return sum(each.numel() for each in attention.parameters())


def test_scores_are_compared_window_by_window() -> None:
    tokens = np.array([10, 30])
    first, other = (Likelihoods(tokens, np.array(nats), None) for nats in ([20.0, 90.0], [21.0, 93.0]))
    assert list(cells(other, first)) == ["1.1052 (1.1052 to 1.1052)", "+0.1000 (+0.1000 to +0.1000)"]
    assert [int(str(each)) for each in spaced([3, 4, 5, 6, 7], 2)] == [4, 6]  # type: ignore[list-item]
    assert size(build("llama").model.layers[0]) == 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48
