"""The parts of a rewrite that are arithmetic on names, shapes and numbers, worked out by hand."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from attention import GROUPED, decomposed, weights_of
from harness import TinyFolder, copy_of
from safetensors.torch import load_file, save_file
from sites import plan_by, spectra_by, trials_by

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import ROPE, AttentionSite
from pessa_cli.blocks.table import ARCHITECTURES
from pessa_cli.checkpoint.dtypes import UNIT_ROUNDOFF
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.version import VERSION
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.surgery import run as run_module
from pessa_cli.surgery.attention_block import attention_factors
from pessa_cli.surgery.decomposition import decomposition_of, measure
from pessa_cli.surgery.export import _fit, export_model
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.rewrite import Rewrite, cut_into_files
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.scratch import Scratch
from pessa_cli.surgery.spectra_file import SPECTRA_FILE, check_spectra, load_spectra, save_spectra
from pessa_cli.surgery.totals import totals

BIASED = replace(GROUPED, biases=frozenset("qkvo"))
TRIALS = trials_by((0.1, 0.2, 0.3, 0.4), (0.5, 0.6, 0.7, 0.8), 3.0)
QK = np.array([[4.0, 2.0, 1.0], [3.0, 1.5, 0.0]])
VO = np.array([[5.0, 2.5, 2.0], [6.0, 1.0, 0.1]])


# The counts of a plan


def test_totals_by_hand() -> None:
    other = replace(BIASED, layer=1, q="q1", k="k1", v="v1", o="o1")
    header = {name: TensorInfo("F32", shape) for site in (BIASED, other) for name, shape in site.tensors.items()}
    header["o.bias"] = TensorInfo("F64", (7,))
    header["embed"] = TensorInfo("F16", (10, 10))
    plan = plan_by({BIASED.name: (1, 2)}, {BIASED.name: (3, 0)})
    found = totals(header, [BIASED, other], [BIASED], plan)
    qk_each, vo_each = 2 * 5 + 6 + 3, 6 + 2 * 7 + 1
    attention = 6 * qk_each + 6 * vo_each + 7
    left = 3 * qk_each + 3 * vo_each + 7
    assert found == {
        "blocks": 2,
        "blocks_chosen": 1,
        "qk_pruned": 0.5,
        "vo_pruned": 0.5,
        "attention_parameters": attention,
        "attention_parameters_after": left,
        "attention_pruned": (attention - left) / attention,
        "mlp_pruned": 0.0,
        "mlp_parameters": 0,
        "mlp_parameters_after": 0,
        "mlp_parameters_pruned": 0.0,
        "parameters": 2 * attention + 100,
        "parameters_after": attention + left + 100,
        "model_pruned": (attention - left) / (2 * attention + 100),
        "bytes": 4 * 2 * attention + 4 * 7 + 200,
        "bytes_after": 4 * (attention + left) + 4 * 7 + 200,
    }
    pruned = replace(BIASED, qk_ranks=(1, 1), vo_ranks=(2, 2))
    again = totals(header, [pruned], [pruned], plan_by({pruned.name: (1, 0)}, {pruned.name: (2, 1)}))
    assert (again["qk_pruned"], again["vo_pruned"]) == (0.5, 0.25)
    nothing = totals(header, iter([BIASED]), [], plan_by({}, {}))
    assert nothing["blocks"] == 1
    assert (nothing["qk_pruned"], nothing["attention_pruned"], nothing["model_pruned"]) == (0.0, 0.0, 0.0)


# The files of an output


def test_the_tensors_of_a_block_stay_in_one_file() -> None:
    header = {name: TensorInfo("F32", (size,)) for name, size in zip("abcdef", (10, 20, 30, 5, 5, 40), strict=True)}
    owner = {"b": "block", "c": "block"}

    def files(most: int) -> list[str]:
        return ["".join(part) for part in cut_into_files(header, owner, most).values()]

    assert files(4 * 110) == ["abcdef"]
    assert files(4 * 110 - 1) == ["abcde", "f"]
    assert files(4 * 60) == ["abc", "def"]
    assert files(4 * 59) == ["a", "bcd"[:3], "ef"]
    assert files(1) == ["a", "bc", "d", "e", "f"]
    assert list(cut_into_files(header, owner, 10**9)) == ["model.safetensors"]
    assert list(cut_into_files(header, owner, 4 * 60)) == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]
    assert cut_into_files(header, owner, 4 * 60)["model-00001-of-00002.safetensors"] == {
        name: header[name] for name in "abc"
    }
    assert files(4 * 60) != ["".join(part) for part in cut_into_files(header, {"b": "x", "c": "y"}, 4 * 45).values()]


@pytest.fixture
def rewrite(tiny_folder: TinyFolder) -> Rewrite:
    """A rewrite of the first block of a tiny LLaMA, with pairs."""
    model = open_model(tiny_folder("llama"))
    site = model.attention[0]
    pairs = ((range(0, 1), range(2, 3)), (range(1, 2),))
    plan = plan_by({site.name: (4, 2)}, {site.name: (3, 0)}, {site.name: pairs})
    vo = np.array([[8.0, 4, 2, 4, 3, 0, 0, 0], [3.0, 4, 0, 0, 0, 0, 0, 0]])
    spectra = {site.name: spectra_by(None, vo, pairs=np.ones((2, 4)))}
    return Rewrite("prune", "me/model", model, [site], plan, spectra, "rank 3", data="abc")


def test_the_summary_by_hand(rewrite: Rewrite) -> None:
    summary = rewrite.summary
    name = rewrite.sites[0].name
    assert {key: summary[key] for key in ("pessa", "command", "source", "method", "rule", "layout")} == {
        "pessa": VERSION,
        "command": "prune",
        "source": "me/model",
        "method": "svd",
        "rule": "rank 3",
        "layout": "compact",
    }
    assert summary["versions"].keys() == {"python", "torch"}
    assert summary["versions"]["torch"] == torch.__version__.partition("+")[0] or "+" in torch.__version__
    assert summary["calibration_sha256"] == "abc"
    assert summary["ranks"] == {name: {"qk": "4 2", "vo": "3 0", "pairs": "0,2 1"}}
    assert summary["dropped"] == {name: {"qk": None, "vo": [5.0, 5.0]}}
    assert "calibration_sha256" not in replace(rewrite, data=None).summary


def test_the_stored_blocks_and_the_header(rewrite: Rewrite) -> None:
    first, second, *mlps = rewrite.model.sites
    assert [site.name for site in rewrite.stored] == [first.name, second.name, *(mlp.name for mlp in mlps)]
    assert len(mlps) == 2
    assert rewrite.stored[1] is second
    assert rewrite.stored[0].ranks == {"qk": (4, 2), "vo": (3, 0)}
    assert replace(rewrite, layout="dense").stored[0] == first
    assert rewrite.owner == dict.fromkeys(first.tensors, first)
    assert rewrite.sites_of(rewrite.header) == [first]
    assert rewrite.sites_of({}) == []
    source = rewrite.model.reader.header
    header = rewrite.header
    assert header.keys() == source.keys()
    for name, info in header.items():
        assert info.dtype == source[name].dtype
        assert info.shape == rewrite.stored[0].tensors.get(name, source[name].shape)
    places = [place for place, name in enumerate(header) if name in first.tensors]
    assert places == list(range(places[0], places[0] + 4))  # the tensors of a block follow one another
    assert list(header)[places[0] : places[-1] + 1] == list(first.tensors)
    assert list(rewrite.shards) == ["model.safetensors"]
    assert len(replace(rewrite, shard_bytes=1).shards) == len(header) - 3
    both = replace(rewrite, sites=[first, second], ranks=RankPlan.stored([first, second]))
    assert both.sites_of(both.header) == [first, second]


def test_the_identity_of_a_run(rewrite: Rewrite) -> None:
    assert rewrite.run == replace(rewrite).run
    name = rewrite.sites[0].name
    for other in (
        replace(rewrite, shard_bytes=1000),
        replace(rewrite, rule="rank 4"),
        replace(rewrite, ranks=replace(rewrite.ranks, ranks={name: {"qk": (4, 2), "vo": (3, 1)}})),
        replace(rewrite, layout="dense"),
    ):
        assert other.run != rewrite.run


def test_directions_that_cannot_be_merged_do_not_count_as_values() -> None:
    partial = replace(BIASED, unmerged=1)
    described = Rewrite("prune", "", None, [partial], plan_by({partial.name: (3, 1)}, {partial.name: (3, 3)}), {}, "")  # type: ignore[arg-type]
    assert described.kept_values == {partial.name: {"qk": (2, 0), "vo": (3, 3)}}


# The spectra file


def spectra() -> dict[str, Spectra]:
    second = replace(BIASED, layer=1)
    return {BIASED.name: spectra_by(QK, VO, True, TRIALS), second.name: spectra_by(QK[:, ::1] / 2, VO / 2)}


SITES = [BIASED, replace(BIASED, layer=1)]


def test_spectra_are_the_same_after_a_file(tmp_path: Path) -> None:
    assert load_spectra(tmp_path, SITES) == {}
    save_spectra(tmp_path, spectra())
    found = load_spectra(tmp_path, SITES)
    for name, known in spectra().items():
        again = found[name]
        assert again.seams.keys() == known.seams.keys()
        assert all(np.array_equal(again.seams[seam], each) for seam, each in known.seams.items())
        assert (again.calibrated, again.trials, again.pairs) == (known.calibrated, known.trials, None)
    assert load_spectra(tmp_path, [replace(BIASED, layer=7)]) == {}
    unmerged = replace(BIASED, unmerged=3)
    save_spectra(tmp_path, {BIASED.name: spectra_by(None, VO)})
    assert load_spectra(tmp_path, [unmerged])[BIASED.name].seams.keys() == {"vo"}
    partial = replace(BIASED, unmerged=1)
    save_spectra(tmp_path, {BIASED.name: spectra_by(QK[:, :2], VO)})
    assert load_spectra(tmp_path, [partial])[BIASED.name].seams.keys() == {"qk", "vo"}
    keys = load_file(tmp_path / SPECTRA_FILE)
    assert set(keys) == {f"{BIASED.name}.qk", f"{BIASED.name}.vo"}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ({"vo": torch.from_numpy(VO).float()}, "do not fit its V-O of 2 x 3 directions"),
        ({"vo": torch.from_numpy(VO)[:, :2].contiguous()}, "do not fit"),
        ({"vo": torch.from_numpy(VO[:1])}, "do not fit"),
        ({"vo": torch.from_numpy(VO * [1, 1, np.nan])}, "do not fit"),
        ({"vo": torch.from_numpy(VO * [np.inf, 1, 1])}, "do not fit"),
        ({"vo": torch.from_numpy(VO * [1, 1, -1])}, "do not fit"),
        ({"vo": torch.from_numpy(VO[:, ::-1].copy())}, "do not fit"),
        ({"qk": torch.from_numpy(QK[:, ::-1].copy())}, "do not fit"),
        ({"qk": torch.from_numpy(QK[:, :2].copy())}, "do not fit"),
        ({"qk": None}, "do not fit"),
        ({"trials": torch.ones(8, dtype=torch.float64)}, "trial cuts of .* are damaged"),
        ({"trials": torch.ones(9)}, "damaged"),
        ({"trials": -torch.ones(9, dtype=torch.float64)}, "damaged"),
        ({"trials": torch.full((9,), torch.inf, dtype=torch.float64)}, "damaged"),
    ],
)
def test_spectra_that_do_not_fit_are_refused(tensor: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_spectra(tmp_path, {BIASED.name: spectra_by(QK, VO)})
    content = load_file(tmp_path / SPECTRA_FILE) | {f"{BIASED.name}.{part}": new for part, new in tensor.items()}
    save_file({name: new for name, new in content.items() if new is not None}, tmp_path / SPECTRA_FILE)
    with pytest.raises(PessaError, match=message) as caught:
        load_spectra(tmp_path, [BIASED])
    assert caught.value.message.startswith(f"{tmp_path / SPECTRA_FILE}: ")
    assert caught.value.hint == "delete it, and the model is decomposed again"


def test_values_of_zero_and_equal_values_are_fine(tmp_path: Path) -> None:
    save_spectra(
        tmp_path,
        {BIASED.name: spectra_by(np.zeros((2, 3)), np.ones((2, 3)), False, trials_by((0.0,) * 4, (0.0,) * 4, 0.0))},
    )
    assert load_spectra(tmp_path, [BIASED])[BIASED.name].trials == trials_by((0.0,) * 4, (0.0,) * 4, 0.0)
    (tmp_path / SPECTRA_FILE).write_bytes(b"x")
    with pytest.raises(PessaError, match="is not a spectra file"):
        load_spectra(tmp_path, [BIASED])


PROJECTIONS = ("q", "k", "v", "o", "q_bias", "v_bias")
SINKS = replace(GROUPED.spec, key_bias_stays=True, sums_to_one=False)


def factors(site: AttentionSite, dtype: torch.dtype = torch.float64) -> tuple[HeadWeights, Spectra]:
    weights = weights_of(site, dtype=dtype)
    block = decomposed(weights, site, "svd")
    assert block.form is not None
    return attention_factors(weights, site, block.form), block.spectra


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("kind", ["biased", "sinks", "unmerged", "partial", "half"])
def test_changed_weights_do_not_belong_to_their_spectra(kind: str, calibrated: bool, tmp_path: Path) -> None:
    site = {
        "biased": BIASED,
        "sinks": replace(BIASED, spec=SINKS),
        "unmerged": replace(BIASED, unmerged=3),
        "partial": replace(BIASED, unmerged=1),
        "half": replace(BIASED, dtype="F16"),
    }[kind]
    made, known = factors(site, torch.float16 if kind == "half" else torch.float64)
    if calibrated:  # values in other units
        known = replace(
            known,
            seams={seam: (3 if seam == "qk" else 5) * each for seam, each in known.seams.items()},
            calibrated=True,
        )
    check_spectra(tmp_path, known, site, made)
    noticed = {"v", "o"} | ({"v_bias", "k_bias"} if kind == "sinks" else set())
    if kind != "unmerged":
        noticed |= {"q", "k", "q_bias"}
    # Of the last head the last direction, which is merged in all kinds that merge any.
    places: dict[str, Any] = {"q": (1, 1, -1), "k": (1, -1), "v": (1, -1), "o": (0, 1, 1, -1), "o_bias": -1}
    places |= {"q_bias": (1, 1, -1), "k_bias": (1, -1), "v_bias": (1, -1)}
    for name, place in places.items():
        tensor = getattr(made, name).clone()
        tensor[place] += 1
        other = replace(made, **{name: tensor})
        if name in noticed:
            with pytest.raises(PessaError, match=f"does not belong to these weights: {site.name} has changed"):
                check_spectra(tmp_path, known, site, other)
        else:
            check_spectra(tmp_path, known, site, other)


@pytest.mark.parametrize("sides", [("q", "k"), ("v", "o")])
def test_factors_that_grew_together_have_other_values(sides: tuple[str, str], tmp_path: Path) -> None:
    """Both vectors of a direction still have the same norm, which is all that a calibrated spectrum tells."""
    site = replace(GROUPED, biases=frozenset("kvo"))
    made, known = factors(site)
    grown = replace(made, **{side: 1.1 * getattr(made, side) for side in sides})
    with pytest.raises(PessaError, match="does not belong"):
        check_spectra(tmp_path, known, site, grown)
    check_spectra(tmp_path, replace(known, calibrated=True), site, grown)


def test_a_change_is_noticed_from_four_roundoffs_on(tmp_path: Path) -> None:
    for dtype in ("F32", "BF16", "F64"):
        site = replace(GROUPED, dtype=dtype)
        made, known = factors(site)
        for share, refused in ((3.0, False), (5.0, True)):
            v = made.v.clone()
            v[0, 0] *= 1 + share * max(UNIT_ROUNDOFF[dtype], 2.0**-40)  # the direction of the largest value
            if refused:
                with pytest.raises(PessaError, match="does not belong"):
                    check_spectra(tmp_path, known, site, replace(made, v=v))
            else:
                check_spectra(tmp_path, known, site, replace(made, v=v))


# The temporary file


def test_tensors_are_the_same_after_the_temporary_file(tmp_path: Path) -> None:
    blocks = {
        "a": {"x": torch.randn(3, 4, dtype=torch.float64), "empty": torch.zeros(0, 2, dtype=torch.float64)},
        "b": {"x": torch.randn(5, dtype=torch.float64), "one": torch.tensor(0.3, dtype=torch.float64)},
        "c": {"strided": torch.randn(4, 3, dtype=torch.float64).mT},
    }
    with Scratch(tmp_path) as scratch:
        assert list(tmp_path.iterdir()) == []  # it has no name
        for name, tensors in blocks.items():
            scratch.put(name, tensors)
        for name, tensors in reversed(blocks.items()):
            found = scratch.take(name)
            assert found.keys() == tensors.keys()
            assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
        scratch._file.truncate(12 * 8 + 8)
        with pytest.raises(OSError, match="read 8 of 40 bytes of x of b from a temporary file"):
            scratch.take("b")
        assert torch.equal(scratch.take("a")["x"], blocks["a"]["x"])
    assert scratch._file.closed


# The settings of a run


def test_how_many_blocks_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = 3 * (4 * (5 + 7) + 2 * 2 * 6) + 3 * (4 + 2 + 2) + 7  # weights and biases
    monkeypatch.setattr(run_module, "IN_FLIGHT", 8 * entries * 5)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    assert Run().jobs_for([BIASED]) == 3
    assert Run(jobs=4).jobs_for([BIASED]) == 4
    assert Run(jobs=9).jobs_for([BIASED]) == 5
    assert Run(jobs=9).jobs_for([BIASED, replace(BIASED, head_dim=6)]) == 2
    monkeypatch.setattr(run_module, "IN_FLIGHT", 1)
    assert Run(jobs=9).jobs_for([BIASED]) == 1
    monkeypatch.setattr(run_module, "IN_FLIGHT", 10**9)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert Run().jobs_for([BIASED]) == 1


def test_settings_that_cannot_be_used() -> None:
    assert Run(jobs=0, shard_bytes=1).source is None
    with pytest.raises(UsageError, match="--jobs -1"):
        Run(jobs=-1)
    with pytest.raises(UsageError, match="--max-shard-size 0"):
        Run(shard_bytes=0)
    with pytest.raises(UsageError, match=r"--device nonsense cannot be used: [^\n]+$"):
        Run(device="nonsense")


# Exports


@pytest.mark.parametrize(
    ("qk", "vo", "pairs", "fits"),
    [
        ((0, 3), (3, 0), (), True),
        ((0, 4), (3, 0), (), False),
        ((0, -1), (3, 0), (), False),
        ((0, 3), (3, 4), (), False),
        ((0, 3, 1), (3, 0), (), False),
        ((0, 3), (3,), (), False),
        ((0, 3), (3, 0), None, False),
        ((2, 2), (3, 3), ((range(0, 1),), (range(0, 1),)), False),
    ],
)
def test_ranks_that_a_file_could_have(qk: Any, vo: Any, pairs: Any, fits: bool) -> None:
    assert _fit(BIASED, {"qk": qk, "vo": vo}, pairs) == fits


def test_ranks_and_pairs_under_rope() -> None:
    site = replace(BIASED, spec=ARCHITECTURES["llama"][0], between=ROPE, head_dim=4, unmerged=4)
    pairs = ((range(0, 2),), (range(1, 2),))
    assert _fit(site, {"qk": (4, 2), "vo": (4, 4)}, pairs)
    assert not _fit(site, {"qk": (4, 4), "vo": (4, 4)}, pairs)
    assert not _fit(site, {"qk": (4, 2), "vo": (4, 4)}, ())
    assert _fit(site, {"qk": (4, 4), "vo": (4, 4)}, ())
    assert not _fit(site, {"qk": (4, 2), "vo": (4, 4)}, ((range(0, 2),), (range(2, 3),)))
    wide = replace(site, head_dim=8, unmerged=8)
    assert _fit(wide, {"qk": (2, 2), "vo": (8, 8)}, ((range(3, 4),), (range(3, 4),)))
    partial = replace(BIASED, unmerged=1)
    assert _fit(partial, {"qk": (1, 3), "vo": (0, 0)}, ())
    assert not _fit(partial, {"qk": (1, 0), "vo": (0, 0)}, ())


@pytest.fixture
def dense(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """A BERT pruned to uneven ranks, in the dense layout."""
    out = tmp_path / "dense"
    prune_model(open_model(tiny_folder("bert")), out, Rule(ratio=0.4), layout="dense")
    return out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": {}}, "is damaged: it has no valid ranks, method and rule"),
        ({"ranks": {"encoder.self.0": {"qk": "x", "vo": "1"}}}, "is damaged"),
        ({"ranks": {"encoder.self.0": {"qk": "1 1 1 1"}}}, "encoder.self.0 ranks that do not fit"),
        ({"ranks": 3}, "is damaged"),
        ({"method": "other"}, "is damaged"),
        ({"method": 3}, "is damaged"),
        ({"rule": None}, "is damaged"),
        (
            {"ranks": {"encoder.self.7": {"qk": "1 1 1 1", "vo": "1 1 1 1"}}},
            "encoder.self.7 ranks that do not fit",
        ),
        (
            {"ranks": {"encoder.self.0": {"qk": "1 1 1 9", "vo": "1 1 1 1"}}},
            "encoder.self.0 ranks that do not fit",
        ),
        ({"ranks": {"encoder.self.0": {"qk": "1 1 1 1", "vo": "1 1 1 1"}}}, "encoder.self.0 ranks that would remove"),
    ],
)
def test_manifests_whose_ranks_cannot_be_used(
    change: dict[str, Any], message: str, dense: Path, tmp_path: Path
) -> None:
    manifest = json.loads((dense / "pessa.json").read_text())
    (dense / "pessa.json").write_text(json.dumps(manifest | change))
    with pytest.raises(PessaError, match=message):
        export_model(open_model(dense), tmp_path / "out", "compact")
    assert not (tmp_path / "out").exists()


def test_an_export_keeps_ranks_method_and_rule(dense: Path, tmp_path: Path) -> None:
    manifest = json.loads((dense / "pessa.json").read_text())
    planned = export_model(open_model(dense), tmp_path / "out", "compact", Run(dry=True))
    assert not (tmp_path / "out").exists()
    written = export_model(open_model(dense), tmp_path / "out", "compact", Run(source="me/it"))
    assert planned.ranks == written.ranks
    assert (written.command, written.method, written.rule, written.layout) == ("export", "svd", "ratio 0.4", "compact")
    assert written.source == "me/it"
    assert written.summary["ranks"] == manifest["ranks"]
    assert tiny.close(tiny.load(dense), tiny.load(tmp_path / "out"))
    (tmp_path / "out" / "pessa.json").unlink()
    stored = export_model(open_model(tmp_path / "out"), tmp_path / "back", "dense")
    assert (stored.method, stored.rule) == ("svd", "as stored")
    assert stored.ranks == written.ranks
    (dense / "pessa.json").unlink()
    with pytest.raises(PessaError, match=r"has no pessa\.json"):
        export_model(open_model(dense), tmp_path / "no", "compact")


# Decompositions


def test_blocks_are_measured_in_order_and_each_fault_is_listed(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder("bert"), tmp_path / "m")
    model = open_model(folder)
    seen: list[tuple[int, int]] = []

    class Bar:
        def __enter__(self) -> Any:
            return lambda nbytes, blocks: seen.append((nbytes, blocks))

        def __exit__(self, *_: object) -> None: ...

    begun: list[tuple[str, int, int]] = []

    def progress(what: str, nbytes: int, blocks: int) -> Any:
        begun.append((what, nbytes, blocks))
        return Bar()

    found = measure(model, model.attention, run=Run(progress=progress))
    assert list(found) == [site.name for site in model.attention]
    each = sum(model.reader.header[name].nbytes for name in model.attention[0].tensors)
    assert begun == [("measuring", 2 * each, 2)]
    assert seen == [(each, 1), (each, 1)]
    with decomposition_of(model, Run()) as decomposition:
        decomposition.decompose(model.attention[:1])
        assert list(decomposition.spectra) == [model.attention[0].name]
        assert np.allclose(
            decomposition.spectra[model.attention[0].name].seams["vo"], found[model.attention[0].name].seams["vo"]
        )
        first = decomposition.cut(model.attention[0], "compact")
        assert decomposition.cut(model.attention[0], "compact").keys() == first.keys()
    tensors = load_file(folder / "model.safetensors")
    for site in model.attention:
        tensors[f"{site.k}.weight"][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    broken = open_model(folder)
    with pytest.raises(PessaError, match="2 tensors of") as caught:
        measure(broken, broken.sites)
    assert all(f"{site.k}.weight: 1 NaN" in caught.value.message for site in model.attention)


def test_factors_are_kept_in_memory_only_when_asked(tiny_folder: TinyFolder) -> None:
    model = open_model(tiny_folder("bert"))
    site = model.attention[0]
    kept = replace(site, vo_ranks=(2, 3, 4, 5))
    results = []
    for reuse in (True, False):
        with decomposition_of(model, Run(), reuse=reuse) as decomposition:
            decomposition.decompose([site])
            results.append([decomposition.cut(each, "compact") for each in (site, kept)])
            assert (site.name in decomposition._factors) == reuse
    for name in results[0][1]:
        assert torch.equal(results[0][1][name], results[1][1][name])
    assert results[0][1][f"{site.v}.weight"].shape == (14, 32)


def test_vanilla_and_calibration_exclude_each_other_and_decomposed_models(
    tiny_folder: TinyFolder, dense: Path, tmp_path: Path
) -> None:
    model = open_model(tiny_folder("bert"))
    with pytest.raises(UsageError, match="--method vanilla uses the weights alone"):
        prune_model(model, tmp_path / "x", Rule(), method="vanilla", statistics=object())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="is already decomposed"):
        prune_model(open_model(dense), tmp_path / "x", Rule(), method="vanilla")
    written = prune_model(model, tmp_path / "x", Rule(rank=3), [model.attention[1]], method="vanilla")
    assert (written.method, written.rule, written.command) == ("vanilla", "rank 3", "prune")
    assert [site.name for site in written.sites] == [model.attention[1].name]
    assert written.source == model.reader.folder.name
    assert load_spectra(tmp_path / "x", model.attention) == {}
    planned = prune_model(model, tmp_path / "y", Rule(rank=3), run=Run(dry=True, shard_bytes=999))
    assert not (tmp_path / "y").exists()
    assert planned.shard_bytes == 999
    assert list(planned.spectra) == [site.name for site in model.attention]
