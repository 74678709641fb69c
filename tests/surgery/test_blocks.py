"""The decomposition, the cut and the refit of one block, by the outputs of attention written out in NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from attention import GROUPED, Array, arrays, attention, decomposed, inputs_of, weights_of

from pessa_cli.algebra import heads
from pessa_cli.algebra.decompose import Transforms
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.algebra.rope import PairWeighting, compensated, contributions
from pessa_cli.blocks.site import ROPE, AttentionSite
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.statistics.sums import AttentionStatistics
from pessa_cli.statistics.weighing import Refit, weigh
from pessa_cli.surgery.attention_block import (
    BlockTransforms,
    _precision,
    attention_factors,
    attention_spectra,
    cut_attention,
    pair_contributions,
)

BIASED = replace(GROUPED, biases=frozenset("qkvo"))
PARTIAL = replace(GROUPED, unmerged=1, biases=frozenset("qkv"))
UNMERGED = replace(GROUPED, unmerged=3, between="a norm")
ROTATED = replace(
    GROUPED,
    spec=ARCHITECTURES["llama"][0],
    between=ROPE,
    head_dim=4,
    unmerged=4,
    qk_ranks=(4, 4),
    vo_ranks=(4, 4),
    biases=frozenset("qk"),
)
NO_O_BIAS = replace(GROUPED, biases=frozenset("qkv"))
SITES = {
    "biased": BIASED,
    "partial": PARTIAL,
    "without an output bias": NO_O_BIAS,
    "unmerged": UNMERGED,
    "rotated": ROTATED,
}
CALIBRATED = [kind for kind in SITES if kind != "partial"]  # which calibration refuses


@pytest.fixture(params=[1, 10**9], ids=["one head a part", "one part"])
def _parts(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are worked on in parts of one key/value head, or at once: the results have to be the same."""
    monkeypatch.setattr(heads, "PART_BYTES", request.param)


def statistics_of(weights: HeadWeights, site: AttentionSite, frames: int = 400) -> tuple[AttentionStatistics, Array]:
    """Return statistics of correlated queries, keys and values, and the inputs of W_O of each frame."""
    generator = np.random.default_rng(5)
    g, m, d = site.kv_heads, site.group, site.head_dim
    w = arrays(weights)

    def moment(*shape: int) -> torch.Tensor:
        root = generator.normal(size=shape) * np.logspace(0, -2, shape[-1])
        return torch.from_numpy(np.swapaxes(root, -1, -2) @ root)

    v, v_bias = w["v"], w["v_bias"]
    assert v is not None
    sources = generator.normal(size=(frames, m, site.key_width)) * np.logspace(0, -1, site.key_width) + 0.3
    values = np.einsum("fmn,gdn->fgmd", sources, v)
    if v_bias is not None:
        values = values + v_bias[:, None]
    mixtures = values.reshape(frames, -1)
    none = torch.zeros(0, d, d, dtype=torch.float64)
    numbers = {"output": torch.tensor(8.0), "tried": torch.arange(8.0).reshape(2, 4), "harm": torch.tensor([1.0, 2, 3])}
    return AttentionStatistics(
        frames=torch.tensor(float(frames), dtype=torch.float64),
        queries=moment(g, frames, d),
        keys=moment(g, frames, d),
        influence=none if site.by_pairs else moment(g, frames, d),
        mixtures=torch.from_numpy(mixtures.T @ mixtures),
        mixture=torch.from_numpy(mixtures.sum(0)),
        pairs=moment(g, frames, d) if site.by_pairs else none,
        **{name: tensor.double() for name, tensor in numbers.items()},
    ), mixtures


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("ranking", ["svd", "vanilla", "calibrated"])
@pytest.mark.parametrize("kind", SITES)
def test_the_factors_are_the_same_function_with_the_spectra_of_the_products(kind: str, ranking: Any) -> None:
    site = SITES[kind]
    weights, inputs = weights_of(site), inputs_of(site)
    found = decomposed(weights, site, ranking)
    made = attention_factors(weights, site, found.form)
    assert np.allclose(attention(made, *inputs), attention(weights, *inputs), atol=1e-9)
    w = arrays(weights)
    v, o = w["v"], w["o"]
    assert v is not None
    assert o is not None
    alone = attention_spectra(weights, site, ranking)
    assert np.allclose(alone.seams["vo"], found.spectra.seams["vo"])
    for g in range(site.kv_heads):
        left = v[g].T
        if "o" not in site.biases and (bias := w["v_bias"]) is not None:
            left = np.vstack([left, bias[g]])
        right = np.vstack([o[:, g, m] for m in range(site.group)])
        if ranking == "vanilla":
            expected = np.sort(np.linalg.norm(left, axis=0) * np.linalg.norm(right, axis=0))[::-1]
        else:
            expected = np.linalg.svd(left @ right.T, compute_uv=False)[: site.head_dim]
        assert np.allclose(found.spectra.seams["vo"][g], expected)
    assert ("qk" not in found.spectra.seams) == (kind in ("unmerged", "rotated"))
    if "qk" in found.spectra.seams:
        assert found.spectra.seams["qk"].shape == (2, site.head_dim - site.unmerged)
        assert np.allclose(alone.seams["qk"], found.spectra.seams["qk"])
    assert (found.spectra.pairs is None) == (kind != "rotated")
    if found.spectra.pairs is not None:
        assert alone.pairs is not None
        assert np.array_equal(found.spectra.pairs, contributions(weights).numpy())
        assert np.array_equal(alone.pairs, found.spectra.pairs)
    assert not found.spectra.calibrated
    assert found.spectra.trials is None
    assert found.form.refit is None
    assert cut_attention(made, replace(site, vo_ranks=(1, 2)), found.form) is made


@pytest.mark.usefixtures("_parts")
@pytest.mark.parametrize("kind", CALIBRATED)
def test_calibrated_factors_are_the_same_function(kind: str) -> None:
    site = SITES[kind]
    weights, inputs = weights_of(site), inputs_of(site)
    statistics, _ = statistics_of(weights, site)
    found = decomposed(weights, site, "svd", statistics)
    made = attention_factors(weights, site, found.form)
    assert np.allclose(attention(made, *inputs), attention(weights, *inputs), atol=1e-8)
    assert found.spectra.calibrated
    assert found.spectra.trials == statistics.trials
    plain = decomposed(weights, site, "svd")
    assert not np.allclose(found.spectra.seams["vo"], plain.spectra.seams["vo"], rtol=0.01)
    weighed = weigh(statistics, site, weights.v_bias)
    assert found.form.refit is not None
    assert torch.equal(found.form.refit.moment, weighed.refit.moment)
    if found.spectra.pairs is not None:
        assert np.array_equal(found.spectra.pairs, contributions(weights, weighed.refit.pairs).numpy())
        assert not np.allclose(found.spectra.pairs, contributions(weights).numpy())


@pytest.mark.parametrize("kind", ["without an output bias", "biased"])
def test_w_o_is_refitted_to_the_kept_directions(kind: str) -> None:
    """The refit is the ridge regression of the outputs of all frames on the values of the kept directions."""
    site = SITES[kind]
    weights = weights_of(site)
    statistics, mixtures = statistics_of(weights, site)
    found = decomposed(weights, site, "svd", statistics)
    refit = found.form.refit
    assert refit is not None
    made = attention_factors(weights, site, found.form)
    kept = replace(site, vo_ranks=(1, 2))
    fitted = cut_attention(made, kept, found.form)
    w = arrays(weights)
    left = found.form.vo.left.numpy()
    values = mixtures.reshape(len(mixtures), 2, 2, 3)
    if refit.center is not None:
        v_bias = w["v_bias"]
        assert v_bias is not None
        values = values - (refit.center.numpy() + v_bias)[:, None]
    turned = np.einsum("fgmd,gde->fgme", values, left).reshape(len(values), -1)
    o = made.o.reshape(7, -1).numpy()
    places = [0, 3, 6, 7, 9, 10]
    others = [place for place in range(12) if place not in places]
    inner = turned[:, places]
    rows = np.sqrt(refit.ridge) * np.diag(np.linalg.norm(inner, axis=0))
    target = np.vstack([turned[:, others] @ o[:, others].T, np.zeros((6, 7))])
    change = np.linalg.lstsq(np.vstack([inner, rows]), target, rcond=None)[0].T
    expected = o[:, places] + change
    assert np.allclose(fitted.o.reshape(7, -1).numpy()[:, places], expected, rtol=1e-6, atol=1e-9)
    assert np.abs(change).max() > 0.1 * np.abs(o).max()  # the refit matters
    before, after = (
        np.linalg.norm(turned @ o.T - inner @ each.reshape(7, -1).numpy()[:, places].T) for each in (made.o, fitted.o)
    )
    assert after < 0.95 * before
    assert fitted.q is made.q
    assert cut_attention(made, site, found.form) is made  # nothing is cut
    half = replace(made, o=made.o.half())
    again = cut_attention(half, kept, found.form)
    assert again.o.dtype == torch.float16
    assert torch.allclose(again.o.double(), fitted.o, atol=0.02)


def test_kept_pairs_compensate_for_those_that_are_cut() -> None:
    weights = weights_of(ROTATED)
    statistics, _ = statistics_of(weights, ROTATED)
    transforms = decomposed(weights, ROTATED, "svd", statistics).form
    assert transforms.refit is not None
    assert transforms.refit.pairs is not None
    pairs = ((range(0, 1),), (range(1, 2),))
    kept = replace(ROTATED, pairs=pairs, qk_ranks=(2, 2))
    found = cut_attention(weights, kept, transforms)
    assert torch.equal(found.q, compensated(weights, pairs, transforms.refit.pairs).q)
    assert found.o is weights.o
    without = replace(transforms, refit=replace(transforms.refit, pairs=None))
    assert cut_attention(weights, kept, without) is weights
    assert cut_attention(weights, ROTATED, transforms) is weights
    both = cut_attention(weights, replace(kept, vo_ranks=(2, 1)), transforms)
    assert torch.equal(both.q, found.q)
    assert not torch.equal(both.o, weights.o)


def random_transforms(width: int) -> Transforms:
    return Transforms(
        *(torch.randn(2, *shape, dtype=torch.float64) for shape in ((width,) * 2, (width,) * 2, (), (width,)))
    )


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("refit", ["none", "plain", "centered", "pairs"])
def test_transforms_are_the_same_after_a_file(merged: bool, refit: str) -> None:
    center = torch.randn(2, 3, dtype=torch.float64) if refit == "centered" else None
    pairs = PairWeighting(torch.randn(2, 3, 3, dtype=torch.float64), 0.7) if refit == "pairs" else None
    known = None if refit == "none" else Refit(center, torch.randn(12, 12, dtype=torch.float64), 0.3, pairs)
    transforms = BlockTransforms(random_transforms(2) if merged else None, random_transforms(3), known)
    tensors = transforms.tensors()
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float64}
    for again in (BlockTransforms.of(tensors), transforms.to(torch.device("cpu"))):
        assert (again.qk is None) != merged
        assert again.tensors().keys() == tensors.keys()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in again.tensors().items())
        assert (again.refit is None) == (refit == "none")
        if again.refit is not None:
            assert again.refit.ridge == 0.3
            assert (again.refit.center is None) == (refit != "centered")
            assert (again.refit.pairs is None) == (refit != "pairs")
            assert again.refit.pairs is None or again.refit.pairs.shrinkage == 0.7


def test_pairs_have_contributions_only_under_rope() -> None:
    assert pair_contributions(weights_of(BIASED), BIASED) is None
    found = pair_contributions(weights_of(ROTATED), ROTATED)
    assert found is not None
    assert found.shape == (2, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_is_used_where_its_errors_are_an_eighth_of_those_of_storing(dtype: torch.dtype) -> None:
    weights = weights_of(BIASED, dtype=dtype)
    limit = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps / 8

    def with_growth(*growth: float) -> Transforms:
        return replace(random_transforms(3), growth=torch.tensor(growth, dtype=torch.float64))

    assert _precision(weights, [with_growth(limit, 1)]) == torch.float32
    assert _precision(weights, [with_growth(1, 1.01 * limit)]) == torch.float64
    assert _precision(weights, [with_growth(1, 1), with_growth(1.01 * limit, 1)]) == torch.float64
    assert _precision(weights, [with_growth(torch.inf, 1)]) == torch.float32  # decomposed anew in float64
    assert _precision(replace(weights, k=weights.k.float()), [with_growth(1, 1)]) == torch.float64
    mixed = replace(weights, o=weights.o.half(), q=weights.q.bfloat16())
    assert _precision(mixed, [with_growth(1024, 1)]) == torch.float32
    assert _precision(mixed, [with_growth(1025, 1)]) == torch.float64  # the finer of both dtypes decides


def test_16_bit_weights_stay_16_bit() -> None:
    weights = weights_of(BIASED, dtype=torch.float16)
    transforms = decomposed(weights, BIASED, "svd").form
    made = attention_factors(weights, BIASED, transforms)
    assert {t.dtype for t in (made.q, made.k, made.v, made.o)} == {torch.float16}
    inputs = inputs_of(BIASED)
    assert np.allclose(attention(made, *inputs), attention(weights, *inputs), atol=0.1)
