"""What is measured, remembered and cut: with and without statistics, by any ranking, and from stored factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import TinyFolder, edit_weights
from safetensors.torch import load_file
from sites import ranks_by

from pessa_cli.blocks.site import AttentionSite
from pessa_cli.common.errors import PessaError
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.statistics.file import CollectedStatistics, SavedStatistics, data_sha256, fingerprint, save_statistics
from pessa_cli.statistics.sums import AttentionStatistics, shapes_of
from pessa_cli.surgery.block_io import read_site, write_site
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposed_block import cut, decompose_block, factored, spectra_of
from pessa_cli.surgery.decomposition import decomposition_of, measure
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.run import Run

MODELS = ("bert", "llama")


def sums_of(site: AttentionSite) -> AttentionStatistics:
    """Return statistics of the right shapes: positive definite moments, and results of trials."""
    generator = torch.Generator().manual_seed(site.layer)
    found: dict[str, Any] = {}
    for name, shape in shapes_of(site).items():
        tensor = torch.rand(shape, generator=generator, dtype=torch.float64)
        found[name] = tensor @ tensor.mT + torch.eye(shape[-1]) if len(shape) > 1 and shape[-1] == shape[-2] else tensor
    found["frames"] = torch.tensor(500.0, dtype=torch.float64)
    return AttentionStatistics(**found)


def collected(model: Model) -> CollectedStatistics:
    return CollectedStatistics({site.name: sums_of(site) for site in model.attention}, ["d"])


def equal(a: Spectra, b: Spectra) -> bool:
    pairs = [(a.seams.get(seam), b.seams.get(seam)) for seam in ("qk", "vo")] + [(a.pairs, b.pairs)]
    same = all(y is None if x is None else y is not None and np.array_equal(x, y) for x, y in pairs)
    return same and (a.calibrated, a.trials) == (b.calibrated, b.trials)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tiny_folder: TinyFolder) -> Model:
    return open_model(tiny_folder(request.param))


@pytest.fixture
def stored(model: Model, tmp_path: Path) -> Model:
    """The model as factors, with their spectra."""
    decompose_model(model, tmp_path / "stored")
    return open_model(tmp_path / "stored")


def both(model: Model, *arguments: Any) -> list[dict[str, Spectra]]:
    """Return the spectra as they are measured, and as a decomposition remembers them."""
    ranking, statistics = (*arguments, None)[:2]
    measured = measure(model, model.attention, ranking, Run(jobs=1), statistics)
    with decomposition_of(model, Run(jobs=1)) as decomposition:
        decomposition.decompose(model.attention, statistics, ranking)
        return [measured, decomposition.spectra]


@pytest.mark.parametrize("ranking", ["svd", "vanilla"])
def test_spectra_by_each_ranking(model: Model, ranking: Any) -> None:
    for found in both(model, ranking):
        assert list(found) == [site.name for site in model.attention]
        for site in model.attention:
            expected = spectra_of(read_site(model.reader, site), site, ranking)
            assert np.allclose(found[site.name].seams["vo"], expected.seams["vo"], rtol=1e-10)
            assert found[site.name].seams.keys() == expected.seams.keys()
            assert found[site.name].trials is None
            if expected.pairs is not None:
                assert np.array_equal(found[site.name].pairs, expected.pairs)  # type: ignore[arg-type]


def test_spectra_of_stored_factors_are_those_on_file(stored: Model) -> None:
    assert list(stored.spectra) == [site.name for site in stored.attention]
    for found in both(stored, "svd"):
        for site in stored.attention:
            pairs = spectra_of(read_site(stored.reader, site), site, "svd").pairs
            assert equal(found[site.name], replace(stored.spectra[site.name], pairs=pairs))
    for found in both(stored, "vanilla"):
        for site in stored.attention:
            assert not np.array_equal(found[site.name].seams["vo"], stored.spectra[site.name].seams["vo"])


def test_stored_factors_are_only_sliced(stored: Model) -> None:
    header = stored.reader.header
    with decomposition_of(stored, Run()) as decomposition:
        decomposition.decompose(stored.attention)
        for site in stored.attention:
            kept = replace(site, vo_ranks=(3,) * site.kv_heads)
            for layout in ("compact", "dense"):
                found = decomposition.cut(kept, layout)
                expected = write_site(read_site(stored.reader, site), kept, header, layout)
                assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_factors_that_changed_are_refused(stored: Model) -> None:
    name = f"{stored.attention[1].v}.weight"
    edit_weights(lambda tensors: tensors[name].mul_(1.01))(stored.reader.folder)
    changed = open_model(stored.reader.folder)
    with pytest.raises(PessaError, match=f"does not belong to these weights: {changed.sites[1].name}") as caught:
        measure(changed, changed.sites)
    assert str(changed.reader.folder) in caught.value.message
    with decomposition_of(changed, Run()) as decomposition:
        decomposition.decompose(changed.sites)
        decomposition.cut(changed.sites[0], "dense")
        with pytest.raises(PessaError, match=f"does not belong to these weights: {changed.sites[1].name}"):
            decomposition.cut(changed.sites[1], "dense")
    statistics = collected(changed)
    assert all(found.calibrated for found in measure(changed, changed.attention, statistics=statistics).values())


def test_statistics_weigh_each_block(model: Model, stored: Model) -> None:
    """With statistics a block is decomposed anew, even if it is stored as factors."""
    for source in (model, stored):
        statistics = collected(source)
        for found in both(source, "svd", statistics):
            for site in source.attention:
                expected = decompose_block(read_site(source.reader, site), site, "svd", statistics.of(site)).spectra
                assert equal(found[site.name], expected)
                assert found[site.name].calibrated


def test_calibrated_blocks_are_cut_and_refitted(model: Model) -> None:
    statistics, header = collected(model), model.reader.header
    with decomposition_of(model, Run()) as decomposition:
        decomposition.decompose(model.attention, statistics)
        for site in model.attention:
            weights = read_site(model.reader, site)
            transforms = decompose_block(weights, site, "svd", statistics.of(site)).form
            assert transforms is not None
            kept = replace(site, vo_ranks=(3,) * site.kv_heads)
            found = decomposition.cut(kept, "compact")
            expected = write_site(cut(factored(weights, site, transforms), kept, transforms), kept, header, "compact")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_statistics_of_other_weights_are_refused(model: Model, tmp_path: Path) -> None:
    blocks = {site.name: sums_of(site) for site in model.attention}
    own = {site.name: fingerprint(read_site(model.reader, site)) for site in model.attention}
    save_statistics(tmp_path / "own", blocks, own, ["d"])
    save_statistics(tmp_path / "other", blocks, own | {model.attention[1].name: "x"}, ["d"])
    assert all(found.calibrated for found in both(model, "svd", SavedStatistics(tmp_path / "own"))[0].values())
    with pytest.raises(PessaError, match=f"statistics of {model.attention[1].name} are of other weights"):
        measure(model, model.attention, statistics=SavedStatistics(tmp_path / "other"))
    with (
        decomposition_of(model, Run()) as decomposition,
        pytest.raises(PessaError, match=f"statistics of {model.attention[1].name} are of other weights"),
    ):
        decomposition.decompose(model.attention, SavedStatistics(tmp_path / "other"))


def test_a_reader_that_holds_the_weights_is_used(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BlockReader(model.reader, keep=True)
    for site in model.attention:
        blocks.weights(site)

    def closed(_name: str) -> torch.Tensor:
        raise AssertionError("the weights were read again")

    monkeypatch.setattr(model.reader, "get", closed)
    assert len(measure(model, model.attention, blocks=blocks)) == 2
    with decomposition_of(model, Run(), blocks, tmp_path) as decomposition:
        decomposition.decompose(model.attention)
        assert decomposition.cut(model.attention[0], "compact")
    prune_model(model, tmp_path / "dry", Rule(ratio=0.3), blocks=blocks, run=Run(dry=True))


def test_a_share_of_the_whole_model(model: Model, tmp_path: Path) -> None:
    planned = prune_model(model, tmp_path / "x", Rule(target_params=0.9), run=Run(dry=True))
    left = sum(info.count for info in planned.header.values())
    assert 0.9 * model.parameters - 200 < left <= 0.9 * model.parameters


@pytest.mark.parametrize("write", ["prune", "decompose"])
def test_calibrated_outputs(model: Model, write: str, tmp_path: Path) -> None:
    statistics = collected(model)
    sites = [model.attention[1]]
    call: Callable[..., Any] = decompose_model if write == "decompose" else prune_model
    more = () if write == "decompose" else (Rule(rank=3),)
    planned = call(model, tmp_path / "dry", *more, sites=sites, run=Run(dry=True), statistics=statistics)
    assert not (tmp_path / "dry").exists()
    written = call(model, tmp_path / "out", *more, sites=sites, run=Run(source="me/it"), statistics=statistics)
    for rewrite in (planned, written):
        assert (rewrite.method, rewrite.data, rewrite.command) == ("calibrated", data_sha256(statistics), write)
        assert rewrite.ranks == planned.ranks
        assert [site.name for site in rewrite.sites] == [model.attention[1].name]
        assert rewrite.spectra[model.attention[1].name].calibrated
    assert (written.source, planned.source) == ("me/it", model.reader.folder.name)
    assert (written.rule, written.layout) == (("full rank", "dense") if write == "decompose" else ("rank 3", "compact"))
    if write == "decompose":
        assert (
            ranks_by(written.ranks, "vo")
            == ranks_by(written.ranks, "qk")
            == {model.attention[1].name: model.attention[1].full}
        )
    with decomposition_of(model, Run()) as decomposition:
        decomposition.decompose(sites, statistics)
        again = call(model, tmp_path / "again", *more, sites=sites, statistics=statistics, decomposition=decomposition)
        options = {"statistics": statistics, "decomposition": decomposition}
        dry = call(model, tmp_path / "x", *more, sites=sites, run=Run(dry=True), **options)
    assert again.ranks == dry.ranks == written.ranks
    assert dry.spectra is decomposition.spectra
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "again"))
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    first = load_file(model.reader.folder / "model.safetensors")
    assert torch.equal(one[f"{model.attention[0].q}.weight"], first[f"{model.attention[0].q}.weight"])
    assert not torch.equal(one[f"{model.attention[1].v}.weight"][:2], first[f"{model.attention[1].v}.weight"][:2])


def test_a_model_of_calibrated_factors_stays_calibrated(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = open_model(tiny_folder("bert"))
    decompose_model(model, tmp_path / "full", statistics=collected(model))
    stored = open_model(tmp_path / "full")
    written = prune_model(stored, tmp_path / "out", Rule(rank=3), layout="dense")
    assert (written.method, written.data) == ("calibrated", None)
    plain = prune_model(model, tmp_path / "plain", Rule(rank=3), layout="dense")
    assert plain.method == "svd"
