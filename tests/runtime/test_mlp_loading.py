"""Models with cut MLPs in the programs that run them: transformers, openai-whisper, ONNX Runtime, and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import whisper
from harness import copy_of, edit_json, is_refusal
from mlps import mlps_of, strong
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, WhisperConfig, WhisperForConditionalGeneration
from whisper.model import Whisper

import pessa_cli
from pessa_cli.blocks.site import select
from pessa_cli.common.errors import PessaError
from pessa_cli.exports.onnx import export_onnx
from pessa_cli.exports.openai import export_openai
from pessa_cli.models.load import load
from pessa_cli.ranks.rule import Rule
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.tuning.tuner_pessa import PessaTunerConfig

WIDTH, CHANNELS = 64, 96


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Whisper with openai-whisper's vocabulary, whose MLPs do not have the 4 channels per input of OpenAI's."""
    return _shaped(tmp_path_factory.mktemp("shaped") / "model", 4 * WIDTH)


def _shaped(folder: Path, channels: int) -> Path:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 51865, "num_mel_bins": 80, "d_model": WIDTH}
    sizes |= {"max_source_positions": 50, "max_target_positions": 20}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": channels}
    WhisperForConditionalGeneration(WhisperConfig(**sizes)).save_pretrained(folder)
    return strong(folder)


@pytest.fixture(scope="module")
def compact(shaped: Path) -> Path:
    """The model with all MLPs cut, and attention as it was."""
    out, model = shaped.parent / "compact", open_model(shaped)
    prune_model(model, out, Rule(mlp_ratio=0.6), [*mlps_of(model)])
    return out


@pytest.fixture(scope="module")
def mel() -> torch.Tensor:
    return torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, 50000, (2, 9), generator=torch.Generator().manual_seed(2))


def logits(folder: Path, mel: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return what transformers computes."""
    with torch.no_grad():
        found: torch.Tensor = tiny.load(folder)(input_features=mel, decoder_input_ids=tokens).logits
    return found


@torch.no_grad()
def test_narrower_mlps_are_the_same_in_openai_whisper(
    shaped: Path, compact: Path, mel: torch.Tensor, tokens: torch.Tensor
) -> None:
    loaded = pessa_cli.load_whisper(compact)
    widths = {site.name: site.kept for site in mlps_of(open_model(compact))}
    assert set(widths.values()) == {4 * WIDTH - int(0.6 * 4 * WIDTH)}
    for stack, blocks in (("encoder", loaded.encoder.blocks), ("decoder", loaded.decoder.blocks)):
        for layer, block in enumerate(blocks):
            kept = widths[f"{stack}.mlp.{layer}"]
            assert [tuple(block.mlp[at].weight.shape) for at in (0, 2)] == [(kept, WIDTH), (WIDTH, kept)]
    expected = logits(compact, mel, tokens)
    assert relative(loaded(mel, tokens), expected) < 1e-5
    assert relative(logits(shaped, mel, tokens), expected) > 1e-2  # negative control: the unpruned model
    # The same transcript, token by token.
    audio, theirs = loaded.embed_audio(mel[:1]), tiny.load(compact)
    texts = [tokens[:1, :3]] * 2
    for _ in range(8):
        ours, other = texts
        found = [loaded.logits(ours, audio), theirs(input_features=mel[:1], decoder_input_ids=other).logits]
        texts = [torch.cat([text, each[:, -1:].argmax(-1)], 1) for text, each in zip(texts, found, strict=True)]
    assert torch.equal(*texts)


@torch.no_grad()
def test_the_openai_file_has_zeros_for_the_cut_channels(
    compact: Path, mel: torch.Tensor, tokens: torch.Tensor, tmp_path: Path
) -> None:
    export_openai(compact, tmp_path / "out.pt")
    stock = whisper.load_model(str(tmp_path / "out.pt"))
    assert type(stock) is Whisper
    model = open_model(compact)
    kept = {site.name: site.kept for site in mlps_of(model)}
    for stack, blocks in (("encoder", stock.encoder.blocks), ("decoder", stock.decoder.blocks)):
        for layer, block in enumerate(blocks):
            first, second, width = block.mlp[0], block.mlp[2], kept[f"{stack}.mlp.{layer}"]
            assert first.weight.shape == (4 * WIDTH, WIDTH)
            for tensor in (first.weight, first.bias, second.weight.T):
                assert bool((tensor[width:] == 0).all())
                assert bool((tensor[:width] != 0).any(-1).all())
            name = f"model.{stack}.layers.{layer}"
            assert torch.equal(first.weight[:width], model.reader.get(f"{name}.fc1.weight"))
            assert torch.equal(second.weight[:, :width], model.reader.get(f"{name}.fc2.weight"))
    assert relative(stock(mel, tokens), logits(compact, mel, tokens)) < 1e-5
    # The file is a source like any other: the same weights as the dense folder.
    export_model(model, tmp_path / "dense", "dense")
    with open_source(str(tmp_path / "out.pt")) as folder:
        back, dense = open_model(folder), open_model(tmp_path / "dense")
        assert all(
            torch.equal(back.reader.get(tensor), dense.reader.get(tensor))
            for site in mlps_of(dense)
            for tensor in site.tensors
        )


def test_attention_and_mlps_cut_together_in_openai_whisper(
    shaped: Path, mel: torch.Tensor, tokens: torch.Tensor, tmp_path: Path
) -> None:
    prune_model(open_model(shaped), tmp_path / "out", Rule(target_layers=0.6))
    with torch.no_grad():
        found = pessa_cli.load_whisper(tmp_path / "out")(mel, tokens)
    assert relative(found, logits(tmp_path / "out", mel, tokens)) < 1e-5


def test_other_widths_than_those_of_openai_are_refused(tmp_path: Path) -> None:
    with pytest.raises(PessaError, match=r"fc1.weight: shape \(96, 64\), expected \(256, 64\)"):
        pessa_cli.load_whisper(_shaped(tmp_path / "model", CHANNELS))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper"])
@torch.no_grad()
def test_onnx_graphs_of_cut_mlps_are_narrower_and_agree(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    original = open_model(strong(tiny.save(name, tmp_path / "model")))
    prune_model(original, tmp_path / "out", Rule(ratio=0.3, mlp_ratio=0.5))
    errors = export_onnx(tmp_path / "out", tmp_path / "onnx")
    assert max(errors.values()) < 1e-5
    assert len(errors) == (3 if name == "whisper" else 1)
    shapes = {
        tuple(tensor.dims)
        for file in (tmp_path / "onnx").glob("*.onnx")
        for tensor in onnx.load(str(file)).graph.initializer
        if len(tensor.dims) == 2
    }
    assert any(24 in shape for shape in shapes)
    assert not any(48 in shape for shape in shapes)
    outputs = []
    for folder in ("model", "out"):
        loaded = load(open_model(tmp_path / folder))
        outputs.append(loaded(**tiny.inputs(loaded)).logits)
    assert relative(outputs[1], outputs[0]) > 1e-2  # negative control: the agreement is not with the original


def test_modules_of_an_mlp_are_plain_and_narrower(tmp_path: Path) -> None:
    """They report the width that they have, so that quantisation, adapters and compilers take them as any other."""
    model = open_model(strong(tiny.save("llama", tmp_path / "model")))
    prune_model(model, tmp_path / "out", Rule(rank=4, mlp_rank=20))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for layer in loaded.model.layers:
        for module, shape in (
            (layer.mlp.gate_proj, (20, 32)),
            (layer.mlp.up_proj, (20, 32)),
            (layer.mlp.down_proj, (32, 20)),
        ):
            assert type(module) is nn.Linear
            assert (module.out_features, module.in_features) == tuple(module.weight.shape) == shape
        assert isinstance(layer.self_attn.v_proj, RaggedOut)
        assert isinstance(layer.self_attn.o_proj, RaggedIn)
    assert loaded.dtype == torch.float32
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert half.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [None, ["down_proj", "gate_proj"]], ids=["attention", "the MLP"])
def test_adapters_on_a_model_with_cut_mlps(targets: list[str] | None, tmp_path: Path) -> None:
    model = open_model(strong(tiny.save("llama", tmp_path / "model")))
    prune_model(model, tmp_path / "out", Rule(ratio=0.3, mlp_ratio=0.5))

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()

    def said(loaded: Any) -> torch.Tensor:
        with torch.no_grad():
            found: torch.Tensor = loaded(**tiny.inputs(loaded)).logits
        return found

    torch.manual_seed(0)
    config = (
        PessaTunerConfig(init_weights=False)
        if targets is None
        else LoraConfig(target_modules=targets, r=2, init_lora_weights=False)
    )
    tuned = get_peft_model(base(), config).eval()
    expected = said(tuned)
    assert relative(said(base()), expected) > 1e-2  # negative control: the adapter changes the model
    tuned.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
    assert relative(said(again), expected) < 1e-6
    merged = again.merge_and_unload()
    assert relative(said(merged), expected) < 1e-5


def damaged(entry: str) -> Any:
    def change(config: dict[str, Any]) -> None:
        entries = config["quantization_config"]["modules"]
        entries[next(name for name in entries if name.endswith("layers.0.mlp.down_proj"))] = entry

    return edit_json(change)


@pytest.mark.parametrize(
    ("entry", "culprit"),
    [
        ("channel columns 48: 23", "contradict each other"),
        ("channel columns 48: 49", "49 of 48 channels"),
        ("channel columns 48: 0", "contradict each other"),
        ("channel columns 47: 24", "contradict each other"),
        ("columns 48: 24", "contradict each other"),
        ("channel rows 48: 24", "contradict each other"),
        ("channels 48: 24", "invalid entry"),
        ("channel columns 48: 12 12", "contradict each other"),
    ],
)
def test_damaged_entries_are_refused(entry: str, culprit: str, tmp_path: Path, pessa: Any) -> None:
    model = open_model(tiny.save("llama", tmp_path / "model"))
    prune_model(model, tmp_path / "out", Rule(mlp_rank=24), select(model.sites, ("mlp",)))
    assert pessa("inspect", tmp_path / "out").code == 0
    damaged(entry)(copy_of(tmp_path / "out", tmp_path / "damaged"))
    refused = pessa("inspect", tmp_path / "damaged")
    is_refusal(refused, culprit, "layers.0.mlp.down_proj")
