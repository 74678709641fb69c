"""The architecture table's rows of MLPs, tested on the headers and weights of a tiny model of every row."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import tiny_models
import torch
from harness import Tensors, edit_weights

from pessa_cli.blocks.compact_format import Ragged
from pessa_cli.blocks.discover import KNOWN, find_sites, specs_of
from pessa_cli.blocks.mlp_discover import find_mlps, mlp_specs_of
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_table import MLPS, TOWER_MLPS
from pessa_cli.blocks.table import ARCHITECTURES, TOWERS
from pessa_cli.checkpoint.reader import CheckpointReader, Header, TensorInfo
from pessa_cli.common.errors import PessaError

# What the table of tiny models has no variant of: the class of another row, and values of its config.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2 swiglu": ("dinov2", {"use_swiglu_ffn": True}),
    "t5 gated": ("t5", tiny_models.GATED),
    "mt5 plain": ("mt5", {"feed_forward_proj": "relu"}),
    "llama biased": ("llama", {"mlp_bias": True}),
    "opt without biases": ("opt", {"enable_bias": False}),
    "wav2vec2 mms": ("wav2vec2", {"do_stable_layer_norm": True, "adapter_attn_dim": 8}),
    "gpt2 n_inner": ("gpt2", {"n_inner": 40}),
}
# Of each way in which an MLP is built one; the others are for `make test`.
FEW = ("whisper", "bert", "llama", "phi3", "gpt2", "mt5", "moonshine", "albert", "mixtral", "qwen2_vl", *MORE)
BY_TIER = [name if name in FEW else pytest.param(name, marks=pytest.mark.slow) for name in (*tiny_models.TINIES, *MORE)]
WIDTH = 48
WIDTHS = {  # of models and kinds that have another width
    **{name: {"decoder.mlp": 128} for name in ("gpt2", "gptj", "gpt_bigcode", "gpt_bigcode mha", "bloom")},
    "gpt2 n_inner": {"decoder.mlp": 40},
    "dinov2": {"encoder.mlp": 64},
    "qwen2_vl": {"vision.mlp": 64},
}
# The tensors named like those of MLPs that no site owns, and why: they are copied.
BOTH = ("weight", "bias")
POOLING = {f"head.mlp.{name}.{part}" for name in ("fc1", "fc2") for part in BOTH}
MERGER = {f"visual.merger.mlp.{{i}}.{part}" for part in BOTH}
UNOWNED = {
    "mixtral": {  # routed experts
        "model.layers.{i}.block_sparse_moe.gate.weight",
        *(f"model.layers.{{i}}.block_sparse_moe.experts.{{i}}.{name}.weight" for name in ("w1", "w2", "w3")),
    },
    "gpt_oss": {  # routed experts
        *(f"model.layers.{{i}}.mlp.router.{part}" for part in BOTH),
        *(
            f"model.layers.{{i}}.mlp.experts.{name}{part}"
            for name in ("down_proj", "gate_up_proj")
            for part in ("", "_bias")
        ),
    },
    "wav2vec2 mms": {  # adapters of languages
        f"wav2vec2.encoder.layers.{{i}}.adapter_layer.{name}.{part}"
        for name in ("linear_1", "linear_2", "norm")
        for part in BOTH
    },
    "mllama": {  # factors of what whole MLPs add
        "vision_model.global_transformer.layers.{i}.gate_ffn",
        "language_model.model.layers.{i}.cross_attn_mlp_gate",
    },
    # Pooling heads and projectors, which are outside the layers.
    "siglip_vision_model": POOLING,
    "siglip": {f"vision_model.{name}" for name in POOLING},
    "gemma3": {f"vision_tower.{name}" for name in POOLING},
    "paligemma": {f"vision_tower.{name}" for name in POOLING},
    "llava": {f"multi_modal_projector.{name}.{part}" for name in ("linear_1", "linear_2") for part in BOTH},
    "qwen2_vl": MERGER,
    "qwen2_5_vl": MERGER,
    "qwen3_vl": {
        f"model.visual.{module}.{name}.{part}"
        for module in ("merger", "deepstack_merger_list.{i}")
        for name in ("linear_fc1", "linear_fc2")
        for part in BOTH
    },
}
LIKE_AN_MLP = re.compile(
    r"mlp|ffn|fc\d|feed_forward|intermediate|experts|block_sparse|Dense|linear_|adapter_layer|lin[12]"
)


@dataclass(frozen=True)
class Found:
    """A checkpoint in a folder, its header, and the MLPs that are found in it."""

    name: str
    folder: Path
    config: dict[str, Any]
    header: dict[str, TensorInfo]
    mlps: list[MlpSite]

    def find(self, header: Header, ragged: Mapping[str, Ragged] | None = None, **config: Any) -> list[MlpSite]:
        """Find the MLPs of this model in another header, or with other values in its config."""
        everything = self.config | config
        rows = specs_of(everything, header)
        return find_mlps(mlp_specs_of(everything), everything, header, ragged or {}, rows)

    def refused(self, header: Header, ragged: Mapping[str, Ragged] | None = None, **config: Any) -> str:
        """Return the text of the error for another header or config."""
        with pytest.raises(PessaError) as raised:
            self.find(header, ragged, **config)
        assert raised.value.hint
        return raised.value.message

    def cut(self, kept: int) -> tuple[dict[str, TensorInfo], dict[str, Ragged]]:
        """Return the header of a compact file in which every MLP has `kept` channels, and its ragged entries."""
        cut = [replace(site, kept=kept) for site in self.mlps]
        shapes = {name: shape for site in cut for name, shape in site.tensors.items()}
        header = {name: replace(info, shape=shapes.get(name, info.shape)) for name, info in self.header.items()}
        return header, {name: entry for site in cut for name, entry in site.ragged().items()}


def read(name: str, folder: Path) -> Found:
    reader = CheckpointReader(folder)
    rows = specs_of(reader.config, reader.header)
    mlps = find_mlps(mlp_specs_of(reader.config), reader.config, reader.header, {}, rows)
    return Found(name, folder, reader.config, dict(reader.header), mlps)


def build(name: str) -> Any:
    usual, config = MORE.get(name, (name, {}))
    return tiny_models.build(usual, **config)


@pytest.fixture(scope="module", params=BY_TIER)
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Found:
    name, folder = str(request.param), tmp_path_factory.mktemp("source") / "model"
    build(name).save_pretrained(folder)
    return read(name, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("source") / "model"
    build("llama").save_pretrained(folder)
    return read("llama", folder)


def test_every_architecture_and_tower_has_rows() -> None:
    assert MLPS.keys() == ARCHITECTURES.keys()
    assert TOWER_MLPS.keys() <= TOWERS.keys()
    for name, towers in TOWERS.items():
        own = TOWER_MLPS.get(name, {})
        assert own.keys() == {tower.kind for tower in towers if tower.rows} | (own.keys() & {"text"})
    assert MLPS.keys() | TOWER_MLPS.keys() <= {*KNOWN}
    stacks = {name: {row.stem for row in rows} for name, rows in ARCHITECTURES.items()}
    assert {name: {row.stem for row in rows} for name, rows in MLPS.items()} == stacks


def test_every_tensor_of_an_mlp_is_owned_once(found: Found) -> None:
    attention = find_sites(specs_of(found.config, found.header), found.config, found.header)
    owned = [tensor for site in found.mlps for tensor in site.tensors]
    assert len(owned) == len(set(owned))
    assert not {*owned} & {tensor for site in attention for tensor in site.tensors}
    others = {tensor for site in attention for tensor in site.tensors} | {*owned}
    copied = {
        re.sub(r"(?<=\.)\d+(?=\.)", "{i}", name)
        for name in found.header
        if name not in others and LIKE_AN_MLP.search(name) and not re.search("(?i)layer_?norm|ln_|mlp_norm", name)
    }
    assert copied == UNOWNED.get(found.name, set())
    layers = {(site.spec.kind.partition(".")[0], site.layer) for site in attention}
    if found.name not in ("mixtral", "gpt_oss"):
        assert {(site.spec.kind.partition(".")[0], site.layer) for site in found.mlps} == layers
    assert len({site.name for site in found.mlps}) == len(found.mlps)


def test_widths_and_shapes(found: Found) -> None:
    for site in found.mlps:
        assert site.width == site.kept == WIDTHS.get(found.name, {}).get(site.spec.kind, WIDTH)
        assert site.tensors == {name: found.header[name].shape for name in site.tensors}
        assert site.input_width == site.output_width in (32, 64)
        assert site.ragged() == {}
        assert len(site.biases) in (0, len(site.modules))


def test_a_missing_tensor_is_an_error(found: Found) -> None:
    for site in found.mlps[-1:]:
        for module in site.modules.values():
            lacking = {name: info for name, info in found.header.items() if name != f"{module}.weight"}
            assert f"{module}.weight: missing" in found.refused(lacking)
        lacking = {name: info for name, info in found.header.items() if name not in site.tensors}
        assert f"this layer has no {site.spec.kind}" in found.refused(lacking)
    lacking = {name: info for name, info in found.header.items() if not any(name in m.tensors for m in found.mlps)}
    if found.mlps:
        assert "no " in found.refused(lacking)


def test_a_foreign_tensor_is_an_error(found: Found) -> None:
    for site in found.mlps[:1]:
        layer = site.spec.layer.replace("{i}", str(site.layer))
        start = site.out[: site.out.index(layer)] + layer
        matrix, vector = TensorInfo("F32", (8, 8)), TensorInfo("F32", (8,))
        for name, info in ((f"{start}.other.weight", matrix), (f"{site.out}.scale", vector)):
            assert f"{name}: no row" in found.refused(found.header | {name: info})
        found.find(found.header | {f"{start}.scale": vector})  # as a norm beside the MLP would be


def test_a_wrong_shape_names_both_numbers(found: Found) -> None:
    for site in found.mlps[:1]:
        for module in site.modules.values():
            name = f"{module}.weight"
            info = found.header[name]
            for axis in (0, 1):
                shape = tuple(size + 8 * (index == axis) for index, size in enumerate(info.shape))
                text = found.refused(found.header | {name: replace(info, shape=shape)})
                assert any(str(number) in text for number in (shape, shape[axis])), text
                assert str(info.shape) in text or str(info.shape[axis]) in text, text
    if found.mlps:
        header, _ = found.cut(24)
        text = found.refused(header)  # narrower in all layers, but not in config.json
        assert "the file has 24 channels" in text
        assert f"config.json {found.mlps[0].width} (" in text


def test_a_compact_file_is_read(found: Found) -> None:
    header, ragged = found.cut(24)
    again = {name: Ragged.parse(name, str(entry)) for name, entry in ragged.items()}
    assert again == ragged
    cut = found.find(header, ragged)
    assert cut == [replace(site, kept=24) for site in found.mlps]
    for module in [module for site in found.mlps[:1] for module in site.modules.values()]:
        rest = {name: entry for name, entry in ragged.items() if name != module}
        assert "contradict each other" in found.refused(header, rest)
    for site in cut[:1]:
        for name in site.tensors:
            if name.removesuffix(".bias") != site.out:
                assert name in found.refused(header | {name: found.header[name]}, ragged)
        narrow = {**ragged, **replace(site, width=site.width - 8).ragged()}
        assert f"cut from {site.width - 8} channels, but config.json has {site.width}" in found.refused(header, narrow)
        none = {**ragged, **replace(site, kept=0).ragged()}
        assert "at least one" in found.refused(header, none)


def reordered(found: Found, writers: bool, reader: bool) -> Callable[[Path], None]:
    """Return a change of the file: weights that matter, and the channels of these matrices in reverse order."""

    def change(tensors: Tensors) -> None:
        generator = torch.Generator().manual_seed(3)
        for site in found.mlps:
            for name in site.tensors:
                module, _, part = name.rpartition(".")
                tensor = tensors[name].normal_(0, 0.4, generator=generator)
                if module == site.out and reader and part == "weight":
                    tensors[name] = tensor.flip(0 if site.spec.transposed else 1)
                elif module != site.out and writers:
                    axis = 1 if site.spec.transposed and part == "weight" else 0
                    tensors[name] = torch.cat([half.flip(axis) for half in tensor.chunk(site.spec.parts, axis)], axis)

    return edit_weights(change)


def test_channels_can_be_reordered(found: Found, tmp_path: Path) -> None:
    """The symmetry that every row claims: the same order in all matrices is the same model, in one side it is not."""
    said = {}
    for writers, reader in ((False, False), (True, True), (True, False)):
        folder = tmp_path / f"{writers} {reader}"
        shutil.copytree(found.folder, folder)
        reordered(found, writers, reader)(folder)
        said[writers, reader] = tiny_models.outputs(MORE.get(found.name, (found.name,))[0], tiny.load(folder))
    usual = said[False, False]
    off = {key: float((other - usual).norm() / usual.norm()) for key, other in said.items()}
    assert off[True, True] < 1e-5
    if found.mlps:
        assert off[True, False] > 1e-3


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("qwen2_5_vl", "visual.blocks.0.mlp.up_proj.bias", "visual.blocks.0.mlp.up_proj has no bias"),
        ("qwen2_5_vl", "visual.blocks.0.mlp.gate_proj.bias", "visual.blocks.0.mlp.gate_proj has no bias"),
        ("mixtral", "model.layers.1.block_sparse_moe.", "model.layers.1: this layer has no decoder.mlp"),
        ("llama", "model.layers.1.", "2 layers (num_hidden_layers), the file 1"),
    ],
)
def test_lacking_parts(name: str, change: str, says: str, tmp_path: Path) -> None:
    build(name).save_pretrained(tmp_path)
    whole = read(name, tmp_path)
    assert says in whole.refused({key: info for key, info in whole.header.items() if not key.startswith(change)})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"intermediate_size": 56}, "the file has 48 channels, but config.json 56 (intermediate_size)"),
        ({"intermediate_size": "wide"}, "intermediate_size is 'wide', not a number of channels from 1 to"),
        ({"intermediate_size": None}, "the file has 48 channels, but config.json 11008 (intermediate_size)"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
    ],
)
def test_another_config(config: dict[str, Any], says: str, llama: Found) -> None:
    assert says in llama.refused(llama.header, **config)


def test_a_ratio_in_the_config(tmp_path: Path) -> None:
    build("dinov2").save_pretrained(tmp_path)
    model = read("dinov2", tmp_path)
    assert "the file has 64 channels, but config.json 96 (mlp_ratio)" in model.refused(model.header, mlp_ratio=3)
    assert "mlp_ratio is -1, not a ratio" in model.refused(model.header, mlp_ratio=-1)
    silent = {key: value for key, value in model.config.items() if key != "mlp_ratio"}
    text = Found("dinov2", tmp_path, silent, model.header, []).refused(model.header)
    assert "config.json 128 (mlp_ratio)" in text  # the default of its class


def test_a_tensor_that_is_no_matrix_of_floats_is_an_error(llama: Found) -> None:
    name = llama.mlps[0].into[0] + ".weight"
    for info in (TensorInfo("I8", (48, 32)), TensorInfo("F32", (48, 32, 1)), TensorInfo("F32", (48,))):
        assert f"{name}: expected a matrix of floats" in llama.refused(llama.header | {name: info})


def test_a_file_that_claims_a_huge_layer_is_an_error(llama: Found) -> None:
    """A compact file of a few numbers must not take much memory."""
    header, _ = llama.cut(1)
    wide = [replace(site, width=99_999, input_width=10_000, output_width=10_000, kept=1) for site in llama.mlps]
    shapes = {name: shape for site in wide for name, shape in site.tensors.items()}
    ragged = {name: entry for site in wide for name, entry in site.ragged().items()}
    header = {name: replace(info, shape=shapes.get(name, info.shape)) for name, info in header.items()}
    assert "at full size the block would have" in llama.refused(header, ragged, intermediate_size=99_999)


def test_the_entries_of_a_fused_matrix_have_a_number_for_each_block(tmp_path: Path) -> None:
    build("phi3").save_pretrained(tmp_path)
    _, ragged = read("phi3", tmp_path).cut(24)
    layer = {name: str(entry) for name, entry in ragged.items() if ".0." in name}
    assert layer == {
        "model.layers.0.mlp.gate_up_proj": "channel rows 48: 24 24",
        "model.layers.0.mlp.down_proj": "channel columns 48: 24",
    }


def test_a_file_without_layers_is_an_error(llama: Found) -> None:
    assert "found no MLP" in llama.refused({"lm_head.weight": llama.header["lm_head.weight"]})


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_half_of_a_whisper_alone(stack: str, tmp_path: Path) -> None:
    """The names of the MLPs are the same in both halves; the rows of attention tell which half it is."""
    build("whisper").get_submodule(f"model.{stack}").save_pretrained(tmp_path)
    half = read("whisper", tmp_path)
    assert [site.name for site in half.mlps] == [f"{stack}.mlp.0", f"{stack}.mlp.1"]
