"""Compact models in transformers: stock classes, caches, generation, saving, dtypes and training."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from harness import TinyFolder
from tiny import close, load

from pessa_cli.ranks.rule import Rule
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_compact_model_equals_the_dense_one(pruned: Callable[[str, str], Path], name: str, attention: str) -> None:
    compact = load(pruned(name, "compact"), attn_implementation=attention)
    assert close(load(pruned(name, "dense"), attn_implementation=attention), compact)
    assert any(isinstance(module, RaggedOut) for module in compact.modules())
    assert compact.num_parameters() < load(pruned(name, "dense")).num_parameters()
    assert compact.num_parameters() == load(pruned(name, "compact")).num_parameters()


@pytest.mark.parametrize("name", ["whisper", "llama", "llama-biased"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"do_sample": True, "seed": 3},
    ],
    ids=["greedy", "beams", "no cache", "static cache", "sampling"],
)
def test_generation_equals_that_of_the_dense_model(
    pruned: Callable[[str, str], Path], name: str, options: dict[str, Any]
) -> None:
    options = dict(options)
    seed = options.pop("seed", 0)
    written = []
    for layout in ("dense", "compact"):
        model = load(pruned(name, layout))
        inputs = {k: v[:1] for k, v in tiny.inputs(model).items() if k != "decoder_input_ids"}
        torch.manual_seed(seed)
        written.append(model.generate(**inputs, max_new_tokens=12, **options).tolist())
    assert written[0] == written[1]
    assert len(set(written[0][0])) > 3  # not a single repeated token, which would prove little


@pytest.mark.parametrize("name", tiny.NAMES)
def test_save_pretrained_round_trips(pruned: Callable[[str, str], Path], name: str, tmp_path: Path) -> None:
    model = load(pruned(name, "compact"))
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for folder in ("single", "shards"):
        assert close(model, load(tmp_path / folder), 1e-7)
        reopened = open_model(tmp_path / folder)
        assert [s.vo_ranks for s in reopened.attention] == [
            s.vo_ranks for s in open_model(pruned(name, "compact")).attention
        ]
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(pruned: Callable[[str, str], Path], dtype: torch.dtype) -> None:
    source = pruned("bert", "compact")
    reference = load(source)
    loaded = load(source, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert close(reference, loaded, 5e-2)
    assert close(reference, load(source).to(dtype), 5e-2)
    assert close(reference, load(source).half().float(), 5e-2)


def test_base_and_headed_classes_find_their_modules_under_other_prefixes(
    pruned: Callable[[str, str], Path], tmp_path: Path
) -> None:
    source = pruned("bert", "compact")
    with torch.no_grad():
        full = load(source)
        inputs = tiny.inputs(full)
        expected = full.bert(**inputs).last_hidden_state
        base = transformers.BertModel.from_pretrained(source, add_pooling_layer=False).eval()
        assert torch.equal(base(**inputs).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        for kind in (transformers.BertModel, transformers.BertForSequenceClassification):
            again = kind.from_pretrained(tmp_path / "base").eval()
            body = getattr(again, "bert", again)
            assert torch.equal(body(**inputs).last_hidden_state, expected)
    assert len(open_model(tmp_path / "base").attention) == 2


def test_gradients_flow_and_a_step_trains(pruned: Callable[[str, str], Path]) -> None:
    model = load(pruned("llama", "compact")).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    inputs = tiny.inputs(model)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_deepcopy_and_pickle(pruned: Callable[[str, str], Path]) -> None:
    model = load(pruned("bert", "compact"))
    assert close(model, copy.deepcopy(model), 1e-7)
    assert close(model, pickle.loads(pickle.dumps(model)), 1e-7)


def test_ragged_layers_report_the_full_width(pruned: Callable[[str, str], Path]) -> None:
    """PEFT takes the sizes of its adapters from in_features and out_features."""
    compact, dense = load(pruned("whisper", "compact")), load(pruned("whisper", "dense"))
    seen = 0
    for name, module in compact.named_modules():
        if isinstance(module, (RaggedIn, RaggedOut)):
            original = dense.get_submodule(name)
            assert (module.in_features, module.out_features) == (original.in_features, original.out_features)
            assert module.weight.numel() < original.weight.numel()
            seen += 1
    assert seen == 24


@pytest.mark.parametrize("name", ["whisper", "bert"])
def test_heads_of_rank_zero_and_whole_blocks_of_rank_zero(name: str, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    model = load(tiny_folder(name))
    site = open_model(tiny_folder(name)).attention[0]
    with torch.no_grad():  # the first block has no output, and its scores no input
        for side in "vq":
            for parameter in model.get_submodule(site.module(side)).parameters():
                parameter.zero_()
    model.save_pretrained(tmp_path / "source")
    written = prune_model(open_model(tmp_path / "source"), tmp_path / "out", Rule())
    assert written.ranks.ranks[site.name]["vo"] == written.ranks.ranks[site.name]["qk"] == (0, 0, 0, 0)
    assert close(model, load(tmp_path / "out"))


@pytest.mark.slow
def test_the_import_works_before_and_after_transformers() -> None:
    for first, second in (("pessa_cli", "transformers.quantizers.auto"), ("transformers.quantizers.auto", "pessa_cli")):
        code = (
            f"import {first}\nimport {second}\nimport pessa_cli\n"
            "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known\nassert 'pessa' in known"
        )
        subprocess.run([sys.executable, "-c", code], check=True)


def test_a_config_that_no_longer_fits_is_refused(pruned: Callable[[str, str], Path], tmp_path: Path) -> None:
    import json
    import shutil

    shutil.copytree(pruned("bert", "compact"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    modules = config["quantization_config"]["modules"]
    name = next(iter(modules))
    modules[name] = modules[name].replace("rows 8:", "rows 16:")
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        pessa_error(), match=r"query is 32 x 32 in the model, but its entry in config\.json is for 64 rows"
    ):
        load(tmp_path / "out")


def pessa_error() -> type[Exception]:
    from pessa_cli import PessaError

    return PessaError
