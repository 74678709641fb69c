"""ONNX graphs of pruned models: narrower than the original, equal to transformers, and written only if they agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from harness import Pessa, Tensors, TinyFolder, copy_of, edit_weights, is_refusal, snapshot
from tiny_models import build
from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.common.errors import PessaError
from pessa_cli.exports import onnx as onnx_export
from pessa_cli.exports.onnx import TOLERANCE, export_onnx
from pessa_cli.exports.onnx_attention import CacheSlots, Head, HeadByHead, OnnxStep, best_width, kept_heads
from pessa_cli.models.load import load
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

pytest.importorskip("onnxruntime")
WHISPER_FILES = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")
Pruned = Callable[[str], Path]


@pytest.fixture(scope="module")
def pruned(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Pruned:
    """A tiny model pruned by half, with a strong first head and a zero last head in the encoder.

    The unpruned model is in the folder `original` beside it.
    """
    made: dict[str, Path] = {}

    def uneven(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if any(f"{side}.weight" in name for side in ("q_proj", "v_proj", "query", "value")):
                tensor[:8] *= 6
                tensor[24:] *= 0 if "decoder" not in name else 1

    def get(name: str) -> Path:
        if name not in made:
            original = copy_of(tiny_folder(name), tmp_path_factory.mktemp("pruned") / "original")
            edit_weights(uneven)(original)
            made[name] = original.with_name("out")
            prune_model(open_model(original), made[name], Rule(ratio=0.5))
        return made[name]

    return get


def run(file: Path, **inputs: Any) -> dict[str, Any]:
    session = onnx_export._session(file)
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, arrays), strict=True))


def relative_error(found: Any, expected: Tensor) -> float:
    return float((torch.from_numpy(found) - expected).norm() / expected.norm())


def greedy(folder: Path, features: Tensor, prompt: list[int], new: int) -> list[int]:
    """Greedy decoding with the tensor names of optimum. The cache has the shapes that the graphs return."""
    frames = run(folder / "encoder_model.onnx", input_features=features)["last_hidden_state"]
    result = run(folder / "decoder_model.onnx", input_ids=np.array([prompt]), encoder_hidden_states=frames)
    tokens, past = list(prompt), dict[str, Any]()
    while True:
        tokens.append(int(result.pop("logits")[0, -1].argmax()))
        past |= {name.replace("present", "past_key_values"): value for name, value in result.items()}
        if len(tokens) == len(prompt) + new:
            return tokens
        result = run(folder / "decoder_with_past_model.onnx", input_ids=np.array([tokens[-1:]]), **past)


@pytest.mark.slow
@torch.no_grad()
def test_whisper_decodes_as_transformers_does(pruned: Pruned, tmp_path: Path) -> None:
    folder, out = pruned("whisper"), tmp_path / "onnx"
    errors = export_onnx(folder, out)
    assert set(errors) == set(WHISPER_FILES)
    assert max(errors.values()) < 1e-5
    model, features = load(open_model(folder)), tiny.inputs(tiny.build("whisper"))["input_features"]
    ids = torch.tensor([[1, 7, 9]])
    for _ in range(8):
        ids = torch.cat([ids, model(features[:1], decoder_input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    assert greedy(out, features[:1], [1, 7, 9], 8) == ids[0].tolist()

    # Other batch sizes and lengths work. Negative control: the unpruned model differs.
    frames = model.model.encoder(features).last_hidden_state
    assert relative_error(run(out / WHISPER_FILES[0], input_features=features)["last_hidden_state"], frames) < TOLERANCE
    ids = torch.randint(5, 90, (2, 12))
    first = run(out / WHISPER_FILES[1], input_ids=ids, encoder_hidden_states=frames)
    assert relative_error(first["logits"], model(features, decoder_input_ids=ids).logits) < TOLERANCE
    unpruned = load(open_model(folder.with_name("original")))
    assert relative_error(first["logits"], unpruned(features, decoder_input_ids=ids).logits) > 1000 * TOLERANCE

    kept = [
        f"{layer}.{kind}.{side}" for layer in (0, 1) for kind in ("decoder", "encoder") for side in ("key", "value")
    ]
    assert list(first) == ["logits", *(f"present.{name}" for name in kept)]
    slots = {array.shape[1] for name, array in first.items() if name != "logits"}
    assert max(slots) > 4  # 4 heads, of which the strong one needs more than one slot
    cache = sum(array.size for name, array in first.items() if name != "logits")
    whole = 2 * 2 * 2 * (12 + 30) * 32  # 2 samples, 2 layers, keys and values, 12 tokens and 30 frames of width 32
    assert cache < 0.7 * whole
    assert "quantization_config" not in tiny.read_config(out)
    assert {path.name for path in out.iterdir()} == {
        *WHISPER_FILES,
        "config.json",
        "generation_config.json",
        "pessa.json",
    }


@pytest.mark.slow
@torch.no_grad()
def test_bert_gives_the_logits_of_transformers(pruned: Pruned, tmp_path: Path) -> None:
    folder, out = pruned("bert"), tmp_path / "onnx"
    assert export_onnx(folder, out)["model.onnx"] < 1e-5
    model = load(open_model(folder))
    inputs = tiny.inputs(model, batch=3) | {"token_type_ids": torch.ones(3, 9, dtype=torch.long)}
    found = run(out / "model.onnx", **inputs)
    assert list(found) == ["logits"]
    assert relative_error(found["logits"], model(**inputs).logits) < TOLERANCE
    inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])  # before, the padding was masked
    assert relative_error(found["logits"], model(**inputs).logits) > 100 * TOLERANCE


@pytest.mark.slow
def test_force_replaces_graphs_and_large_weights_lie_beside_them(
    pruned: Pruned, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "onnx"
    export_onnx(pruned("bert"), out)
    (out / "model.onnx").write_text("edited")
    before = snapshot(tmp_path)
    with pytest.raises(PessaError, match="exists"):
        export_onnx(pruned("bert"), out)
    assert snapshot(tmp_path) == before
    monkeypatch.setattr(onnx_export, "LARGEST", 0)
    result = pessa("export", pruned("bert"), "--to", "onnx", "-o", out, "--force")
    assert result.code == 0, result
    assert {path.name for path in out.glob("*onnx*")} == {"model.onnx", "model.onnx_data"}
    assert run(
        out / "model.onnx", **{name: np.ones((1, 4), int) for name in ("input_ids", "attention_mask", "token_type_ids")}
    )


@pytest.mark.slow
def test_graphs_that_disagree_are_not_put_in_place(
    pruned: Pruned, tmp_path: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(weights: HeadWeights, scaling: float) -> tuple[list[Head], Tensor]:
        return kept_heads(weights, 1.01 * scaling)

    monkeypatch.setattr(onnx_export, "kept_heads", wrong)
    before = snapshot(tmp_path)
    result = pessa("export", pruned("bert"), "--to", "onnx", "-o", tmp_path / "onnx")
    is_refusal(result, "disagree by more than 0.0001", "model.onnx: off by 0.0")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["llama"])
def test_other_models_are_refused(name: str, tiny_folder: TinyFolder, tmp_path: Path, pessa: Pessa) -> None:
    is_refusal(pessa("export", tiny_folder(name), "--to", "onnx", "-o", tmp_path / "onnx"), name)
    assert not list(tmp_path.iterdir())


def test_attention_with_sinks_is_refused(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """Its weights do not sum to one, so the value bias cannot move into the output bias."""
    build("gpt_oss").save_pretrained(tmp_path)
    model = open_model(tmp_path)
    with pytest.raises(
        PessaError, match=f"{model.attention[0].name}: its attention weights do not sum to one"
    ) as raised:
        onnx_export._attention(model.reader, model.attention[0], 1.0)
    assert "--layout dense" in str(raised.value.hint)
    bert = open_model(tiny_folder("bert"))  # the negative control
    onnx_export._attention(bert.reader, bert.attention[0], 1.0)
    sinks = replace(bert.attention[0], spec=replace(bert.attention[0].spec, sums_to_one=False))
    with pytest.raises(PessaError, match="do not sum to one"):
        onnx_export._attention(bert.reader, sinks, 1.0)


def block(qk_ranks: list[int], vo_ranks: list[int], biases: bool) -> HeadWeights:
    """A block of width 12 with heads of dimension 8, cut to these ranks."""
    generator = torch.Generator().manual_seed(0)

    def cut(ranks: list[int], *shape: int) -> Tensor:
        drawn = torch.randn(len(ranks), 8, *shape, generator=generator)
        for head, rank in enumerate(ranks):
            drawn[head, rank:] = 0
        return drawn

    extra = {"q_bias": cut(qk_ranks)[:, None], "k_bias": cut(qk_ranks), "v_bias": cut(vo_ranks)} if biases else {}
    q, k, v, o = cut(qk_ranks, 12)[:, None], cut(qk_ranks, 12), cut(vo_ranks, 12), cut(vo_ranks, 12)
    return HeadWeights(q, k, v, o.permute(2, 0, 1)[:, :, None], **extra, o_bias=torch.ones(12) if biases else None)


def attention(weights: HeadWeights, x: Tensor, frames: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Textbook attention at full width."""

    def side(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = torch.einsum("btD,hdD->bhtd", x, weight)
        return found if bias is None else found + bias[:, None]

    q = side(x, weights.q[:, 0], None if weights.q_bias is None else weights.q_bias[:, 0])
    k, v = side(frames, weights.k, weights.k_bias), side(frames, weights.v, weights.v_bias)
    shares = (q @ k.transpose(2, 3) * scaling + mask).softmax(-1)
    out = torch.einsum("bhtd,Dhd->btD", shares @ v, weights.o[:, :, 0])
    return out if weights.o_bias is None else out + weights.o_bias


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize(
    ("qk", "vo"),
    [
        ([8, 8, 8], [8, 8, 8]),
        ([1, 8, 3], [8, 2, 5]),
        ([0, 8, 4], [4, 0, 8]),
        ([0, 0, 0], [1, 2, 3]),
        ([3, 2, 1], [0, 0, 0]),
        ([0, 0, 0], [0, 0, 0]),
    ],
)
def test_narrow_attention_is_attention(qk: list[int], vo: list[int], biases: bool) -> None:
    weights = block(qk, vo, biases)
    generator = torch.Generator().manual_seed(1)
    x, frames = (torch.randn(2, length, 12, generator=generator) for length in (5, 7))
    mask = torch.randn(2, 1, 5, 5, generator=generator)
    own, crossed = attention(weights, x, x, mask, 0.3), attention(weights, x, frames, torch.zeros(1), 0.3)
    heads, o_bias = kept_heads(weights, 0.3)
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-5)
    close(HeadByHead(heads, o_bias)(x, mask)[0], own)
    assert not torch.allclose(HeadByHead(*kept_heads(weights, 0.35))(x, mask)[0], own) or not any(qk) or not any(vo)
    for widths in ((None, None), (8, 8), (3, 2)):
        slots = CacheSlots("block", heads, o_bias, *widths)
        close(slots(x, attention_mask=mask)[0], own)
        first, later = OnnxStep({}), OnnxStep({})
        close(slots(x, frames, first)[0], crossed)
        later.past["block"] = first.present["block"]
        close(slots(x, frames[:0], later)[0], crossed)  # uses only the cache
        half = OnnxStep({})
        slots(x[:, :2], past_key_values=half)
        rest = OnnxStep({"block": half.present["block"]})
        found, _ = slots(x[:, 2:], past_key_values=rest, attention_mask=mask[:, :, 2:])
        close(found, own[:, 2:])


def test_compact_and_dense_files_give_the_same_heads(pruned: Pruned, tmp_path: Path) -> None:
    from pessa_cli.surgery.export import export_model

    compact = open_model(pruned("whisper"))
    export_model(compact, tmp_path / "dense", "dense")
    dense = open_model(tmp_path / "dense")
    assert [site.vo_ranks for site in compact.attention] != [site.vo_ranks for site in dense.attention]
    for ours, theirs in zip(compact.attention, dense.attention, strict=True):
        pairs = zip(
            kept_heads(read_site(compact.reader, ours), 1)[0],
            kept_heads(read_site(dense.reader, theirs), 1)[0],
            strict=True,
        )
        for one, other in pairs:
            assert all(torch.equal(a, b) for a, b in zip(vars(one).values(), vars(other).values(), strict=True))


@pytest.mark.parametrize(
    ("ranks", "width"),
    [([64] * 6, 64), ([20] * 6, 20), ([10, 13, 18, 12, 62, 14], 16), ([0, 0], 4), ([1, 1, 1, 64], 16), ([33] * 4, 36)],
)
def test_best_width(ranks: list[int], width: int) -> None:
    assert best_width(ranks) == width
