"""Conversion of CTranslate2 Whisper folders, which are written here from tiny transformers models.

The writer below was written from the format's description and shares no code with pessa's reader.
"""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import Real
from numpy.typing import NDArray
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.common.errors import PessaError
from pessa_cli.sources.ctranslate2 import convert, read_model
from pessa_cli.sources.open import open_source

Array = NDArray[Any]
DTYPE_NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
LANGUAGES = ["en", "zh", *(f"l{i}" for i in range(97))]


def specials() -> list[str]:
    names = ["endoftext", "startoftranscript", *LANGUAGES, "translate", "transcribe", "startoflm"]
    return [f"<|{name}|>" for name in [*names, "startofprev", "nospeech", "notimestamps"]]


def vocabulary(multilingual: bool) -> list[str]:
    """Return a vocabulary of the real size; the multilingual one has an empty token, as OpenAI's has."""
    text = [*sorted(ByteLevel.alphabet()), *(f"w{i}" for i in range(50_000))]
    return [*text, *[""] * multilingual, *specials(), *(f"<|{0.02 * i:.2f}|>" for i in range(1501))]


def tokenizer(tokens: list[str]) -> dict[str, object]:
    end = tokens.index("<|endoftext|>")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model: dict[str, object] = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "merges": []}
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    added = [{"id": end + i, "content": token, **flags} for i, token in enumerate(specials())]
    return {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": added,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {**model, **empty, "vocab": {token: index for index, token in enumerate(tokens[: end + 1])}},
    }


def source_model(multilingual: bool) -> WhisperForConditionalGeneration:
    """Return a tiny Whisper with float16 values; its encoder and decoder differ in every size that can differ."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=51865 if multilingual else 51864,
        num_mel_bins=128 if multilingual else 80,
        d_model=16,
        encoder_layers=2,
        decoder_layers=3 if multilingual else 2,
        encoder_attention_heads=2,
        decoder_attention_heads=4 if multilingual else 2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=40,
        max_source_positions=50,
        max_target_positions=32,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layer_norm" not in name:  # keep ones and zeros, since equal variables become aliases in the file
                parameter.normal_(0, 0.4)
    return model.half().float().eval()


def variables(model: WhisperForConditionalGeneration) -> dict[str, Array]:
    """Return the model's tensors under CTranslate2's names, with q, k and v stacked, and its scalars."""
    state: dict[str, Array] = {name: tensor.half().numpy() for name, tensor in model.state_dict().items()}
    found: dict[str, Array] = {"decoder/projection/weight": state["proj_out.weight"]}

    def linear(theirs: str, *ours: str) -> None:
        found[f"{theirs}/weight"] = np.concatenate([state[f"{name}.weight"] for name in ours])
        zero = np.zeros(model.config.d_model, np.float16)
        found[f"{theirs}/bias"] = np.concatenate([state.get(f"{name}.bias", zero) for name in ours])

    def norm(theirs: str, ours: str) -> None:
        found[f"{theirs}/gamma"], found[f"{theirs}/beta"] = state[f"{ours}.weight"], state[f"{ours}.bias"]

    for side in ("encoder", "decoder"):
        found[f"{side}/position_encodings/encodings"] = state[f"model.{side}.embed_positions.weight"]
        found[f"{side}/num_heads"] = np.array(getattr(model.config, f"{side}_attention_heads"), np.int16)
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for i in range(getattr(model.config, f"{side}_layers")):
            theirs, ours = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            norm(f"{theirs}/self_attention/layer_norm", f"{ours}.self_attn_layer_norm")
            linear(f"{theirs}/self_attention/linear_0", *(f"{ours}.self_attn.{kind}_proj" for kind in "qkv"))
            linear(f"{theirs}/self_attention/linear_1", f"{ours}.self_attn.out_proj")
            if side == "decoder":
                norm(f"{theirs}/attention/layer_norm", f"{ours}.encoder_attn_layer_norm")
                linear(f"{theirs}/attention/linear_0", f"{ours}.encoder_attn.q_proj")
                linear(f"{theirs}/attention/linear_1", *(f"{ours}.encoder_attn.{kind}_proj" for kind in "kv"))
                linear(f"{theirs}/attention/linear_2", f"{ours}.encoder_attn.out_proj")
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for name in ("conv1", "conv2"):
        linear(f"encoder/{name}", f"model.encoder.{name}")
    found["decoder/embeddings/weight"] = state["model.decoder.embed_tokens.weight"]
    for name, value in (("activation", 3), ("alibi", 0), ("pre_norm", 1), ("scale_embeddings", 0)):
        found[f"decoder/{name}"] = np.array(value, np.int8)
    found["decoder/start_from_zero_embedding"] = np.array(0, np.int8)
    found["decoder/alignment_heads"], found["decoder/alignment_layer"] = np.array(1, np.int16), np.array(-1, np.int16)
    return found


def write(
    path: Path, found: dict[str, Array], version: int = 6, spec: str = "WhisperSpec", revision: int = 3
) -> list[int]:
    """Write a model.bin with equal arrays as aliases; returns the offset of each variable's data."""

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    stored: dict[str, Array] = {}
    aliases: dict[str, str] = {}
    for name, array in sorted(found.items()):
        kept = first.setdefault((array.dtype.name, array.shape, array.tobytes()), name) if array.shape else name
        if kept == name:
            stored[name] = array
        else:
            aliases[name] = kept
    content = struct.pack("<I", version) + string(spec) + struct.pack("<II", revision, len(stored))
    starts: list[int] = []
    for name, array in stored.items():
        content += string(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        content += struct.pack("<BI", DTYPE_NUMBERS[array.dtype.name], array.nbytes)
        starts.append(len(content))
        content += array.tobytes()
    content += struct.pack("<I", len(aliases))
    path.write_bytes(content + b"".join(string(alias) + string(name) for alias, name in aliases.items()))
    return starts


@dataclass(frozen=True)
class Case:
    multilingual: bool
    model: WhisperForConditionalGeneration
    folder: Path
    converted: Path
    starts: list[int]

    def copy(self, into: Path) -> Path:
        return Path(shutil.copytree(self.folder, into / "whisper"))


def make(multilingual: bool, folder: Path, converted: Path) -> Case:
    tokens = vocabulary(multilingual)
    (folder / "vocabulary.txt").write_text("".join(f"{token}\n" for token in tokens), encoding="utf-8")
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)), encoding="utf-8")
    theirs = {"alignment_heads": [[1, 0], [1, 1]], "lang_ids": [], "suppress_ids": [1, 2], "suppress_ids_begin": [220]}
    (folder / "config.json").write_text(json.dumps(theirs))
    model = source_model(multilingual)
    starts = write(folder / "model.bin", variables(model))
    convert(folder, converted)
    return Case(multilingual, model, folder, converted, starts)


@pytest.fixture(scope="module")
def english(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(False, tmp_path_factory.mktemp("english"), tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(True, tmp_path_factory.mktemp("multilingual"), tmp_path_factory.mktemp("converted"))


@pytest.fixture(params=["english", "multilingual"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def logits(model: WhisperForConditionalGeneration) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(2, model.config.num_mel_bins, 100, generator=generator)
    with torch.no_grad():
        result: torch.Tensor = model(input_features=features, decoder_input_ids=torch.arange(18).view(2, 9)).logits
    return result


def test_logits_equal_the_source(case: Case) -> None:
    loaded, report = WhisperForConditionalGeneration.from_pretrained(
        case.converted, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    assert torch.equal(logits(loaded.eval()), logits(case.model))
    with torch.no_grad():  # negative control: the comparison detects one changed weight
        loaded.model.decoder.layers[1].encoder_attn.v_proj.weight[3, 5] += 0.1
    assert not torch.equal(logits(loaded), logits(case.model))


def test_weights_are_those_that_transformers_saves(case: Case, tmp_path: Path) -> None:
    case.model.half().save_pretrained(tmp_path)
    case.model.float()
    theirs, ours = CheckpointReader(tmp_path), CheckpointReader(case.converted)
    assert dict(theirs.header) == dict(ours.header)
    assert all(torch.equal(theirs.get(name), ours.get(name)) for name in theirs.header)
    kinds = ("_layers", "_heads", "_dim", "_positions", "_bins", "_size", "d_model", "architectures", "dtype", "_type")
    same = [key for key in theirs.config if key.endswith(kinds) and key != "classifier_proj_size"]
    assert len(same) > 12
    assert {key: ours.config.get(key) for key in same} == {key: theirs.config[key] for key in same}


def test_processor_and_generation(case: Case) -> None:
    processor = WhisperProcessor.from_pretrained(case.converted)
    model = WhisperForConditionalGeneration.from_pretrained(case.converted, dtype=torch.float32)
    text, extractor = processor.tokenizer, processor.feature_extractor
    end = 50257 if case.multilingual else 50256
    assert (text.eos_token_id, text.pad_token_id, len(text)) == (end, end, model.config.vocab_size)
    assert text.convert_tokens_to_ids(["<|0.00|>", "<|30.00|>"]) == [end + 107, end + 1607]
    assert text.all_special_ids[-1] == end + 106  # <|notimestamps|>: transformers counts timestamps from the next id
    assert text("hé<|1.00|>", add_special_tokens=False).input_ids[-1] == end + 157
    spoken = [end + 107, *text("hé", add_special_tokens=False).input_ids, end + 157]
    assert text.decode(spoken, skip_special_tokens=True) == "hé"
    assert text.decode(spoken, decode_with_timestamps=True) == "<|0.00|>hé<|1.00|>"
    assert (extractor.feature_size, extractor.n_samples) == (model.config.num_mel_bins, 16_000)
    generation = model.generation_config
    assert generation.is_multilingual == case.multilingual
    assert generation.suppress_tokens == [1, 2]
    assert generation.alignment_heads == [[1, 0], [1, 1]]
    assert (generation.prev_sot_token_id, generation.no_timestamps_token_id) == (end + 104, end + 106)
    inputs = processor(np.zeros(16_000, np.float32), sampling_rate=16_000, return_tensors="pt")
    told = {"max_new_tokens": 3, "return_dict_in_generate": True, "force_unique_generate_call": True}
    prompt = model.generate(**inputs, **told).sequences[0].tolist()
    if case.multilingual:
        assert generation.lang_to_id["<|zh|>"] == end + 3
        assert len(generation.lang_to_id) == 99
        assert prompt[1] in generation.lang_to_id.values()
        assert [prompt[0], *prompt[2:4]] == [end + 1, generation.task_to_id["transcribe"], end + 106]
    else:
        assert prompt[:2] == [end + 1, end + 106]


def test_vocabulary_as_json_and_an_untied_projection(case: Case, tmp_path: Path) -> None:
    folder = case.copy(tmp_path)
    tokens = (folder / "vocabulary.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    (folder / "vocabulary.txt").unlink()
    (folder / "vocabulary.json").write_text(json.dumps(tokens))
    found = variables(case.model)
    found["decoder/projection/weight"] = found["decoder/projection/weight"] * np.float16(2)
    write(folder / "model.bin", found)
    convert(folder, tmp_path / "out")
    loaded = WhisperForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    assert torch.equal(logits(loaded), 2 * logits(case.model))
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (case.converted / "tokenizer.json").read_bytes()


def test_float32_stays_float32(english: Case, tmp_path: Path) -> None:
    folder = english.copy(tmp_path)
    found = variables(english.model)
    write(folder / "model.bin", {k: v.astype(np.float32) if v.shape else v for k, v in found.items()})
    convert(folder, tmp_path / "out")
    assert {info.dtype for info in CheckpointReader(tmp_path / "out").header.values()} == {"F32"}


def test_truncated_anywhere(english: Case, tmp_path: Path) -> None:
    path = english.copy(tmp_path) / "model.bin"
    size = path.stat().st_size
    cuts = {0, *range(1, 200, 7), *range(size - 300, size), *np.linspace(1, size - 1, 50, dtype=int).tolist()}
    cuts |= {start + offset for start in english.starts for offset in (-9, -4, -1, 0, 1)}
    for cut in sorted(cuts, reverse=True):
        with path.open("r+b") as file:
            file.truncate(cut)
        with pytest.raises(PessaError, match=r"model\.bin"):
            read_model(path)


def test_garbage_is_refused(english: Case, tmp_path: Path) -> None:
    path, rng = english.copy(tmp_path) / "model.bin", random.Random(0)
    good = path.read_bytes()
    near = [start + offset for start in english.starts for offset in range(-30, 0)]
    outcomes = set()
    for _ in range(1500):
        place, value = rng.choice([*range(40), *near]), rng.randrange(256)
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([value]))
        try:
            read_model(path)
            outcomes.add("read")
        except PessaError:
            outcomes.add("refused")
        with path.open("r+b") as file:
            file.seek(place)
            file.write(good[place : place + 1])
    assert outcomes == {"read", "refused"}
    path.write_bytes(rng.randbytes(5000))
    with pytest.raises(PessaError, match="binary version"):
        read_model(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(PessaError, match="after its last entry"):
        read_model(path)


def edit(name: str, change: Callable[[Array], Array]) -> Callable[[dict[str, Array]], None]:
    def edited(found: dict[str, Array]) -> None:
        found[name] = change(found[name].copy())

    return edited


def with_bias(array: Array) -> Array:
    array[20] = np.float16(1e-4)  # row 20 of 16 q, 16 k, 16 v, or of 16 k, 16 v
    return array


SELF, CROSS = "decoder/layer_1/self_attention/linear_0", "decoder/layer_1/attention/linear_1"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(f"{SELF}/bias", with_bias), r"key biases.*\n.*layers\.1\.self_attn\.k_proj\.bias$"),
        (edit(f"{CROSS}/bias", lambda a: with_bias(a[::-1])[::-1]), r"key biases.*\n.*encoder_attn\.k_proj\.bias$"),
        (edit(f"{SELF}/weight", lambda a: a.astype(np.int8)), f"quantised: {SELF}/weight is int8"),
        (
            edit(f"{SELF}/weight", lambda a: a[:-1]),
            rf"\n  {SELF}/weight: shape \(47, 16\), expected \(48, 16\)",
        ),
        (
            edit("decoder/num_heads", lambda _: np.array(3, np.int16)),
            "3 heads, which do not divide its width of 16 evenly",
        ),
        (edit("decoder/alibi", lambda _: np.array(1, np.int8)), "decoder/alibi: 1, expected 0"),
        (lambda found: found.pop(f"{SELF}/bias"), f"{SELF}/bias: missing"),
        (lambda found: found.pop("encoder/conv1/weight"), "has no encoder/conv1/weight"),
        (lambda found: found.update({"encoder/layer_0/low_rank": np.ones(2, np.float16)}), "low_rank: not part"),
        (lambda found: found.update({"encoder/layer_5/a": np.ones(2, np.float16)}), "layer_5/a: not part"),
    ],
)
def test_other_models_are_refused(
    english: Case, tmp_path: Path, change: Callable[[dict[str, Array]], object], message: str
) -> None:
    folder, found = english.copy(tmp_path), variables(english.model)
    change(found)
    write(folder / "model.bin", found)
    with pytest.raises(PessaError, match=message) as caught:
        convert(folder, tmp_path / "out")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"spec": "TransformerSpec"}, "holds a TransformerSpec, revision 3, but pessa reads WhisperSpec, revision 3"),
        ({"revision": 2}, "holds a WhisperSpec, revision 2"),
        ({"version": 5}, "binary version 5, but pessa reads 6"),
    ],
)
def test_other_formats_are_refused(tmp_path: Path, header: dict[str, int], message: str) -> None:
    write(tmp_path / "model.bin", {}, **header)  # type: ignore[arg-type]
    (tmp_path / "vocabulary.txt").touch()
    with pytest.raises(PessaError, match=message), open_source(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vocabulary.txt", "a\nb\n", "holds 2 tokens, but the embedding has 51,864 rows"),
        ("vocabulary.txt", "a\n" * 51_864, "not the vocabulary of a Whisper model: it lacks <|endoftext|>"),
        ("vocabulary.txt", None, "vocabulary.json is not a readable vocabulary"),
        ("tokenizer.json", None, "tokenizer.json does not exist"),
        ("tokenizer.json", "{}", "not a tokenizer with a vocabulary"),
        ("tokenizer.json", json.dumps(tokenizer(vocabulary(True))), "belongs to another model"),
        ("config.json", None, "config.json does not exist"),
        ("config.json", '{"suppress_ids": [51864]}', "suppress_ids is not a list of token ids below 51864"),
        ("config.json", '{"alignment_heads": [[0, -2]]}', "alignment_heads is [[0, -2]]"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_side_files_must_fit(english: Case, tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = english.copy(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(PessaError) as caught:
        convert(folder, tmp_path / "out")
    assert message in caught.value.message
    assert caught.value.hint


def test_open_source(english: Case, tmp_path: Path) -> None:
    with open_source(str(english.converted)) as folder:
        assert folder == english.converted
    with open_source(str(english.folder)) as folder:
        assert CheckpointReader(folder).config["vocab_size"] == 51864
        assert folder != english.folder
    assert not folder.exists()
    with pytest.raises(PessaError, match="nowhere does not exist"), open_source(str(tmp_path / "nowhere")):
        pass
    with pytest.raises(PessaError, match=r"model\.bin does not exist"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(PessaError, match=r"model\.bin is a file"), open_source(str(english.folder / "model.bin")):
        pass


def test_real_whisper_transcribes(real: Real, clip: Path) -> None:
    import soundfile

    folder = real("whisper-tiny.en")
    processor = WhisperProcessor.from_pretrained(folder)
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    samples, rate = soundfile.read(clip, dtype="float32")
    inputs = processor(samples, sampling_rate=rate, return_tensors="pt")
    heard = processor.decode(model.generate(**inputs)[0], skip_special_tokens=True)
    assert heard == " Ever tried, ever failed. No matter, try again. Fail again. Fail better."
    timed = model.generate(**inputs, return_timestamps=True)[0].tolist()
    segments = processor.decode(timed, skip_special_tokens=True, output_offsets=True)["offsets"]
    assert [segment["text"].strip().lower() for segment in segments][2:] == ["fail again.", "fail better."]
    assert segments[-1]["timestamp"][1] == pytest.approx(9.5, abs=1)
    inputs = processor(samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)
    spoken_at = model.generate(**inputs, return_token_timestamps=True)["token_timestamps"][0]
    assert 0 < spoken_at[3] < 4 < 8 < spoken_at[-2] < 10  # token timestamps come from the alignment heads
    assert (spoken_at.diff() >= 0).all()
