"""Calibration in sequence: layer by layer, each block gets what it would get in the whole model with the cut blocks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
from calibrating import batches
from calibrating import data as data
from mlps import saved
from torch import nn

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.collect import calibrate
from pessa_cli.calibration.listeners import collect_statistics
from pessa_cli.calibration.sequential import collect_in_sequence
from pessa_cli.calibration.trial_cuts import set_block
from pessa_cli.common.progress import quietly
from pessa_cli.models.data import read_data
from pessa_cli.models.hooks import block_modules, output_of
from pessa_cli.models.layers import LayerCall, chained, layer_by_layer, stacks_of
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import CollectedStatistics
from pessa_cli.statistics.sums import BlockStatistics, input_moment
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposition import decomposition_of, measure
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.run import Run

CHAINED = {"llama": True, "bert": True, "whisper": True, "t5": True, "gpt2": True, "gemma2": True, "albert": False}


def prepared(name: str, folder: Any) -> tuple[Model, Any, list[Callable[[], object]], list[Site]]:
    """Return a tiny model, the same in transformers, its runs on a few inputs, and the blocks that these reach."""
    built = tiny_models.build(name)
    built.save_pretrained(folder)
    loaded = type(built).from_pretrained(folder, dtype=torch.float32).eval()
    loaded.set_attn_implementation("eager")
    inputs = batches(loaded, 3)
    if name == "t5":
        inputs = [{**given, "decoder_input_ids": given["input_ids"]} for given in inputs]
    model = open_model(folder)
    return model, loaded, [partial(_run, loaded, given) for given in inputs], [*model.sites]


def _run(loaded: Any, given: dict[str, torch.Tensor]) -> None:
    with torch.inference_mode():
        output_of(loaded, given)


def order(site: Site) -> tuple[bool, int, int]:
    return not site.kind.startswith("encoder"), site.layer, ["self", "cross", "mlp"].index(site.kind.split(".")[-1])


def statistics(
    sites: list[Site], loaded: Any, runs: list[Callable[[], object]], blocks: BlockReader
) -> dict[str, BlockStatistics]:
    modules = block_modules(sites, loaded)
    with torch.inference_mode():
        return collect_statistics(sites, modules, [(run, 0) for run in runs], blocks, quietly("", 0, 0))[0]


@pytest.mark.parametrize("name", CHAINED)
def test_each_block_is_calibrated_behind_the_cut_ones(name: str, tmp_path: Any) -> None:
    model, loaded, runs, sites = prepared(name, tmp_path / "model")
    blocks = BlockReader(model.reader, keep=True)
    plain = statistics(sites, loaded, runs, blocks)
    spectra = measure(model, sites, statistics=CollectedStatistics(plain, ()))
    plan = ranks_for(sites, spectra, Rule(ratio=0.5, mlp_ratio=0.5), model.size)
    with decomposition_of(model, Run(), blocks) as found:
        ours = collect_in_sequence(model, loaded, sites, runs, plan, plain, blocks, found, Run())
    # The same, with the whole model run again for each block.
    _, loaded, runs, _ = prepared(name, tmp_path / "again")
    modules, expected = block_modules(sites, loaded), dict(plain)
    with decomposition_of(model, Run(), blocks) as found:
        for site in sorted(sites, key=order):
            own = statistics([site], loaded, runs, blocks)[site.name]
            expected[site.name] = own.with_trials(plain[site.name].trial_sums)
            found.decompose([site], CollectedStatistics(expected, ()))
            set_block(site, modules[site.name], found.cut(plan.kept(site), "dense"))
    differences = []
    for site in sites:
        each = [vars(one[site.name]) for one in (ours, expected, plain)]
        for key in ("moment", "mixtures", "queries"):
            if key in each[0]:
                assert torch.allclose(
                    each[0][key], each[1][key], rtol=1e-4, atol=1e-5 * float(each[1][key].abs().max())
                )
                differences.append(float((each[0][key] - each[2][key]).norm() / each[2][key].norm()))
    assert max(differences) > 1e-3  # the cut blocks before a block matter


@pytest.mark.parametrize(("name", "expected"), CHAINED.items())
def test_layers_that_depend_on_their_hidden_states_alone(name: str, expected: bool, tmp_path: Any) -> None:
    model, loaded, runs, sites = prepared(name, tmp_path / "model")
    with torch.inference_mode():
        for layers in stacks_of(loaded, sites, model.sites):
            assert chained([layer.module for layer in layers], runs[0]) == expected


def test_calibration_starts_from_the_blocks_as_they_were(data: list[Path], tmp_path: Path) -> None:
    """Trials of plans leave nothing behind: the first block is calibrated as it would be without a budget."""
    model = open_model(saved("llama", tmp_path / "model"))
    items, budget = read_data(data), Rule(target_layers=0.5)
    with calibrate(model, model.sites, items, budget, Run(), budget) as found:
        behind = {site.name: found.statistics.of(site) for site in model.sites}
        assert found.comparison is not None
    with calibrate(model, model.sites, items, None, Run()) as found:
        plain = {site.name: found.statistics.of(site) for site in model.sites}
    first, *others = (input_moment(behind[site.name]) / input_moment(plain[site.name]).norm() for site in model.sites)
    expected = [input_moment(plain[site.name]) / input_moment(plain[site.name]).norm() for site in model.sites]
    assert torch.allclose(first, expected[0], atol=1e-6)
    changes = [float((one - other).norm()) for one, other in zip(others, expected[1:], strict=True)]
    assert max(changes) > 1e-2


class Skipping(nn.Module):
    """Three layers, of which the second also reads the output of the first one, or the input, beside its own."""

    def __init__(self, skips: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Added() for _ in range(3))
        self.skips = skips

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](hidden)
        last: torch.Tensor = self.layers[2](self.layers[1](first, other=first if self.skips else hidden))
        return last


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        found: torch.Tensor = self.own(hidden)
        return found if other is None else found + other


def test_the_hidden_states_of_one_layer_are_kept(tmp_path: Path) -> None:
    """Those of all layers would take as much memory for each input as the layers have outputs."""
    model, loaded, runs, sites = prepared("llama", tmp_path / "model")
    (layers,) = stacks_of(loaded, sites, model.sites)
    with torch.inference_mode():
        for _, calls in layer_by_layer(layers, runs):
            held = sum(type(each) is LayerCall and each.hidden.numel() > 0 for each in gc.get_objects())
            assert held == len(runs) == len(calls)


@pytest.mark.parametrize("skips", [False, True])
def test_layers_that_read_earlier_ones_in_another_way(skips: bool) -> None:
    model = Skipping(skips)
    with torch.inference_mode():
        assert chained(list(model.layers), partial(model, torch.ones(1, 5, 4))) != skips
