"""What `verify` notices at level weights, and what it lets pass: checkpoints that were changed in one place.

`scripts/verify_mutants.py` makes all the changes; here are some of them for each model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import altered
import pytest

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
