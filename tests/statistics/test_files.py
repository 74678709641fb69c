"""Statistics files: what is written is read and added up, and anything else is refused with its cause."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from attention import GROUPED, weights_of
from safetensors.torch import load_file, save_file

from pessa_cli.common.errors import PessaError
from pessa_cli.statistics.file import (
    FORMAT,
    CollectedStatistics,
    SavedStatistics,
    data_sha256,
    files_of,
    fingerprint,
    save_statistics,
    shortages,
)
from pessa_cli.statistics.sums import AttentionStatistics, shapes_of

NAME = GROUPED.name


def block(seed: int = 0, **more: Any) -> AttentionStatistics:
    generator = torch.Generator().manual_seed(seed)
    found = {
        name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes_of(GROUPED).items()
    }
    return AttentionStatistics(**(found | more))


def saved(path: Path, seed: int = 0, data: tuple[str, ...] = ("b", "a"), weights: str = "w") -> Path:
    save_statistics(path, {NAME: block(seed)}, {NAME: weights}, data)
    return path


def equal(a: AttentionStatistics, b: AttentionStatistics) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in AttentionStatistics.names())


def edited(path: Path, tensors: dict[str, Any] | None = None, **about: str | None) -> Path:
    """Rewrite a file with other tensors or other metadata."""
    known = {"format": FORMAT, "weights": json.dumps({NAME: "w"}), "data": '["a"]'} | about
    content = load_file(path) | (tensors or {})
    save_file(
        {name: tensor for name, tensor in content.items() if tensor is not None},
        path,
        {name: value for name, value in known.items() if value is not None},
    )
    return path


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "s")
    assert [file.name for file in tmp_path.iterdir()] == ["s"]
    found = SavedStatistics(path)
    assert found.data == ["a", "b"]
    assert equal(found.of(GROUPED), block())
    assert equal(found.of(GROUPED, lambda: "w"), block())
    assert load_file(path).keys() == {f"{NAME}.{name}" for name in AttentionStatistics.names()}
    transposed = replace(block(), queries=block().queries.mT)  # not contiguous
    save_statistics(tmp_path / "t", {NAME: transposed}, {NAME: "w"}, [])
    assert equal(SavedStatistics(tmp_path / "t").of(GROUPED), transposed)


def test_several_files_are_added_up(tmp_path: Path) -> None:
    paths = [saved(tmp_path / str(seed), seed, (f"d{seed}",)) for seed in range(3)]
    found = SavedStatistics(*paths)
    assert found.data == ["d0", "d1", "d2"]
    assert equal(found.of(GROUPED, lambda: "w"), block(0) + block(1) + block(2))
    again = saved(tmp_path / "again", 4, ("x", "d1"))
    with pytest.raises(PessaError, match="in common") as caught:
        SavedStatistics(*paths, again)
    assert all(str(path) in caught.value.message for path in (*paths, again))


def test_statistics_behind_pruned_blocks_are_not_added_to_others(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("whole", "pruned", "more")]
    for path, rule in zip(paths, (None, "ratio 0.5", "ratio 0.5"), strict=True):
        save_statistics(path, {NAME: block()}, {NAME: "w"}, [path.name], rule)
    assert SavedStatistics(paths[0]).sequential is None
    assert SavedStatistics(*paths[1:]).sequential == "ratio 0.5"
    with pytest.raises(PessaError, match=r"behind blocks that were not pruned and pruned by ratio 0\.5, and so"):
        SavedStatistics(*paths[:2])


def test_the_files_of_identities() -> None:
    assert files_of(["a:b:c", "a", "d:e"]) == {"a", "d"}


def test_statistics_of_other_weights_or_blocks_are_refused(tmp_path: Path) -> None:
    found = SavedStatistics(saved(tmp_path / "s"))
    with pytest.raises(PessaError, match=f"{tmp_path / 's'}: the statistics of {NAME} are of other weights"):
        found.of(GROUPED, lambda: "v")
    with pytest.raises(PessaError, match=f"has no statistics of {GROUPED.spec.kind}.1"):
        found.of(replace(GROUPED, layer=1))
    with pytest.raises(PessaError, match="other weights"):
        SavedStatistics(edited(saved(tmp_path / "t"), weights="{}")).of(GROUPED, lambda: "w")
    edited(tmp_path / "t", {f"{NAME}.harm": None})
    with pytest.raises(PessaError, match="has no statistics"):
        SavedStatistics(tmp_path / "t").of(GROUPED)


@pytest.mark.parametrize("name", AttentionStatistics.names())
@pytest.mark.parametrize("fault", ["dtype", "shape", "nan"])
def test_tensors_that_do_not_fit_the_block_are_refused(name: str, fault: str, tmp_path: Path) -> None:
    tensor = getattr(block(), name).clone()
    if fault == "dtype":
        tensor = tensor.float()
    elif fault == "shape":
        tensor = torch.zeros(*tensor.shape, 1, dtype=torch.float64)
    elif tensor.numel():
        tensor.view(-1)[-1] = torch.nan
    else:
        return
    path = edited(saved(tmp_path / "s"), {f"{NAME}.{name}": tensor})
    with pytest.raises(PessaError, match="do not fit its 4 heads of 3 dimensions"):
        SavedStatistics(path).of(GROUPED)


@pytest.mark.parametrize(
    ("about", "reason"),
    [
        ({"format": "other"}, "its format is 'other', not pessa-statistics-2"),
        ({"format": None}, "its format is None, not pessa-statistics-2"),
        ({"weights": "["}, "Expecting value"),
        ({"weights": "[]"}, "its metadata is damaged"),
        ({"data": "{}"}, "its metadata is damaged"),
        ({"data": None}, "'data'"),
        ({"weights": None}, "'weights'"),
    ],
)
def test_other_files_are_refused_with_the_reason(about: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = edited(saved(tmp_path / "s"), **about)
    with pytest.raises(PessaError) as caught:
        SavedStatistics(path)
    assert caught.value.message.startswith(f"{path} is not a statistics file: {reason}")


def test_files_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(PessaError, match=r"is not a statistics file: .*No such file"):
        SavedStatistics(tmp_path / "none")
    (tmp_path / "text").write_text("text")
    with pytest.raises(PessaError, match="is not a statistics file"):
        SavedStatistics(tmp_path / "text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(PessaError, match=r"cannot write .*folder: not a regular file"):
        saved(tmp_path / "folder")
    with pytest.raises(PessaError, match="cannot write"):
        saved(tmp_path / "no" / "s")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["folder", "text"]  # nothing half-written is left


def test_the_fingerprint_is_of_names_dtypes_shapes_and_bytes() -> None:
    site = replace(GROUPED, biases=frozenset("q"))
    weights = weights_of(site)
    digest = hashlib.sha256()
    for name, tensor in (("q", weights.q), ("k", weights.k), ("v", weights.v), ("o", weights.o)):
        digest.update(f"{name} torch.float64 {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    assert weights.q_bias is not None
    digest.update(b"q_bias torch.float64 (2, 2, 3)" + weights.q_bias.numpy().tobytes())
    assert fingerprint(weights) == digest.hexdigest()
    strided = replace(weights, k=weights.k.mT.contiguous().mT)  # the same numbers in another order in memory
    assert fingerprint(strided) == fingerprint(weights)
    for other in (
        replace(weights, k=weights.v, v=weights.k),
        replace(weights, k=weights.k.reshape(2, 6, 3)),
        replace(weights, k=-weights.k),
        replace(weights, q_bias=None),
    ):
        assert fingerprint(other) != fingerprint(weights)
    assert fingerprint(weights_of(site, dtype=torch.bfloat16)) != fingerprint(weights_of(site, dtype=torch.float16))


def test_the_digest_of_the_data() -> None:
    collected = CollectedStatistics({NAME: block()}, ["aa", "bb"])
    assert data_sha256(collected) == hashlib.sha256(b"aabb").hexdigest()
    assert collected.of(GROUPED) is collected.blocks[NAME]


def test_blocks_with_too_little_data_are_listed() -> None:
    values = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def short(frames: float, rows: int, wide: int = 12, output: float = 1.0) -> list[str]:
        used = 0.1 * values[:rows] * (torch.arange(12) < wide)
        found = block(
            frames=torch.tensor(frames, dtype=torch.float64),
            mixtures=used.mT @ used,
            output=torch.tensor(output, dtype=torch.float64),
        )
        return shortages(CollectedStatistics({NAME: found}, []), [GROUPED])

    assert short(12, 12) == []
    assert short(11, 12) == [f"{NAME}: 11 independent frames for 12 dimensions"]
    assert short(5000, 7) == [f"{NAME}: 7 independent frames for 12 dimensions"]
    assert short(7, 7, wide=7) == []  # dimensions without any input need none
    assert short(12, 12, output=0.0) == [f"{NAME}: no trial cuts, because the model did not fit into memory"]
    assert short(11, 12, output=0.0) == [f"{NAME}: 11 independent frames for 12 dimensions"]
