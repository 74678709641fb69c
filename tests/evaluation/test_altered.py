"""What `verify` notices at level weights, and what it lets pass: checkpoints that were changed in one place.

`scripts/verify_mutants.py` makes all the changes; here are some of them for each model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import altered
import numpy as np
import pytest
from safetensors.numpy import save_file

SHARE = 12  # every so-manieth change; the order is that of the files, tensors and keys


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, altered.Pair]:
    return altered.pairs(tmp_path_factory.mktemp("altered"))


NAMES = (
    *("bert", "llama", "whisper", "gpt2", "t5"),
    *("bert, factored", "t5, factored", "whisper, factored", "llama, compact"),
)


def test_all_pairs_are_named(pairs: dict[str, altered.Pair]) -> None:
    assert set(pairs) == {*NAMES, "whisper, compact"}  # which is slow and only in the script


@pytest.mark.parametrize("name", NAMES)
def test_changes_are_noticed(name: str, pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    changes = list(altered.changes(pairs[name].candidate))
    assert len(changes) > 100
    missed = [change.name for change in changes[::SHARE] if not altered.said(pairs[name], change, tmp_path)]
    assert missed == []


@pytest.mark.parametrize("name", NAMES)
def test_the_same_model_written_otherwise_is_the_same(
    name: str, pairs: dict[str, altered.Pair], tmp_path: Path
) -> None:
    changes = list(altered.harmless(pairs[name].candidate))
    said = {change.name: altered.said(pairs[name], change, tmp_path) for change in changes}
    assert {name: text for name, text in said.items() if text} == {}
    assert len(said) >= 11


def test_a_value_is_named_with_file_key_and_both_values(pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    change = next(c for c in altered.changes(pairs["llama"].candidate) if c.name.endswith("rope_theta"))
    said = altered.said(pairs["llama"], change, tmp_path)
    assert said == "settings: config.json rope_parameters.rope_theta: 10000.0 became 15000.25"


def changed(pair: altered.Pair, place: Path, change: Callable[[Path], None]) -> str:
    """What `verify` says after a change of a copy of the reference."""
    return altered.said(altered.Pair(pair.reference, pair.reference), altered.Change("", change), place)


def test_not_a_number_in_a_config_is_itself(pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(pairs["llama"].reference, reference)
    config = json.loads((reference / "config.json").read_text()) | {"threshold": float("nan")}
    (reference / "config.json").write_text(json.dumps(config))
    pair = altered.Pair(reference, reference)
    # With another indentation the files differ, and are read.
    assert not changed(pair, tmp_path, lambda new: altered.write(new / "config.json", config, 7))
    assert "threshold" in changed(
        pair, tmp_path, lambda new: altered.write(new / "config.json", {**config, "threshold": 1.5})
    )


@pytest.mark.parametrize(
    "file",
    [
        *("Dense/model.safetensors", "10_Dense/model.safetensors", "Dense/pytorch_model.bin", "colbert_linear.pt"),
        *("sparse_linear.pt", "adapter.fra.safetensors", "language_model/5gram.bin", "tekken.json", "dict.txt"),
        *("alphabet.json", "bpe.codes", "entity.tsv", "mel_filters.npz", "special_tokens.txt", "code/modeling_own.py"),
        *("tokenizer/tokenizer.json", "preprocessor/config.json", "speaker_embeddings/one.npy"),
    ],
)
def test_what_an_output_copies_is_compared(file: str, pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(pairs["llama"].reference, reference)
    altered.write(reference / "modules.json", [{"path": ""}, {"path": "Dense"}, {"path": "10_Dense"}])
    (reference / file).parent.mkdir(exist_ok=True)
    (reference / file).write_text('["one"]')
    pair = altered.Pair(reference, reference)
    assert file in changed(pair, tmp_path, lambda new: altered.append(new / file, "x"))
    assert file in changed(pair, tmp_path, lambda new: (new / file).unlink())
    assert not changed(pair, tmp_path, lambda _: None)


@pytest.mark.parametrize("file", ["LICENSE", "docs/card.md", "picture.png", "model.gguf"])
def test_what_is_no_part_of_the_model_may_differ(file: str, pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(pairs["llama"].reference, reference)
    (reference / file).parent.mkdir(exist_ok=True)
    (reference / file).write_text("one")
    pair = altered.Pair(reference, reference)
    assert not changed(pair, tmp_path, lambda new: altered.append(new / file, "more"))
    assert not changed(pair, tmp_path, lambda new: (new / file).unlink())


@pytest.mark.parametrize("base", ["the folder itself", "another model"])
def test_an_adapter_of_the_model_beside_it(base: str, pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    """transformers adds it to the weights when PEFT is installed; one of another model is listed."""
    reference = pairs["llama"].reference

    def adapt(new: Path) -> None:
        own = str(new) if base == "the folder itself" else "owner/another"
        altered.write(new / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": own})
        save_file({"base_model.model.lora_A.weight": np.zeros((1, 1))}, new / "adapter_model.safetensors")

    found = changed(altered.Pair(reference, reference), tmp_path, adapt)
    assert ("adapter_model.safetensors" in found) == (base == "the folder itself")


def test_added_tokens_count_without_a_tokenizer_file(pairs: dict[str, altered.Pair], tmp_path: Path) -> None:
    reference = tmp_path / "reference"
    shutil.copytree(pairs["bert"].reference, reference)
    config = json.loads((reference / "tokenizer_config.json").read_text())
    tokens = {"105": {"content": "<x>"}}

    def altering(new: Path) -> None:
        altered.write(new / "tokenizer_config.json", {**config, "added_tokens_decoder": {"105": {"content": "w7"}}})

    altered.write(reference / "tokenizer_config.json", {**config, "added_tokens_decoder": tokens})
    pair = altered.Pair(reference, reference)
    assert not changed(pair, tmp_path, altering)
    (reference / "tokenizer.json").unlink()
    assert "added_tokens_decoder" in changed(pair, tmp_path, altering)
