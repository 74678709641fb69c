"""openai-whisper with compact folders, and with the .pt file that pessa exports for whisper.load_model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import whisper
from harness import (
    PESSA,
    WEIGHTS,
    Pessa,
    Real,
    RealPruned,
    TinyFolder,
    copy_of,
    edit_json,
    edit_weights,
    is_refusal,
    raw_tensors,
    snapshot,
)
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor
from whisper import timing
from whisper.model import MultiHeadAttention, Whisper, disable_sdpa

import pessa_cli
from pessa_cli.checkpoint.places import LOCK_FILE
from pessa_cli.common.errors import PessaError
from pessa_cli.exports.openai import export_openai
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.ranks.rule import Rule
from pessa_cli.runtime import openai_whisper as whisper_model
from pessa_cli.runtime.buckets import Cost
from pessa_cli.runtime.openai_whisper import RaggedAttention, buckets_of
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

HEADS = 4
ALIGNMENT = [[0, 1], [1, 0], [1, 3]]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def ragged(model: Whisper) -> list[RaggedAttention]:
    return [module for module in model.modules() if isinstance(module, RaggedAttention)]


@pytest.fixture(autouse=True)
def _always_in_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make calls free, as bucketed attention never pays off in models of this size."""
    set_costs(monkeypatch, Cost(call=0, head=0, width=0, stored=1))


def set_costs(monkeypatch: pytest.MonkeyPatch, cost: Cost) -> None:
    monkeypatch.setattr(whisper_model, "JOINING", 0)
    for table in ("ENCODING", "DECODING"):
        monkeypatch.setattr(whisper_model, table, {"cpu": cost})


# --- a tiny model with the shapes of openai-whisper and heads of every rank from none to full


def save_shaped(folder: Path, **changes: Any) -> Path:
    """A Whisper with openai-whisper's vocabulary, whose heads have decreasing weights; the last head is zero."""
    torch.manual_seed(0)
    width = 128
    sizes: dict[str, Any] = {"vocab_size": 51865, "num_mel_bins": 80, "d_model": width}
    sizes |= {"max_source_positions": 50, "max_target_positions": 20}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": HEADS, f"{side}_ffn_dim": 4 * width}
    model = WhisperForConditionalGeneration(WhisperConfig(**(sizes | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attn." in name:
                parameter.normal_(0, 0.2)
                if "q_proj" in name or "v_proj" in name:
                    by_head = torch.tensor([1.0, 0.6, 0.3, 0.0]).repeat_interleave(width // HEADS)
                    parameter.mul_(by_head if parameter.dim() == 1 else by_head[:, None])
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"alignment_heads": ALIGNMENT}))
    return folder


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_shaped(tmp_path_factory.mktemp("shaped") / "model")


@pytest.fixture(scope="module")
def compact(shaped: Path) -> Path:
    out = shaped.parent / "compact"
    prune_model(open_model(shaped), out, Rule(ratio=0.55))
    return out


@pytest.fixture(scope="module")
def file(compact: Path) -> Path:
    """The compact model, exported as an openai-whisper file."""
    out = compact.parent / "out.pt"
    export_openai(compact, out)
    return out


@pytest.fixture
def mel() -> torch.Tensor:
    return torch.randn(2, 80, 100, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 50000, (2, 9), generator=torch.Generator().manual_seed(2))


def test_a_compact_model_is_the_same_in_openai_whisper(compact: Path, mel: torch.Tensor, tokens: torch.Tensor) -> None:
    loaded = pessa_cli.load_whisper(compact)
    assert isinstance(loaded, Whisper)
    assert len(ragged(loaded)) == 6
    reader = open_model(compact)
    assert {0, 32} < {rank for site in reader.attention for rank in (*site.qk_ranks, *site.vo_ranks)}
    theirs = WhisperForConditionalGeneration.from_pretrained(compact).eval()
    with torch.no_grad():
        expected = theirs(input_features=mel, decoder_input_ids=tokens).logits
        assert relative(loaded(mel, tokens), expected) < 1e-5
        ragged(loaded)[-1].scale *= 1.1  # the control: as if the scale were that of other heads
        assert relative(loaded(mel, tokens), expected) > 1e-4


def test_weights_that_are_cut_are_not_in_memory(compact: Path, file: Path) -> None:
    loaded, stock = pessa_cli.load_whisper(compact), whisper.load_model(str(file))
    for module in ragged(loaded):
        assert module.query.weight.shape[0] == sum(module.qk_widths) < 128
        assert module.out.weight.shape[1] == sum(module.vo_widths) < 128
    sizes = [sum(p.numel() for p in m.parameters() if p.shape[0] < 1000) for m in (loaded, stock)]
    assert sizes[0] < 0.85 * sizes[1]


def test_decoding_with_its_cache_and_several_beams(compact: Path, mel: torch.Tensor, tokens: torch.Tensor) -> None:
    """Decoding token by token equals decoding all at once; three beams share the keys and values of one clip."""
    loaded = pessa_cli.load_whisper(compact)
    with torch.no_grad():
        audio = loaded.embed_audio(mel[:1])
        beams = torch.cat([tokens, tokens[:1].flip(1)])
        expected = loaded.logits(beams, audio)
        cache, hooks = loaded.install_kv_cache_hooks()
        steps = [loaded.decoder(beams[:, i : i + 1], audio, kv_cache=cache) for i in range(beams.shape[1])]
        assert relative(torch.cat(steps, 1), expected) < 1e-5
        narrow = {module.key: sum(module.qk_widths) for module in ragged(loaded)}
        narrow |= {module.value: sum(module.vo_widths) for module in ragged(loaded)}
        assert {key: cached.shape[-1] for key, cached in cache.items()}.items() <= narrow.items()
        for hook in hooks:
            hook.remove()
        stale = loaded.decoder(beams[:, -1:], audio, kv_cache=dict(list(cache.items())[:0]))
        assert relative(stale[:, 0], expected[:, -1]) > 1e-3  # negative control: an empty cache


def test_scores_come_in_the_order_of_the_heads(
    compact: Path, file: Path, mel: torch.Tensor, tokens: torch.Tensor
) -> None:
    """Word timestamps are computed from the scores of certain layers and heads."""
    models = {"stock": whisper.load_model(str(file)), "compact": pessa_cli.load_whisper(compact)}
    scores: dict[str, list[torch.Tensor]] = {}
    for name, model in models.items():
        found: list[torch.Tensor] = scores.setdefault(name, [])
        for block in model.decoder.blocks:
            block.cross_attn.register_forward_hook(lambda _module, _inputs, out, found=found: found.append(out[1]))
        with torch.no_grad(), disable_sdpa():
            model(mel, tokens)
        assert MultiHeadAttention.use_sdpa
    for stock, ours in zip(scores["stock"], scores["compact"], strict=True):
        assert stock.shape == ours.shape == (2, HEADS, 9, 50)
        assert relative(ours, stock) < 1e-5
        assert relative(ours.flip(1), stock) > 0.1  # the control
    assert any(module.places != sorted(module.places) for module in ragged(models["compact"]))


def test_half_precision_and_language_detection(compact: Path, file: Path, mel: torch.Tensor) -> None:
    stock, ours = whisper.load_model(str(file)), pessa_cli.load_whisper(compact, "cpu")
    assert stock.is_multilingual
    assert ours.is_multilingual
    found = [model.detect_language(mel[0])[1] for model in (stock, ours)]
    assert found[0].keys() == found[1].keys()
    assert max(abs(found[0][language] - found[1][language]) for language in found[0]) < 1e-6
    with torch.no_grad():
        wide, narrow = ours.embed_audio(mel), ours.embed_audio(mel.half())
    assert narrow.dtype == torch.float16
    assert 1e-5 < relative(narrow.float(), wide) < 1e-2


def test_a_dense_folder_and_a_stock_file_load_as_openai_whisper_itself(
    shaped: Path, file: Path, mel: torch.Tensor, tokens: torch.Tensor
) -> None:
    dense = pessa_cli.load_whisper(shaped)
    assert ragged(dense) == []
    theirs = WhisperForConditionalGeneration.from_pretrained(shaped).eval()
    with torch.no_grad():
        assert relative(dense(mel, tokens), theirs(input_features=mel, decoder_input_ids=tokens).logits) < 1e-5
        assert torch.equal(pessa_cli.load_whisper(file)(mel, tokens), whisper.load_model(str(file))(mel, tokens))


def test_buckets_cover_every_head_and_never_cost_more(compact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for site in open_model(compact).attention:
        buckets = buckets_of(site)
        assert sorted(head for bucket in buckets for head in bucket.heads) == list(range(HEADS))
        for bucket in buckets:
            assert all(site.qk_ranks[head] <= bucket.qk <= 32 for head in bucket.heads)
            assert all(site.vo_ranks[head] <= bucket.vo <= 32 for head in bucket.heads)
        assert sum(len(bucket.heads) * (bucket.qk + bucket.vo) for bucket in buckets) < HEADS * 64
    set_costs(monkeypatch, Cost(call=10**6, head=0, width=0, stored=1))  # then openai-whisper's own attention is faster
    assert ragged(pessa_cli.load_whisper(compact)) == []


# --- the stock file


def test_the_file_is_the_dense_model_bit_for_bit(compact: Path, file: Path, pessa: Pessa, place: Path) -> None:
    assert pessa("export", compact, "-o", place / "dense").code == 0
    stored = torch.load(file, weights_only=True)
    assert stored["dims"]["n_text_head"] == HEADS
    dense = raw_tensors(place / "dense")
    assert sorted(data for *_, data in dense.values()) == sorted(
        tensor.numpy().tobytes() for tensor in stored["model_state_dict"].values()
    )
    with open_source(str(file)) as folder:  # and read again, under pessa's names
        assert raw_tensors(folder) == dense
    model = whisper.load_model(str(file))
    assert (
        model.alignment_heads.to_dense().sum() == HEADS
    )  # for a path instead of a model name, openai-whisper takes the last half of the layers
    model.set_alignment_heads(stored["alignment_heads"])
    assert model.alignment_heads.to_dense().nonzero().tolist() == ALIGNMENT
    assert pessa_cli.load_whisper(compact).alignment_heads.to_dense().nonzero().tolist() == ALIGNMENT


def test_exporting_from_the_command_line(compact: Path, file: Path, pessa: Pessa, place: Path) -> None:
    before = snapshot(compact)
    arguments = ("export", compact, "--to", "openai-whisper", "-o", place / "new" / "out.pt")
    result = pessa(*arguments, "--json")
    assert result.code == 0, result
    assert json.loads(result.out)["to"] == "openai-whisper"
    assert (place / "new" / "out.pt").read_bytes() == file.read_bytes()  # every run writes the same bytes
    is_refusal(pessa(*arguments), "out.pt exists", "--force")
    assert pessa(*arguments, "--force").code == 0
    assert [path.name for path in (place / "new").iterdir()] == ["out.pt"]
    assert snapshot(compact) == before


def test_dtypes_stay(shaped: Path, place: Path) -> None:
    half = copy_of(shaped, place / "half")
    edit_weights(lambda tensors: tensors.update({name: t.half() for name, t in tensors.items()}))(half)
    export_openai(half, place / "half.pt")
    state = torch.load(place / "half.pt", weights_only=True)["model_state_dict"]
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}


REFUSED = {
    "nan": (
        edit_weights(lambda t: t["model.encoder.conv1.weight"].fill_(torch.nan)),
        ("model.encoder.conv1.weight", "NaN"),
    ),
    "untied": (
        edit_weights(lambda t: t.update({"proj_out.weight": -t["model.decoder.embed_tokens.weight"]})),
        ("proj_out.weight: differs from the embedding",),
    ),
    "key bias": (
        edit_weights(lambda t: t.update({"model.encoder.layers.0.self_attn.k_proj.bias": torch.ones(128)})),
        ("k_proj.bias: not part",),
    ),
    "missing": (edit_weights(lambda t: t.pop("model.encoder.layer_norm.bias")), ("layer_norm.bias: missing",)),
    "activation": (edit_json(lambda c: c.update(activation_function="relu")), ("activation_function: 'relu'",)),
    "a size as text": (edit_json(lambda c: c.update(encoder_layers="2")), ("encoder_layers is '2'",)),
    "endless": (edit_json(lambda c: c.update(encoder_layers=10**12)), ("encoder_layers is 1000000000000", "tensors")),
    "vocabulary": (edit_json(lambda c: c.update(vocab_size=51867)), ("vocab_size: 51867",)),
    "alignment": (
        edit_json(lambda c: c.update(alignment_heads=[[0, -1]]), "generation_config.json"),
        ("alignment_heads is [[0, -1]]",),
    ),
    "alignment a number": (
        edit_json(lambda c: c.update(alignment_heads=7), "generation_config.json"),
        ("alignment_heads is 7",),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_openai_whisper_cannot_represent_are_refused(
    case: str, shaped: Path, pessa: Pessa, place: Path
) -> None:
    change, says = REFUSED[case]
    model = copy_of(shaped, place / "model")
    change(model)
    before = snapshot(place)
    is_refusal(pessa("export", model, "--to", "openai-whisper", "-o", place / "out.pt"), *says)
    assert snapshot(place) == before
    with pytest.raises(PessaError):
        pessa_cli.load_whisper(model)


def test_another_architecture_is_refused(tiny_folder: TinyFolder, pessa: Pessa, place: Path) -> None:
    bert, small = tiny_folder("bert"), tiny_folder("whisper")
    is_refusal(pessa("export", bert, "--to", "openai-whisper", "-o", place / "out.pt"), "'bert'", "not 'whisper'")
    is_refusal(pessa("export", small, "--to", "openai-whisper", "-o", place / "out.pt"), "vocab_size: 100")


def test_invalid_destinations_are_refused(shaped: Path, file: Path, pessa: Pessa, place: Path) -> None:
    to = ("--to", "openai-whisper")
    model = copy_of(shaped, place / "model")
    before = snapshot(place)
    is_refusal(pessa("export", model, *to, "-o", place / "out"), "does not end in .pt", code=2)
    is_refusal(pessa("export", model, *to, "-o", place / "out.pt", "--resume"), "has no --resume", code=2)
    is_refusal(pessa("export", model, *to, "-o", place / "a.pt", "--layout", "compact"), "no --layout", code=2)
    is_refusal(pessa("export", model, *to, "-o", model / "out.pt"), "is inside", "only read")
    is_refusal(pessa("export", file, *to, "-o", file, "--force"), "cannot be replaced because the run reads from it")
    assert snapshot(place) == before
    (place / "notes.pt").write_text("not a model")
    is_refusal(pessa("export", model, *to, "-o", place / "notes.pt", "--force"), "not written by pessa")
    assert (place / "notes.pt").read_text() == "not a model"


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_and_the_old_file(shaped: Path, file: Path, place: Path) -> None:
    """A limit on the file size of the process stands in for a full disk."""
    old = place / "out.pt"
    old.write_bytes(file.read_bytes())
    before = snapshot(place)
    command = f"ulimit -f 2000; exec {PESSA} export {shaped} --to openai-whisper --force -o {old}"
    done = subprocess.run(["bash", "-c", f"trap '' XFSZ; {command}"], capture_output=True, text=True)
    assert done.returncode == 1, done
    assert f"error: {old} was not written" in done.stderr
    assert "hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert snapshot(place) == before


def test_two_runs_into_one_file(shaped: Path, place: Path) -> None:
    import fcntl

    partial = place / ".out.pt.partial"
    partial.mkdir()
    other = os.open(partial / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(PessaError, match="another run is writing"):
        export_openai(shaped, place / "out.pt")
    assert partial.exists()
    os.close(other)
    export_openai(shaped, place / "out.pt")
    assert sorted(path.name for path in place.iterdir()) == ["out.pt", "tmp"]


def test_a_source_that_changes_is_an_error(shaped: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy_of(shaped, place / "model")
    save = torch.save

    def touched(*arguments: Any) -> None:
        save(*arguments)
        os.utime(model / WEIGHTS, ns=(1, 1))

    monkeypatch.setattr(torch, "save", touched)
    with pytest.raises(PessaError, match="changed while it was read"):
        export_openai(model, place / "out.pt")
    assert sorted(path.name for path in place.iterdir()) == ["model", "tmp"]


def test_without_openai_whisper_the_extra_is_named(shaped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("runtime.openai_whisper", "compat.for_whisper"):
        monkeypatch.delitem(sys.modules, f"pessa_cli.{module}", raising=False)
    monkeypatch.setitem(sys.modules, "whisper.model", None)
    with pytest.raises(PessaError, match="openai-whisper cannot be imported") as raised:
        pessa_cli.load_whisper(shaped)
    assert raised.value.hint == "pip install 'pessa[whisper]'"


# --- the real model, on real speech


def test_the_real_model_transcribes_alike_in_both_libraries(
    real: Real, real_pruned: RealPruned, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transcribe() and transformers give equal tokens under greedy decoding, and word times equal the stock file's."""
    for name in ("backtrace", "dtw_cpu"):  # compiling them takes longer than running them in Python
        monkeypatch.setattr(timing, name, getattr(timing, name).py_func)
    source, out = real("whisper-tiny.en"), real_pruned("whisper-tiny.en", Rule(ratio=0.05))
    ours = pessa_cli.load_whisper(out)
    assert len(ragged(ours)) > 6
    theirs = WhisperForConditionalGeneration.from_pretrained(out, dtype=torch.float32).eval()
    # Padded to 30 s here, because transcribe() and transformers pad features differently.
    audio = whisper.pad_or_trim(load_audio(clip))
    processor = WhisperProcessor.from_pretrained(source)
    features = processor(audio, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
    expected = theirs.generate(features, do_sample=False, num_beams=1, return_timestamps=True, max_new_tokens=60)[0]
    options: dict[str, Any] = {"language": "en", "temperature": 0.0, "fp16": False}
    transcript = ours.transcribe(audio, word_timestamps=True, **options)
    tokens = [token for segment in transcript["segments"] for token in segment["tokens"]]
    assert tokens == expected.tolist()
    assert "Fail again" in transcript["text"]
    export_openai(out, tmp_path / "out.pt")
    stock = whisper.load_model(str(tmp_path / "out.pt"))
    guessed = stock.transcribe(audio, word_timestamps=True, **options)
    stock.set_alignment_heads(torch.load(tmp_path / "out.pt", weights_only=True)["alignment_heads"])
    known = stock.transcribe(audio, word_timestamps=True, **options)
    assert words(transcript) == words(known)
    # Negative controls: other alignment heads, and the unpruned model.
    assert words(transcript) != words(guessed)
    original = pessa_cli.load_whisper(source)
    decoded = original.decode(whisper.log_mel_spectrogram(audio), whisper.DecodingOptions(**options))
    assert decoded.tokens != expected.tolist()


def words(transcript: dict[str, Any]) -> list[tuple[str, float, float]]:
    found = [word for segment in transcript["segments"] for word in segment["words"]]
    return [(word["word"], float(word["start"]), float(word["end"])) for word in found]
