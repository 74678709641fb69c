"""Calibrated decomposition: optimal for its inputs, safe with too little data, and exact at full rank."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import products
import pytest
import soundfile
import tiny
import torch
from calibrating import batches, block_errors, collected
from harness import Pessa, Tensors, TinyFolder, copy_of, edit_weights, is_refusal
from safetensors.torch import load_file
from torch import Tensor

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.decompose import decompose, svd_transforms, transformed
from pessa_cli.algebra.weighted import Weighting, refitted, weighted_transforms
from pessa_cli.calibration import collect as calibrate
from pessa_cli.calibration import listeners
from pessa_cli.calibration.collect import collect
from pessa_cli.calibration.listeners import VisibleKeys
from pessa_cli.calibration.memory import needs, sums_of
from pessa_cli.calibration.store import StatisticsOnDisk, in_groups
from pessa_cli.common.errors import PessaError
from pessa_cli.models import dense, windows
from pessa_cli.models.data import DataItem, read_data
from pessa_cli.models.load import load
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import CollectedStatistics, SavedStatistics, data_sha256, files_of, shortages
from pessa_cli.statistics.sums import AttentionStatistics, shapes_of, statistics_of
from pessa_cli.statistics.weighing import independent, weigh
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.decomposition import measure
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model

TRIED = ("output", "tried", "harm")


def second_moment(seed: int, width: int) -> Tensor:
    """Return the second moment of inputs with very different variances, (width, width)."""
    generator = torch.Generator().manual_seed(seed)
    samples = torch.randn(3 * width, width, generator=generator, dtype=torch.float64)
    return (samples * torch.logspace(1, -2, width, dtype=torch.float64)).T.cov()


def weighted_error(pair: Pair, other: Pair, left: Tensor, right: Tensor | None) -> Tensor:
    """Compute the root of E |x^T (A B^T - A' B'^T) y|^2 for each head, (G,), from dense products and moments."""
    difference = products.product(pair) - products.product(other)
    difference = torch.linalg.cholesky(left).mT @ difference
    if right is not None:
        difference = difference @ torch.linalg.cholesky(right)
    squares: Tensor = difference.square().sum((-2, -1))
    return squares.sqrt()


@pytest.mark.parametrize("both", [True, False], ids=["Q-K", "V-O"])
@pytest.mark.parametrize("rank", [0, 1, 4, 7, 8])
def test_the_weighted_decomposition_is_optimal(rank: int, both: bool) -> None:
    pair = products.random_pair()
    c_left, c_right = second_moment(1, 40), second_moment(2, 30) if both else None
    right = None if c_right is None else pair.right.mT @ c_right @ pair.right
    found = transformed(
        pair, transforms := weighted_transforms(pair, Weighting(pair.left.mT @ c_left @ pair.left, right, 0))
    )
    error = weighted_error(pair, products.truncated(found, rank), c_left, c_right)
    # By Eckart and Young, no approximation of this rank has a smaller error in the dense weighted product.
    whole = torch.linalg.cholesky(c_left).mT @ products.product(pair)
    values = torch.linalg.svdvals(whole if c_right is None else whole @ torch.linalg.cholesky(c_right))
    scale = values[:, :1]
    assert ((error - values[:, rank:].norm(dim=-1)).abs() < 1e-9 * scale[:, 0]).all()
    assert ((transforms.spectrum - values[:, :8]).abs() < 1e-9 * scale).all()
    plain = weighted_error(pair, products.truncated(decompose(pair), rank), c_left, c_right)
    assert (error <= plain + 1e-9 * scale[:, 0]).all()
    if rank in (1, 4, 7):  # the weights alone are clearly worse
        assert error.sum() < 0.85 * plain.sum()


@pytest.mark.parametrize("kind", ["well-conditioned", *products.KINDS])
@pytest.mark.parametrize("data", ["rich", "few", "zero"])
def test_degenerate_heads_and_samples_keep_the_product(kind: str, data: str) -> None:
    pair = products.degenerate(kind)
    grams = []
    for seed, factor in enumerate((pair.left, pair.right)):
        moment = second_moment(seed, factor.shape[-2])
        if data != "rich":
            vector = torch.ones(len(moment), 1, dtype=torch.float64) * (data == "few")
            moment = vector @ vector.T
        grams.append(factor.mT @ moment @ factor)
    found = transformed(pair, transforms := weighted_transforms(pair, Weighting(grams[0], grams[1], 0.3)))
    assert all(tensor.isfinite().all() for tensor in (found.left, found.right, found.spectrum, transforms.growth))
    assert (found.spectrum.diff(dim=-1) <= 0).all()
    product = products.product(pair)
    assert (products.product(found) - product).norm() <= 1e-5 * product.norm()
    norms = found.left.norm(dim=-2), found.right.norm(dim=-2)
    assert torch.allclose(
        *norms, rtol=1e-6, atol=1e-9 * float(norms[0].max())
    )  # both factors are in the range of 16-bit numbers


@pytest.mark.parametrize("shrinkage", [0.0, 0.3])
@pytest.mark.parametrize("both", [False, True], ids=["one factor", "both factors"])
@pytest.mark.parametrize("condition", [1e7, 1e10])
def test_full_rank_is_exact_for_ill_conditioned_heads(condition: float, both: bool, shrinkage: float) -> None:
    """The weighted product of small directions is below the rounding error of the Gram matrices of the factors."""
    pair = products.of_condition(condition, both)
    left, right = (f.mT @ second_moment(i, f.shape[-2]) @ f for i, f in enumerate((pair.left, pair.right)))
    found = transformed(pair, weighted_transforms(pair, Weighting(left, right, shrinkage)))
    product = products.product(pair)
    assert (products.product(found) - product).norm() < 1e-13 * product.norm()
    # Negative control: the smallest direction counts, where float64 can hold its product.
    lost = (products.product(products.truncated(found, 7)) - product).norm() / product.norm()
    assert both or lost > 0.01 / condition


def test_large_shrinkage_gives_the_plain_decomposition() -> None:
    pair = products.random_pair()
    gram = pair.left.mT @ second_moment(1, 40) @ pair.left
    plain = products.truncated(decompose(pair), 3)
    for data, shrinkage in ((gram, 1e9), (torch.zeros_like(gram), 0.0)):
        found = transformed(pair, weighted_transforms(pair, Weighting(data, data if shrinkage else None, shrinkage)))
        cut = products.product(products.truncated(found, 3))
        if shrinkage:  # it outweighs both Gram matrices, although the right one is that of the left side
            assert torch.allclose(cut, products.product(plain), atol=1e-6)
        else:
            assert torch.allclose(cut, products.product(plain))
            assert torch.allclose(found.spectrum, svd_transforms(pair).spectrum)


def test_the_refit_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    mixtures = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    mixtures[:, 6:] += mixtures[:, :6]  # heads with correlated outputs
    o = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    kept, moment = torch.tensor([0, 1, 2, 4, 7, 9]), mixtures.T @ mixtures
    found = refitted(o, moment, kept, 0.0)
    assert torch.allclose(found[:, kept].T, torch.linalg.lstsq(mixtures[:, kept], mixtures @ o.T).solution)
    assert torch.allclose(refitted(o, moment, kept, 1e12), o)

    def error(weights: Tensor) -> float:
        return float((mixtures @ o.T - mixtures[:, kept] @ weights[:, kept].T).norm())

    assert error(found) < error(refitted(o, moment, kept, 0.1)) < error(o)
    silent = refitted(o, torch.zeros_like(moment), kept, 0.1)
    assert torch.equal(silent, o)


Collected = tuple[Model, Path]
Read = tuple[list[tuple[str | None, str | None]], list[str]]  # transcripts and languages, and identities


@pytest.mark.parametrize("name", tiny.NAMES)
def test_statistics_are_those_of_the_inputs(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    """The statistics are compared with second moments that are computed from the inputs of the block."""
    model = open_model(tiny_folder(name))
    found = collected(model, data, tmp_path / "s")
    site = model.attention[0]
    torch_model = tiny.load(tiny_folder(name))
    seen: list[Tensor] = []
    torch_model.get_submodule(
        next(n for n, _ in torch_model.named_modules() if n.endswith(site.q))
    ).register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for given in batches(torch_model):
            torch_model(**given)
    rows = torch.cat([x[0] for x in seen]).double()
    sums, weights = found.of(site), read_site(model.reader, site)
    q = weights.q.double().flatten(0, 1) @ rows.T  # (H, d, rows)
    if weights.q_bias is not None:
        q = q + weights.q_bias.double().flatten(0, 1).unsqueeze(-1)
    expected = (q @ q.mT).reshape(site.kv_heads, site.group, site.head_dim, site.head_dim).sum(1)
    assert int(sums.frames) == len(rows)
    assert torch.allclose(sums.queries, expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))
    if not site.spec.kind.startswith("decoder"):  # here each query sees all keys
        each = [weights.k.double() @ (x[0].double() - x[0].double().mean(0)).T for x in seen]
        keys = sum(k @ k.mT for k in each)
        assert isinstance(keys, Tensor)
        assert torch.allclose(sums.keys, keys, rtol=1e-4, atol=1e-3 * float(keys.abs().max()))
    assert bool(shortages(found, [site])) == (len(rows) < site.heads * site.head_dim)


def test_influence_is_the_derivative_of_the_output_by_the_keys(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared with the derivative of the attention when the score of every key j changes by k_j x."""
    monkeypatch.setattr(listeners, "QUERIES", 10**6)
    model = open_model(tiny_folder("bert"))
    site = model.attention[0]
    found = collected(model, data, tmp_path / "s").of(site).influence
    weights = read_site(model.reader, site)
    torch_model = tiny.load(tiny_folder("bert"))
    seen: list[Tensor] = []
    query = torch_model.get_submodule(next(n for n, _ in torch_model.named_modules() if n.endswith(site.q)))
    query.register_forward_pre_hook(lambda _m, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for given in batches(torch_model):
            torch_model(**given)
    head, d = 1, site.head_dim
    x = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = {name: getattr(weights, name)[head].reshape(d, -1).double() for name in "qkv"}
    o = weights.o[:, head, 0].double()
    assert weights.q_bias is not None
    total = 0.0
    for rows in seen:
        q, k, v = rows @ w["q"].T + weights.q_bias[head].reshape(-1).double(), rows @ w["k"].T, rows @ w["v"].T

        def output(step: Tensor, q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            moved: Tensor = (q @ k.T / d**0.5 + step * (k @ x)).softmax(-1) @ v @ o.T
            return moved

        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        total += float(torch.func.jvp(output, (zero,), (one,))[1].square().sum())
    assert float(x @ found[head] @ x) == pytest.approx(total, rel=1e-3)


def test_statistics_of_parts_of_the_data_add_up(tiny_folder: TinyFolder, data: list[Path], tmp_path: Path) -> None:
    model = open_model(tiny_folder("whisper"))
    whole = collected(model, data, tmp_path / "all")
    collect(model, model.attention, data[:2], tmp_path / "a")
    collect(model, model.attention, data[2:], tmp_path / "b")
    both = SavedStatistics(tmp_path / "b", tmp_path / "a")
    assert data_sha256(both) == data_sha256(whole) != data_sha256(SavedStatistics(tmp_path / "a"))
    for site in model.attention:
        one, sum_ = whole.of(site), both.of(site)
        added = [
            name for name in AttentionStatistics.names() if name not in TRIED
        ]  # trial cuts are made on other inputs
        assert all(torch.allclose(getattr(one, name), getattr(sum_, name)) for name in added)
        assert sum_.trials is not None
    with pytest.raises(PessaError, match="in common"):
        SavedStatistics(tmp_path / "all", tmp_path / "a")


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_model_that_does_not_fit_is_read_from_disk_block_by_block(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_model(tiny_folder(name))
    whole = collected(model, data, tmp_path / "whole")
    need = replace(needs(model, model.attention), weights=2**40)  # of no size that this machine could have
    monkeypatch.setattr(calibrate, "needs", lambda *_: need)
    monkeypatch.setattr(calibrate, "free_memory", lambda: need.on_disk)
    placed: list[set[str]] = []

    def loading(model: Model, **placing: Any) -> Any:
        loaded = load(model, **placing)
        placed.append(set(map(str, loaded.hf_device_map.values())))
        return loaded

    monkeypatch.setattr(dense, "load", loading)
    parts = collected(model, data, tmp_path / "parts")
    assert "disk" in placed[0]
    for site in model.attention:
        one, other = whole.of(site), parts.of(site)
        assert all(
            torch.allclose(getattr(one, n), getattr(other, n)) for n in AttentionStatistics.names() if n not in TRIED
        )
        assert other.trials is None
        assert one.trials is not None
    assert (
        "no trial cuts" in shortages(parts, model.attention)[-1]
        or "independent" in shortages(parts, model.attention)[-1]
    )
    assert ranks_for(
        model.attention, measure(model, model.attention, statistics=parts), Rule(target_attention=0.8), model.size
    )
    with pytest.raises(PessaError, match="--sequential: calibration needs"):
        collected(model, data, tmp_path / "no", Rule(rank=4))
    monkeypatch.setattr(calibrate, "free_memory", lambda: need.on_disk - 1)
    with pytest.raises(PessaError, match="for the statistics alone"):
        collected(model, data, tmp_path / "no")


@pytest.mark.parametrize("name", ["llama", "whisper"])
def test_sums_that_do_not_fit_are_collected_in_groups(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention and MLPs, in a pass for each group of blocks whose sums fit; the result is the same."""
    model, passes = open_model(tiny_folder(name)), list[list[str]]()
    need, once = needs(model, model.sites), listeners.collect_statistics

    def counted(sites: Any, *args: Any) -> Any:
        passes.append([site.name for site in sites])
        return once(sites, *args)

    monkeypatch.setattr(calibrate, "collect_statistics", counted)
    whole: Tensors = {}
    for out, free in (("whole", need.in_memory), ("two", need.in_memory - 1), ("each", need.in_groups)):
        passes.clear()
        monkeypatch.setattr(calibrate, "free_memory", lambda free=free: free)
        collect(model, model.sites, data, tmp_path / out)
        assert [place for group in passes for place in group] == [site.name for site in model.sites]
        assert (len(passes) == 1) == (out == "whole")
        if out == "each":
            assert len(passes) > 2
            for group in passes:
                sums = [sums_of(site) for site in model.sites if site.name in group]
                assert len(sums) == 1 or sum(sums) <= need.largest + 1
        for place, tensor in load_file(tmp_path / out).items():
            torch.testing.assert_close(tensor, whole.setdefault(place, tensor), rtol=1e-12, atol=0)


def test_what_is_in_memory_at_a_time(tiny_folder: TinyFolder) -> None:
    sites = open_model(tiny_folder("llama")).sites
    each = [sums_of(site) for site in sites]
    assert in_groups(sites, sum(each)) == [sites]
    assert in_groups(sites, sum(each) - 1) == [sites[:-1], sites[-1:]]
    assert in_groups(sites, 1) == [[site] for site in sites]
    shapes = {site.name: shapes_of(site) for site in sites}
    found = {
        site.name: statistics_of(site).of(
            {name: torch.rand(shape, dtype=torch.float64) for name, shape in shapes[site.name].items()}
        )
        for site in sites
    }
    with ExitStack() as resources:
        stored = StatisticsOnDisk(sites, resources)
        stored.update(found)
        assert list(stored) == list(found)
        for name, one in found.items():
            assert all(torch.equal(getattr(one, each), getattr(stored[name], each)) for each in one.names())
        assert stored.pop(sites[0].name) is not None
        with pytest.raises(KeyError):
            stored[sites[0].name]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_full_rank_is_exact_and_lower_ranks_are_better_than_without_calibration(
    name: str, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    folder = tiny_folder(name)
    model = open_model(folder)
    found = collected(model, data, tmp_path / "s")
    decompose_model(model, tmp_path / "full", statistics=found)
    assert block_errors(tmp_path / "full", folder) < 1e-5
    plain, calibrated = tmp_path / "plain", tmp_path / "calibrated"
    prune_model(model, plain, Rule(rank=5), layout="dense")
    written = prune_model(model, calibrated, Rule(rank=5), layout="dense", statistics=found)
    assert block_errors(calibrated, folder) < block_errors(plain, folder)
    assert written.summary["method"] == "calibrated"
    assert written.summary["calibration_sha256"] == data_sha256(found)
    again = tmp_path / "compact"
    export_model(open_model(calibrated), again, "compact")
    assert tiny.close(tiny.load(again), tiny.load(calibrated))


@pytest.mark.parametrize(("name", "rope_ratio"), [("whisper", None), ("bert", None), ("llama", 0.3)])
def test_a_compact_model_is_calibrated(
    name: str, rope_ratio: float | None, tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    """Its statistics and trials are those of the same model with zeros, and so are the models that are cut by them."""
    first, rule = Rule(ratio=0.3, rope_ratio=rope_ratio), Rule(target_attention=0.7)
    models = {}
    for layout in ("compact", "dense"):
        prune_model(open_model(tiny_folder(name)), tmp_path / layout, first, layout=layout)
        models[layout] = open_model(tmp_path / layout)
    compact, dense_one = models.values()
    found, other = (collected(model, data, tmp_path / f"s-{layout}") for layout, model in models.items())
    for site, same in zip(compact.attention, dense_one.attention, strict=True):
        assert max(site.vo_ranks) < site.head_dim
        one, two = found.of(site), other.of(same)
        assert all(
            torch.allclose(getattr(one, n), getattr(two, n), rtol=1e-4, atol=1e-6) for n in AttentionStatistics.names()
        )
        assert one.trials is not None
    decompose_model(compact, tmp_path / "full", statistics=found)
    assert block_errors(tmp_path / "full", tmp_path / "compact") < 1e-5
    prune_model(compact, tmp_path / "calibrated", rule, statistics=found)
    prune_model(compact, tmp_path / "plain", rule)
    assert open_model(tmp_path / "calibrated").parameters < 0.95 * compact.parameters
    errors = [block_errors(tmp_path / made, tmp_path / "compact") for made in ("calibrated", "plain")]
    assert 0 < errors[0] < 0.95 * errors[1]
    in_sequence = collected(compact, data, tmp_path / "in sequence", rule)
    prune_model(compact, tmp_path / "again", rule, statistics=in_sequence)
    assert block_errors(tmp_path / "again", tmp_path / "compact") < errors[1]


def test_the_spectrum_predicts_the_error_on_the_inputs(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    """After cutting V-O of a head, the error of the output is the norm of the dropped singular values."""
    model = open_model(tiny_folder("bert"))
    site = model.attention[0]
    weighed = weigh(collected(model, data, tmp_path / "s").of(site), site, None)
    weights = read_site(model.reader, site)
    pair = Pair(weights.v.double().mT, weights.o.double().permute(1, 2, 0, 3).flatten(1, 2))
    weighting = Weighting(weighed.vo.left, None, 0.0)
    transforms = weighted_transforms(pair, weighting)
    gone = torch.linalg.inv(transforms.left)[:, 5:].mT @ transforms.left[:, :, 5:].mT  # onto the last 3 directions
    lost = pair.right @ gone  # (G, D_o, d)
    error = torch.einsum("god,gde,goe->g", lost, weighed.vo.left, lost).sqrt()
    assert torch.allclose(error, transforms.spectrum[:, 5:].norm(dim=-1), rtol=1e-6)


def test_the_mean_of_cut_directions_is_kept(tiny_folder: TinyFolder, data: list[Path], tmp_path: Path) -> None:
    """The block's mean output over the calibration data stays nearly the same when most directions are cut."""
    folder = tiny_folder("bert")
    model = open_model(folder)
    found = collected(model, data, tmp_path / "s")
    decompose_model(model, tmp_path / "full", statistics=found)
    prune_model(open_model(tmp_path / "full"), tmp_path / "cut", Rule(rank=1), model.attention[:1], layout="dense")
    prune_model(model, tmp_path / "plain", Rule(rank=1), model.attention[:1], layout="dense")

    def mean(made: Path) -> Tensor:
        loaded, outputs = tiny.load(made), []
        projection = loaded.get_submodule(model.attention[0].o)
        projection.register_forward_hook(lambda _module, _args, output: outputs.append(output[0]))
        with torch.no_grad():
            for given in batches(loaded):
                loaded(**given)
        return torch.cat(outputs).mean(0)

    original = mean(folder)
    assert torch.allclose(mean(tmp_path / "full"), original, atol=1e-4)
    # Q-K is cut as well, which changes the attention weights, so that the mean is not exactly the same.
    drift, plain = ((mean(tmp_path / made) - original).norm() for made in ("cut", "plain"))
    assert drift < 0.5 * plain


def test_a_calibrated_decomposition_is_sliced_and_changes_of_it_are_detected(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    model = open_model(tiny_folder("whisper"))
    found = collected(model, data, tmp_path / "s")
    full = decompose_model(model, tmp_path / "full", statistics=found)
    sliced = prune_model(open_model(tmp_path / "full"), tmp_path / "cut", Rule(ratio=0.4))
    assert sliced.summary["method"] == "calibrated"
    assert sliced.ranks == prune_model(model, tmp_path / "x", Rule(ratio=0.4), run=None, statistics=found).ranks
    assert full.ranks != sliced.ranks
    plain = prune_model(model, tmp_path / "plain", Rule(ratio=0.4))
    assert plain.ranks != sliced.ranks
    assert prune_model(open_model(tmp_path / "cut"), tmp_path / "again", Rule(rank=2)).method == "calibrated"
    changed = copy_of(tmp_path / "full", tmp_path / "changed")
    edit_weights(lambda tensors: tensors[f"model.{name_of(model)}.weight"].mul_(1.01))(changed)
    with pytest.raises(PessaError, match="has changed since"):
        measure(open_model(changed), open_model(changed).attention)


def name_of(model: Model) -> str:
    return model.attention[0].q.removeprefix("model.")


def test_statistics_that_do_not_belong_to_the_model_are_refused(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    model = open_model(tiny_folder("whisper"))
    found = collected(model, data[:1], tmp_path / "s")
    other = copy_of(tiny_folder("whisper"), tmp_path / "other")
    edit_weights(lambda tensors: tensors[f"model.{name_of(model)}.weight"].mul_(1.01))(other)
    with pytest.raises(PessaError, match="of other weights"):
        prune_model(open_model(other), tmp_path / "out", Rule(rank=4), statistics=found)
    with pytest.raises(PessaError, match="no statistics of"):
        found.of(open_model(tiny_folder("bert")).attention[0].__class__(**{**vars(model.attention[0]), "layer": 7}))
    with pytest.raises(PessaError, match="not a statistics file"):
        SavedStatistics(tiny_folder("whisper") / "model.safetensors")
    with pytest.raises(PessaError, match="not a statistics file"):
        SavedStatistics(tmp_path / "nowhere")


def test_repeating_one_input_is_too_little_data_but_works(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def same(_model: Any, _encoder: Any, _item: DataItem, _transcribed: bool) -> Iterator[dict[str, Tensor]]:
        ids = torch.full((1, 9), 7)
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    for stage in ("check_kind", "encoder_for"):
        monkeypatch.setattr(windows, stage, lambda *_: None)
    monkeypatch.setattr(windows, "inputs_of", same)
    for name in ("bert", "llama", "llama-biased"):
        model = open_model(tiny_folder(name))
        found = collected(model, data, tmp_path / name)
        assert len(shortages(found, model.attention)) == len(model.attention)
        spectra = measure(model, model.attention, statistics=found)
        assert all(np.isfinite(known.seams["vo"]).all() and (known.seams["vo"] > 0).any() for known in spectra.values())
        prune_model(model, tmp_path / f"{name}-out", Rule(ratio=0.3), statistics=found)
        with torch.no_grad():
            loaded = tiny.load(tmp_path / f"{name}-out")
            assert loaded(**tiny.inputs(loaded)).logits.isfinite().all()
    assert independent(torch.eye(5).double()) == 5


def test_in_sequence_later_blocks_get_the_outputs_of_pruned_blocks(
    tiny_folder: TinyFolder, data: list[Path], tmp_path: Path
) -> None:
    model = open_model(tiny_folder("whisper"))
    apart = collected(model, data, tmp_path / "apart")
    chain = collected(model, data, tmp_path / "chain", Rule(rank=3))

    def moved(name: str) -> float:
        site = next(site for site in model.attention if site.name == name)
        one, other = apart.of(site), chain.of(site)
        return float((one.queries - other.queries).norm() / one.queries.norm())

    assert max(moved("encoder.self.0"), moved("decoder.self.0")) < 1e-14
    assert min(moved(name) for name in ("encoder.self.1", "decoder.cross.0", "decoder.self.1")) > 1e-3
    asked = [
        prune_model(model, tmp_path / str(i), Rule(rank=3), statistics=s).summary for i, s in enumerate((apart, chain))
    ]
    assert [summary.get("calibration_sequential") for summary in asked] == [None, "rank 3"]
    assert asked[0]["calibration_sha256"] == asked[1]["calibration_sha256"]
    collect(model, model.attention, data[:1], tmp_path / "part")
    collect(model, model.attention, data[1:], tmp_path / "rest", Rule(rank=3))
    with pytest.raises(PessaError, match="not pruned and pruned by rank 3"):
        SavedStatistics(tmp_path / "part", tmp_path / "rest")


def test_lines_with_one_clip_are_all_used_and_transcripts_count(tmp_path: Path) -> None:
    """Of the same audio: two lines stay two, and other transcripts are other data, but not a second file of audio."""
    soundfile.write(tmp_path / "a.wav", np.full(160, 0.1), 16000)

    def read(
        *rows: dict[str, str], more: tuple[str, ...] = ()
    ) -> tuple[list[tuple[str | None, str | None]], list[str]]:
        lines = "".join(json.dumps({"audio": "a.wav"} | row) + "\n" for row in rows)
        (tmp_path / "clips.jsonl").write_text(lines)
        items, identities = read_data([tmp_path / "clips.jsonl", *(tmp_path / name for name in more)])
        return [(item.text, item.language) for item in items], identities

    one, two = {"text": "one"}, {"text": "two"}
    assert read(one, two)[0] == [("one", None), ("two", None)]
    assert read(one, one)[0] == [("one", None)] * 2
    assert read(one, {})[0] == [("one", None), (None, None)]
    assert read(one, more=("a.wav", "clips.jsonl"))[0] == [("one", None)]
    assert read_data([tmp_path / "a.wav", tmp_path / "clips.jsonl"]) == read_data([tmp_path / "clips.jsonl"])
    bare = read_data([tmp_path / "a.wav"]).identities
    ways = [read(one), read(two), read(one | {"language": "en"}), read({})]
    hashes = [data_sha256(CollectedStatistics({}, identities)) for _, identities in ways]
    assert len(set(hashes)) == len(hashes)
    assert all(files_of(identities) == set(bare) for _, identities in ways)


def test_each_file_of_data_is_read_once(tmp_path: Path) -> None:
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", np.full(160, 0.1 * number), 16000)
    (tmp_path / "clips.jsonl").write_text('{"audio": "0.wav", "text": "one"}\n\n{"file": "1.wav", "text": null}\n')
    (tmp_path / "texts.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "text.txt").write_text("three")
    items, hashes = read_data([tmp_path / "clips.jsonl", tmp_path, tmp_path / "texts.jsonl", tmp_path / "text.txt"])
    assert [item.text for item in items if item.audio is None] == ["one", "two", "three"]
    assert len([item for item in items if item.audio is not None]) == 2
    assert len(set(hashes)) == 4
    for content in ("[]", '{"audio": "none.wav"}', '{"other": 1}', "{", '{"text": 3}', ""):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(PessaError):
            read_data([tmp_path / "bad.jsonl"])
    (tmp_path / "empty").mkdir()
    for missing in (tmp_path / "nowhere", tmp_path / "empty"):
        with pytest.raises(PessaError):
            read_data([missing])


def test_the_commands(tiny_folder: TinyFolder, data: list[Path], tmp_path: Path, pessa: Pessa) -> None:
    folder, file, out = tiny_folder("bert"), tmp_path / "s.safetensors", tmp_path / "out"
    given = [argument for path in data for argument in ("--calibrate", path)]
    done = pessa("prune", folder, "-o", out, "--ratio", "0.3", *given, "--statistics", file)
    assert done.code == 0, done
    assert "calibrated" in done.err
    assert json.loads((out / "pessa.json").read_text())["method"] == "calibrated"
    seen = json.loads(pessa("inspect", folder, "--ratio", "0.3", "--statistics", file, "--json").out)
    assert seen["method"] == "calibrated"
    assert json.loads(pessa("inspect", folder, "--json").out)["method"] == "svd"
    assert pessa("decompose", folder, "-o", tmp_path / "full", "--statistics", file).code == 0
    few = pessa("inspect", folder, "--calibrate", data[0])
    assert few.code == 0
    assert "independent frames" in few.err
    chain = pessa("prune", folder, "-o", tmp_path / "chain", "--rank", "4", *given, "--sequential")
    assert chain.code == 0, chain
    refused = tmp_path / "no"
    is_refusal(pessa("prune", folder, "-o", refused, "--method", "vanilla", *given), "vanilla", code=2)
    is_refusal(pessa("prune", folder, "-o", refused, "--sequential", "--statistics", file), "--sequential", code=2)
    is_refusal(pessa("prune", folder, "-o", refused, *given, "--statistics", file), "exists already", code=2)
    is_refusal(pessa("inspect", folder, "--statistics", folder / "config.json"), "config.json")
    assert not refused.exists()


def test_statistics_of_a_block_add_up() -> None:
    one = AttentionStatistics.of({name: torch.ones((), dtype=torch.float64) for name in AttentionStatistics.names()})
    assert float((one + one).queries) == 2


def test_visible_keys_follow_the_mask() -> None:
    """Layers may alternate between masks of one shape, such as sliding windows and full attention."""
    full = torch.ones(2, 4, 4).tril() / 4
    window = full.triu(-1)
    seen = VisibleKeys()
    for attention in (full, full, window, full):
        rows, totals = seen.of(attention)
        expected = (attention > 0).float() / (attention > 0).sum(-1, keepdim=True)
        assert torch.equal(rows, expected)
        assert torch.equal(totals, expected.sum(1))
