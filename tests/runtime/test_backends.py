"""The scatter and bucketed backends give the same results in every mode, and bucketed shrinks the cache."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from harness import Real, TinyFolder
from torch import Tensor, nn
from transformers.models.whisper.modeling_whisper import WhisperAttention

import pessa_cli
from pessa_cli.blocks.compact_format import Ragged, Ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.runtime.bucketed_attention import DECODING, ENCODING
from pessa_cli.runtime.buckets import Cost, plan
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut, Slots
from pessa_cli.runtime.patched_attention import NarrowBertSelfAttention, NarrowWhisperAttention, patch_attention
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

WIDTH, HEADS, HEAD_DIM = 192, 6, 32
RANKS: dict[str, tuple[Ranks, Ranks]] = {
    "even": ((16, 8, 24, 8, 32, 8), (8, 8, 16, 32, 8, 24)),
    "odd": ((1, 3, 31, 17, 9, 5), (31, 1, 7, 13, 19, 3)),
    "zeros": ((0, 5, 0, 32, 7, 0), (9, 0, 0, 3, 32, 1)),
    "one head": ((0, 0, 0, 0, 0, 3), (0, 0, 0, 0, 0, 2)),
    "no values": ((4, 4, 4, 4, 4, 4), (0, 0, 0, 0, 0, 0)),
    "nothing": ((0, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 0)),
    "full": ((32,) * 6, (32,) * 6),
    "all but one": ((31,) * 6, (31,) * 6),
}


@pytest.fixture(autouse=True)
def _restore_auto_backend() -> Iterator[None]:
    yield
    pessa_cli.set_backend("auto")


@pytest.fixture(scope="module")
def folders(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name in ("whisper", "bert", "llama"):
        made[name] = tmp_path_factory.mktemp("backends") / name
        prune_model(open_model(tiny_folder(name)), made[name], Rule(ratio=0.45))
    return made


def load(folder: Path, **options: Any) -> Any:
    kind = getattr(transformers, tiny.read_config(folder)["architectures"][0])
    return kind.from_pretrained(folder, **options).eval()


def block(ranks: tuple[Ranks, Ranks], decoder: bool) -> WhisperAttention:
    """Return one Whisper attention block with random weights of these ranks."""
    torch.manual_seed(0)
    holder = nn.Module()
    config = transformers.WhisperConfig(attn_implementation="sdpa")
    attention = WhisperAttention(WIDTH, HEADS, is_decoder=decoder, layer_idx=0, config=config)
    for name, kind, side, of in (
        ("q_proj", RaggedOut, "rows", ranks[0]),
        ("k_proj", RaggedOut, "rows", ranks[0]),
        ("v_proj", RaggedOut, "rows", ranks[1]),
        ("out_proj", RaggedIn, "columns", ranks[1]),
    ):
        setattr(attention, name, kind(getattr(attention, name), Ragged(side, HEAD_DIM, of)))
    holder.attention = attention
    with torch.no_grad():
        for parameter in holder.parameters():
            parameter.normal_(0, 0.4)
    patch_attention(holder)
    assert isinstance(attention, NarrowWhisperAttention)
    return attention.eval()


def both(run: Any) -> tuple[Tensor, Tensor]:
    results = []
    for backend in ("scatter", "bucketed"):
        pessa_cli.set_backend(backend)
        results.append(run())
    return results[0], results[1]


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().norm() / a.detach().norm())


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_block_computes_the_same(ranks: tuple[Ranks, Ranks], batch: int) -> None:
    attention = block(ranks, decoder=False)
    x = torch.randn(batch, 80, WIDTH)
    with torch.no_grad():
        assert error(*both(lambda: attention(x)[0])) < 1e-5
        mask = torch.zeros(batch, HEADS, 80, 80).masked_fill(torch.rand(batch, HEADS, 80, 80) < 0.3, -1e9)
        assert error(*both(lambda: attention(x, attention_mask=mask)[0])) < 1e-5  # one for each head


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("across", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_steps_with_a_cache_compute_the_same(ranks: tuple[Ranks, Ranks], across: bool, static: bool) -> None:
    attention = block(ranks, decoder=True)
    frames, x = torch.randn(2, 70, WIDTH), torch.randn(2, 5, WIDTH)
    config = transformers.WhisperConfig(decoder_layers=1)

    def cache(length: int) -> Any:
        return transformers.StaticCache(config, length) if static else transformers.DynamicCache()

    def run() -> Tensor:
        caches = transformers.EncoderDecoderCache(cache(5), cache(70))
        out = []
        for start, end in ((0, 3), (3, 4), (4, 5)):
            seen = torch.arange(5 if static else end) <= torch.arange(start, end)[:, None]
            given = {"key_value_states": frames} if across else {"attention_mask": seen[None, None]}
            out.append(attention(x[:, start:end], past_key_values=caches, **given)[0])
            if not static and not across:
                assert caches.get_seq_length() == end
        return torch.cat(out, 1)

    with torch.no_grad():
        assert error(*both(run)) < 1e-5


def test_negative_control_a_wrong_layout() -> None:
    """The results must differ if the columns of one head are put into the slots of another."""
    attention = block(RANKS["even"], decoder=False)
    x = torch.randn(1, 80, WIDTH)
    slots = attention.layout.k.slots
    wrong = replace(attention.layout.k, slots=Slots.of(slots.index.roll(8), sum(RANKS["even"][0])))
    attention.layout = replace(attention.layout, k=wrong)
    with torch.no_grad():
        assert error(*both(lambda: attention(x)[0])) > 1e-2


def test_gradients_are_the_same() -> None:
    attention = block(RANKS["odd"], decoder=False)
    x = torch.randn(2, 80, WIDTH)

    def run() -> Tensor:
        attention.zero_grad()
        attention(x)[0].square().sum().backward()
        return torch.cat(
            [parameter.grad.flatten() for parameter in attention.parameters() if parameter.grad is not None]
        )

    assert error(*both(run)) < 1e-5


@pytest.mark.parametrize("name", ["whisper", "bert", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_compute_the_same(folders: dict[str, Path], name: str, attention: str) -> None:
    model = load(folders[name], attn_implementation=attention)
    inputs = tiny.inputs(model)
    with torch.no_grad():
        assert error(*both(lambda: model(**inputs).logits)) < 1e-5


@pytest.mark.parametrize("name", ["whisper", "bert"])
def test_training_with_checkpointing_is_the_same(folders: dict[str, Path], name: str) -> None:
    model = load(folders[name]).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable()
    inputs = tiny.inputs(model)

    def run() -> Tensor:
        model.zero_grad()
        model(**inputs, use_cache=False).logits.square().sum().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    torch.manual_seed(0)
    assert error(*both(run)) < 1e-4


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "no cache", "static cache"],
)
def test_generation_is_the_same(folders: dict[str, Path], options: dict[str, Any]) -> None:
    model = load(folders["whisper"])
    features = tiny.inputs(model)["input_features"]
    scatter, bucketed = both(lambda: model.generate(features, max_new_tokens=12, **options))
    assert torch.equal(scatter, bucketed)
    assert len(set(scatter[0].tolist())) > 3


def test_the_cache_is_smaller_with_buckets_only(folders: dict[str, Path]) -> None:
    model = load(folders["whisper"])

    def cached() -> Tensor:
        with torch.no_grad():
            caches = model(**tiny.inputs(model)).past_key_values
        halves = (caches.self_attention_cache, caches.cross_attention_cache)
        return torch.tensor(
            [sum(x.numel() for layer in half.layers for x in (layer.keys, layer.values)) for half in halves]
        )

    full, small = both(cached)
    assert (small <= full).all()
    attention = block(((8,) * 6, (16,) * 6), decoder=True)
    caches = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    pessa_cli.set_backend("bucketed")
    attention(torch.randn(1, 1, WIDTH), key_value_states=torch.randn(1, 70, WIDTH), past_key_values=caches)
    layer = caches.cross_attention_cache.layers[0]
    assert layer.keys.shape == (
        1,
        1,
        70,
        6 * 8 + 1,
    )  # and one more column, which the view of the last head reads beyond its end
    assert layer.values.shape == (1, 1, 70, 6 * 16)


def test_the_real_tiny_en_pruned_by_half(real: Real, tmp_path: Path) -> None:
    """The backends agree in the encoder, a prompt and decoding steps; the control is the original, which differs."""
    source = real("whisper-tiny.en")
    prune_model(open_model(source), tmp_path / "half", Rule(ratio=0.5))
    features = torch.randn(1, 80, 3000, generator=torch.Generator().manual_seed(0)).clamp(-1, 1.5)
    found: dict[str, list[Tensor]] = {}
    for name, folder in (("scatter", tmp_path / "half"), ("bucketed", tmp_path / "half"), ("original", source)):
        pessa_cli.set_backend("bucketed" if name == "bucketed" else "scatter")
        model = load(folder, dtype=torch.float32)
        cache, logits = None, []
        with torch.no_grad():
            states = model.model.encoder(features).last_hidden_state
            for ids in ([[50257, 50362, 440]], [[1002]], [[717]]):
                out = model(encoder_outputs=(states,), decoder_input_ids=torch.tensor(ids), past_key_values=cache)
                cache = out.past_key_values
                logits.append(out.logits)
        found[name] = [states, *logits]
    for scattered, bucketed, original in zip(*found.values(), strict=True):
        assert error(scattered, bucketed) < 1e-5
        assert error(original, bucketed) > 1e-2


def test_loaded_models_can_be_copied_pickled_compiled_and_cast(folders: dict[str, Path]) -> None:
    model = load(folders["bert"])
    inputs = tiny.inputs(model)
    kinds = [module for module in model.modules() if isinstance(module, NarrowBertSelfAttention)]
    assert len(kinds) == 2
    pessa_cli.set_backend("bucketed")
    with torch.no_grad():
        expected = model(**inputs).logits
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(other(**inputs).logits, expected)
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True)
        assert error(expected, compiled(**inputs).logits) < 1e-6
        assert error(expected, copy.deepcopy(model).to(torch.bfloat16)(**inputs).logits.float()) < 5e-2


def test_an_adapter_disables_bucketing(folders: dict[str, Path]) -> None:
    model = load(folders["whisper"])
    module = model.model.encoder.layers[0].self_attn
    pessa_cli.set_backend("bucketed")
    x = torch.randn(1, 9, 32)
    with torch.no_grad():
        expected = module(x)[0]
        assert module.uses_buckets(x)
        module.v_proj = nn.Sequential(module.v_proj)  # as peft wraps it
        assert not module.uses_buckets(x)
        assert error(expected, module(x)[0]) < 1e-5


def test_plans() -> None:
    """Each head with an effect is in one bucket, wide enough and a multiple of 8; the plan never costs more than one
    call."""
    for cost in (ENCODING["cpu"], DECODING["cpu"], Cost(call=0, head=0, width=1, stored=0)):
        for qk, vo in RANKS.values():
            found = plan(qk, vo, HEAD_DIM, cost)
            assert sorted(h for b in found.buckets for h in b.heads) == [h for h in range(HEADS) if vo[h]]
            for bucket in found.buckets:
                assert all(qk[head] <= bucket.qk and vo[head] <= bucket.vo for head in bucket.heads)
                assert bucket.qk % 8 == bucket.vo % 8 == bucket.width % 8 == 0
                assert max(bucket.qk, bucket.vo) <= bucket.width
            assert found.pays
    free, dear = (plan(*RANKS["odd"], HEAD_DIM, Cost(call, 0, 1, 0)) for call in (0, 1e9))
    assert len(free.buckets) > 2
    assert len(dear.buckets) == 1


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(pessa_cli.UsageError, match="sparse"):
        pessa_cli.set_backend("sparse")  # type: ignore[arg-type]
    assert pessa_cli.get_backend() == "auto"
