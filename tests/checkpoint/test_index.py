"""Indexes that disagree with their shards: pessa reads what transformers reads, and warns."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from harness import INDEX, Pessa, TinyFolder, copy_of, edit_json, edit_weights, is_refusal
from safetensors.torch import load_file

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaWarning

UP = "model.layers.0.mlp.up_proj.weight"
EMBEDDINGS = "model.embed_tokens.weight"
Index = dict[str, Any]


@pytest.fixture
def sharded(tiny_folder: TinyFolder, place: Path) -> Path:
    return copy_of(tiny_folder("llama", max_shard_size="20kB"), place / "sharded")


@pytest.fixture
def warned() -> Iterator[list[warnings.WarningMessage]]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", PessaWarning)
        yield found


def tied(index: Index) -> None:
    index["weight_map"]["model.embed_tokens.copy.weight"] = index["weight_map"][EMBEDDINGS]


def forgets(index: Index) -> None:
    del index["weight_map"][UP]


def another(index: Index) -> None:
    weight_map = index["weight_map"]
    weight_map[UP] = next(file for file in weight_map.values() if file != weight_map[UP])


CASES: dict[str, tuple[Callable[[Index], object], str, str]] = {
    "lists a tied tensor": (tied, "in no shard", "model.embed_tokens.copy.weight"),
    "forgets a tensor": (forgets, "does not list", UP),
    "says another shard": (another, "does not list", UP),
}


@pytest.mark.parametrize("case", CASES)
def test_an_index_is_read_as_transformers_reads_it(
    case: str, sharded: Path, place: Path, pessa: Pessa, warned: list[warnings.WarningMessage]
) -> None:
    original = tiny.load(sharded)
    change, says, name = CASES[case]
    edit_json(change, INDEX)(sharded)
    assert tiny.close(tiny.load(sharded), original, 1e-7)  # transformers
    reader = CheckpointReader(sharded)
    stored = {file: load_file(sharded / file) for file in reader.files}
    assert {name: file for file, tensors in stored.items() for name in tensors} == {
        name: reader.file_of(name) for name in reader.header
    }
    assert all(torch.equal(reader.get(name), stored[reader.file_of(name)][name]) for name in reader.header)
    assert [str(each.message) for each in warned if says in str(each.message) and name in str(each.message)]
    result = pessa("prune", sharded, "-o", place / "out", "--rank", "8", "--max-shard-size", "20kB")
    assert result.code == 0, result
    assert result.err.count("warning: ") == 1
    assert name in result.err
    assert tiny.close(tiny.load(place / "out"), original, 1e-4)


def test_an_index_without_metadata(sharded: Path, place: Path, pessa: Pessa) -> None:
    """Some versions of transformers do not load such a folder; outputs have metadata."""
    original = tiny.load(sharded)
    edit_json(lambda index: index.pop("metadata"), INDEX)(sharded)
    result = pessa("prune", sharded, "-o", place / "out", "--rank", "8", "--max-shard-size", "20kB")
    assert result.code == 0, result
    assert "warning: " in result.err
    assert "no `metadata`" in result.err
    assert "metadata" in json.loads((place / "out" / INDEX).read_text())
    assert tiny.close(tiny.load(place / "out"), original, 1e-4)
    check = ("verify", sharded, place / "out", "--tolerance", "1", "--min-agreement", "0")
    refused = pessa(*check)
    assert refused.code == 1
    assert f'hint: add "metadata": {{}} to {sharded / INDEX}' in refused.err
    edit_json(lambda index: index.update(metadata={}), INDEX)(sharded)
    assert pessa(*check).code == 0


def test_a_correct_index_gives_no_warning(sharded: Path, warned: list[warnings.WarningMessage]) -> None:
    CheckpointReader(sharded)
    assert [each for each in warned if issubclass(each.category, PessaWarning)] == []


def test_a_tensor_of_a_layer_that_is_in_no_shard_is_missing(sharded: Path, place: Path, pessa: Pessa) -> None:
    """Transformers would initialise it with random numbers."""
    file = CheckpointReader(sharded).file_of(UP)
    edit_weights(lambda tensors: tensors.pop(UP), file)(sharded)
    is_refusal(pessa("prune", sharded, "-o", place / "out"), str(sharded), UP, file)


def test_shards_of_another_download_are_left_out(sharded: Path, place: Path, pessa: Pessa) -> None:
    original = tiny.load(sharded)
    first = sorted(sharded.glob("model-*"))[0]
    stray = sharded / "model-00001-of-00099.safetensors"
    shutil.copy(first, stray)
    edit_weights(lambda tensors: [tensor.zero_() for tensor in tensors.values()], stray.name)(sharded)
    assert tiny.close(tiny.load(sharded), original, 1e-7)
    result = pessa("prune", sharded, "-o", place / "out", "--rank", "8")
    assert result.code == 0, result
    assert f"{stray.name}: another copy of the weights" in result.err
    assert tiny.close(tiny.load(place / "out"), original, 1e-4)


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_tensor_that_is_stored_twice(equal: bool, tiny_folder: TinyFolder, place: Path, pessa: Pessa) -> None:
    """Both are kept byte for byte, so that transformers makes of the output what it makes of the original."""
    model = copy_of(tiny_folder("llama"), place / "model")
    edit_json(lambda config: config.update(tie_word_embeddings=True))(model)
    edit_weights(lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDINGS] * (1 if equal else -1)}))(model)
    assert pessa("prune", model, "-o", place / "out", "--rank", "8").code == 0
    before, after = (load_file(folder / "model.safetensors") for folder in (model, place / "out"))
    for name in ("lm_head.weight", EMBEDDINGS):
        assert torch.equal(before[name], after[name])
    assert torch.equal(after["lm_head.weight"], after[EMBEDDINGS]) == equal
    assert tiny.close(tiny.load(place / "out"), tiny.load(model), 1e-4)
