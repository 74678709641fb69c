"""What the command line says about which kinds of blocks it cuts: attention, MLPs, or both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from harness import Pessa, TinyFolder
from mlps import saved


@pytest.mark.parametrize(
    ("options", "headings"),
    [
        (("--rank", 3), ("ranks of Q-K", "ranks of V-O")),
        (("--mlp-ratio", 0.5), ("channels",)),
        (("--target-layers", 0.7), ("ranks of Q-K", "ranks of V-O", "channels")),
    ],
    ids=["attention", "MLPs", "both"],
)
def test_a_dry_run_has_columns_for_what_is_cut(
    options: tuple[object, ...], headings: tuple[str, ...], tiny_folder: TinyFolder, pessa: Pessa, tmp_path: Path
) -> None:
    result = pessa("prune", tiny_folder("whisper"), *options, "-o", tmp_path / "out", "--dry-run")
    assert result.code == 0, result
    lines = result.out.splitlines()
    (at,) = (number for number, line in enumerate(lines) if line.startswith("block "))
    assert [cell.strip() for cell in lines[at].split("  ") if cell.strip()] == ["block", *headings]
    named = ("Q-K", "of this attention", "of these MLPs")
    attention, mlps = "ranks of Q-K" in headings, "channels" in headings
    assert [each in result.out for each in named] == [attention, attention, mlps]


@pytest.mark.parametrize("sites", ["attention", "mlp", "all"])
def test_the_curve_is_that_of_the_chosen_blocks(
    sites: str, tiny_folder: TinyFolder, pessa: Pessa, tmp_path: Path
) -> None:
    folder = tiny_folder("whisper")
    found = json.loads(pessa("inspect", folder, "--curve", "--sites", sites, "--json").out)
    totals, points = found["totals"], found["curve"]
    assert points[0]["chosen"] == totals["attention_parameters"] + totals["mlp_parameters"]
    plot = ("--plot", tmp_path / "curve.svg") if sites == "mlp" else ()
    shown = pessa("inspect", folder, "--curve", "--sites", sites, *plot)
    assert shown.code == 0, shown
    assert "attention" not in shown.out or sites != "mlp"
    assert "chosen blocks  parameters" in shown.out


def test_inspect_names_routed_experts(pessa: Pessa, tmp_path: Path, tiny_folder: TinyFolder) -> None:
    assert "routed experts, which are copied" in pessa("inspect", saved("mixtral", tmp_path / "mixtral")).out
    assert "routed" not in pessa("inspect", tiny_folder("llama")).out
