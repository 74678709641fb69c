"""Compact models with the features of transformers, compared with the dense layout.

Each test has a control: the same measure tells the pruned model from the original.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from harness import RealPruned, TinyFolder
from tiny import close, load
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from pessa_cli.blocks.compact_format import LOAD_HINT
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import open_model

Pruned = Callable[..., Path]
Three = tuple[Any, Any, Any]  # dense, compact, original
DECODERS = ("whisper", "llama", "llama-biased")
AUTO = {"whisper": "AutoModelForSpeechSeq2Seq", "bert": "AutoModelForMaskedLM", "llama": "AutoModelForCausalLM"}


@pytest.fixture(scope="module", autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.fixture
def three(pruned: Pruned, tiny_folder: TinyFolder) -> Callable[..., Three]:
    """`three("whisper", dtype=...)` returns the dense model, the compact model and the original."""

    def get(name: str, **options: Any) -> Three:
        folders = pruned(name, "dense"), pruned(name, "compact"), tiny_folder(name)
        dense, compact, original = (load(folder, **options) for folder in folders)
        return dense, compact, original

    return get


def prompt(model: Any) -> dict[str, torch.Tensor]:
    """Return inputs for `generate`; the second text is shorter and padded on the left."""
    inputs = {name: value for name, value in tiny.inputs(model).items() if name != "decoder_input_ids"}
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    return inputs


def told_apart(results: Any) -> None:
    """Assert that dense and compact give the same result, and the original another one."""
    dense, compact, original = results
    assert dense == compact
    assert dense != original


# Loading


@pytest.mark.parametrize("name", AUTO)
@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "auto"},
        {"dtype": torch.bfloat16},
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}, "dtype": torch.float16},
        {"low_cpu_mem_usage": True},
        {"use_safetensors": True, "local_files_only": True},
    ],
    ids=["dtype auto", "bfloat16", "device_map auto", "device_map and float16", "low memory", "safetensors"],
)
def test_the_auto_class_loads_it(name: str, options: dict[str, Any], pruned: Pruned, tiny_folder: TinyFolder) -> None:
    kind = getattr(transformers, AUTO[name])
    folders = pruned(name, "dense"), pruned(name, "compact"), tiny_folder(name)
    dense, compact, original = (kind.from_pretrained(folder, **options).eval() for folder in folders)
    assert compact.num_parameters() < dense.num_parameters()
    assert {p.dtype for p in compact.parameters()} == {p.dtype for p in dense.parameters()}
    tolerance = 1e-5 if compact.dtype == torch.float32 else 5e-2
    assert close(dense, compact, tolerance)
    assert not close(original, compact, 0.3)


def test_parts_of_the_model_can_be_offloaded_to_disk(
    pruned: Pruned, three: Callable[..., Three], tmp_path: Path
) -> None:
    where = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    where |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    waiting = load(pruned("llama"), device_map=where, offload_folder=tmp_path)
    assert {p.device.type for p in waiting.model.layers[1].self_attn.parameters()} == {"meta"}
    dense, _, original = three("llama")
    assert close(dense, waiting)
    assert not close(original, waiting)


def test_loading_never_allocates_a_full_projection(pruned: Pruned, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is on the meta device until its ragged layers are in place, which then receive the file's tensors."""
    from transformers.quantizers.base import HfQuantizer

    seen: set[str] = set()
    swap = HfQuantizer.preprocess_model

    def watched(self: Any, model: Any, **options: Any) -> Any:
        seen.update(parameter.device.type for parameter in model.parameters())
        return swap(self, model, **options)

    monkeypatch.setattr(HfQuantizer, "preprocess_model", watched)
    load(pruned("whisper"))
    assert seen == {"meta"}


# Without pessa


def without_pessa(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code in a process that does not import pessa_cli."""
    command = [sys.executable, "-c", f"import sys, transformers\n{code}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_without_the_import_the_error_tells_what_to_do(pruned: Pruned, tiny_folder: TinyFolder, tmp_path: Path) -> None:
    """All loading functions and architectures are tried in one process, also for folders that save_pretrained wrote."""
    code = """
folders = sys.argv[1:]
auto = transformers.AutoModel, transformers.AutoModelForCausalLM
for folder in folders:
    kind = getattr(transformers, transformers.AutoConfig.from_pretrained(folder).architectures[0])
    task = {"w": "automatic-speech-recognition", "b": "fill-mask", "l": "text-generation"}[kind.__name__[0].lower()]
    for load in (
        kind.from_pretrained,
        transformers.AutoModel.from_pretrained,
        lambda folder: kind.from_pretrained(folder, ignore_mismatched_sizes=True),
        lambda folder: transformers.pipeline(task, folder),
    ):
        try:
            load(folder)
        except Exception as error:
            print(type(error).__name__, "install pessa, and `import pessa_cli`" in str(error))
        else:
            print("loaded")
assert "pessa_cli" not in sys.modules
"""
    load(pruned("bert")).save_pretrained(tmp_path / "again")
    folders = [*(pruned(name) for name in tiny.NAMES), tmp_path / "again"]
    done = without_pessa(code, *folders)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:-1] == ["ValueError True"] * 4 * len(folders)
    control = without_pessa(code, pruned("bert", "dense"), tiny_folder("whisper"))
    assert control.returncode == 0, control.stderr
    assert control.stdout.split("\n")[:3] == ["loaded"] * 3


@pytest.mark.slow
def test_without_the_import_a_chosen_attention_is_also_an_error(pruned: Pruned) -> None:
    """Then transformers ignores pessa's hint, but still fails because of the shapes, and names pessa in a warning."""
    code = "transformers.AutoModel.from_pretrained(sys.argv[1], attn_implementation='eager')"
    done = without_pessa(code, pruned("bert"))
    assert done.returncode != 0
    assert "Unknown quantization type, got pessa" in done.stderr
    assert "MISMATCH" in done.stderr


def test_the_hint_is_in_compact_folders_only(pruned: Pruned, tmp_path: Path) -> None:
    assert tiny.read_config(pruned("llama"))["attn_implementation"] == LOAD_HINT
    assert "attn_implementation" not in tiny.read_config(pruned("llama", "dense"))
    export_model(open_model(pruned("llama")), tmp_path / "dense", "dense")
    assert "attn_implementation" not in tiny.read_config(tmp_path / "dense")
    model = load(pruned("llama"))
    assert model.config._attn_implementation == "sdpa"
    model.save_pretrained(tmp_path / "again")
    assert tiny.read_config(tmp_path / "again")["attn_implementation"] == LOAD_HINT
    assert close(model, load(tmp_path / "again"), 1e-7)


# Attention


@pytest.mark.parametrize("name", tiny.NAMES)
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_attention_implementations(name: str, attention: str, three: Callable[..., Three]) -> None:
    dense, compact, original = three(name, attn_implementation=attention)
    assert compact.config._attn_implementation == attention
    with torch.compiler.set_stance("force_eager"):  # compiling flex for tiny matrices takes minutes
        assert close(dense, compact)
        assert not close(original, compact)


def test_the_implementation_can_change_after_loading(three: Callable[..., Three]) -> None:
    dense, compact, _ = three("whisper")
    for attention in ("eager", "sdpa"):
        compact.set_attn_implementation(attention)
        assert close(dense, compact)


@pytest.mark.parametrize("name", ["whisper", "bert", "llama"])
def test_attention_weights(name: str, three: Callable[..., Three]) -> None:
    with torch.no_grad():
        found = [m(**tiny.inputs(m), output_attentions=True) for m in three(name, attn_implementation="eager")]
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions") if name == "whisper" else ("attentions",)
    for key in names:
        dense, compact, original = (torch.stack(getattr(output, key)) for output in found)
        assert torch.allclose(dense, compact, atol=1e-5)
        if name != "llama":  # under RoPE its scores are not pruned
            assert not torch.allclose(original[0], compact[0], atol=1e-2)


# Generation


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 3, "cache_implementation": "static"},
        {"do_sample": True},
        {"do_sample": True, "num_beams": 2, "top_k": 20},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prompt_lookup_num_tokens": 2, "batch": 1},
        {"num_return_sequences": 2, "num_beams": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: " ".join(options) or "greedy",
)
def test_generation(name: str, options: dict[str, Any], three: Callable[..., Three]) -> None:
    options = dict(options)
    batch = options.pop("batch", 2)
    written = []
    for model in three(name):
        torch.manual_seed(5)
        inputs = {key: value[:batch] for key, value in prompt(model).items()}
        written.append(model.generate(**inputs, max_new_tokens=12, **options).tolist())
    told_apart(written)


@pytest.mark.parametrize("static", [False, True])
def test_explicit_caches(static: bool, three: Callable[..., Three]) -> None:
    from transformers import DynamicCache, EncoderDecoderCache, StaticCache

    def cache(model: Any) -> Any:
        if static:
            return StaticCache(config=model.config, max_cache_len=40)
        return DynamicCache(config=model.config)

    written = []
    for model in three("llama"):
        inputs, given = prompt(model), cache(model)
        first = model.generate(**inputs, max_new_tokens=6, past_key_values=given)
        # The next turn of the conversation continues with the same cache.
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, first.shape[1] - 9), value=1)
        again = model.generate(first, attention_mask=mask, max_new_tokens=6, past_key_values=given)
        written.append((first.tolist(), again.tolist()))
    told_apart(written)
    written = []
    for model in three("whisper"):
        both = EncoderDecoderCache(cache(model), DynamicCache(config=model.config))
        written.append(model.generate(**prompt(model), max_new_tokens=12, past_key_values=both).tolist())
    told_apart(written)


def test_decoding_step_by_step_equals_one_pass(three: Callable[..., Three]) -> None:
    """Whisper's decoder gives the same with a cache, including the encoder's keys and values, as without."""
    _, compact, _ = three("whisper")
    inputs = tiny.inputs(compact)
    ids = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        expected = compact(**inputs, decoder_input_ids=ids, use_cache=False).logits
        heard, cache, found = compact.get_encoder()(inputs["input_features"]), None, []
        for i in range(ids.shape[1]):
            out = compact(
                encoder_outputs=heard, decoder_input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            found.append(out.logits)
    assert torch.allclose(torch.cat(found, dim=1), expected, atol=1e-4)


# Pipelines


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Return a tokenizer with the words w0 to w99 for the tiny text models."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(100)}, unk_token="w4"))
    words.pre_tokenizer = Whitespace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", bos_token="w1", eos_token="w2", mask_token="w3", unk_token="w4"
    )


def test_the_text_generation_pipeline(pruned: Pruned, tiny_folder: TinyFolder, tokenizer: Any) -> None:
    def write(folder: Path) -> Any:
        return transformers.pipeline("text-generation", str(folder), tokenizer=tokenizer)(
            ["w9 w8 w7 w6", "w30 w31"], max_new_tokens=8, do_sample=False, batch_size=2
        )

    told_apart([write(f) for f in (pruned("llama", "dense"), pruned("llama"), tiny_folder("llama"))])


def test_the_fill_mask_pipeline(pruned: Pruned, tiny_folder: TinyFolder, tokenizer: Any) -> None:
    def fill(folder: Path) -> Any:
        found = transformers.pipeline("fill-mask", str(folder), tokenizer=tokenizer)("w9 w8 w3 w6 w20")
        return [guess["token"] for guess in found]

    told_apart([fill(f) for f in (pruned("bert", "dense"), pruned("bert"), tiny_folder("bert"))])


@pytest.fixture(scope="module")
def speech(real_pruned: RealPruned) -> tuple[Path, Path]:
    """Whisper tiny.en pruned by a tenth, dense and compact."""
    rule = Rule(ratio=0.1)
    return real_pruned("whisper-tiny.en", rule, "dense"), real_pruned("whisper-tiny.en", rule)


@pytest.mark.parametrize(
    "options",
    [{}, {"return_timestamps": "word"}, {"return_timestamps": True, "chunk_length_s": 6}],
    ids=["plain", "words", "chunks"],
)
def test_the_speech_pipeline(speech: tuple[Path, Path], clip: Path, options: dict[str, Any]) -> None:
    samples = load_audio(clip)
    heard = []
    for folder in speech:
        listen = transformers.pipeline("automatic-speech-recognition", str(folder), dtype=torch.float32)
        heard.append(listen({"raw": samples, "sampling_rate": SAMPLE_RATE}, **options))
    assert heard[0] == heard[1]
    assert "try again" in heard[0]["text"].lower()
    if options.get("return_timestamps") == "word":
        ends = [chunk["timestamp"][1] for chunk in heard[0]["chunks"]]
        assert len(ends) > 10
        assert ends == sorted(ends)
        assert len(set(ends)) > 10


# Training, compiling


@pytest.mark.parametrize("name", ["whisper", "bert", "llama"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool, three: Callable[..., Three]) -> None:
    """Loss and gradients are the same with and without checkpointing, and the loss is the dense model's."""
    dense, compact, original = (model.train() for model in three(name))
    inputs = tiny.inputs(compact)
    inputs["labels"] = inputs["decoder_input_ids" if name == "whisper" else "input_ids"]
    dropout = [module for module in compact.modules() if isinstance(module, torch.nn.Dropout)]
    for module in dropout:
        module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        compact.zero_grad()
        if checkpointed:
            compact.gradient_checkpointing_enable({"use_reentrant": reentrant})
            compact.enable_input_require_grads()
        loss = compact(**inputs, use_cache=False).loss if name != "bert" else compact(**inputs).loss
        loss.backward()
        gradients.append({key: p.grad.clone() for key, p in compact.named_parameters() if p.grad is not None})
        with torch.no_grad():
            assert torch.allclose(loss, dense.eval()(**inputs).loss, atol=1e-4)
            assert not torch.allclose(loss, original.eval()(**inputs).loss, atol=1e-3)
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(value, gradients[1][key], atol=1e-5) for key, value in gradients[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper", "bert", "llama"])
def test_torch_compile(name: str, three: Callable[..., Three]) -> None:
    """The model compiles to one graph without breaks."""
    dense, compact, original = three(name)
    compiled = torch.compile(compact, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        inputs = tiny.inputs(compact)
        found = compiled(**inputs).logits
        assert torch.allclose(found, dense(**inputs).logits, atol=1e-4)
        assert not torch.allclose(found, original(**inputs).logits, atol=1e-2)
        half = {key: value[:1] for key, value in inputs.items()}
        assert torch.allclose(compiled(**half).logits, compact(**half).logits, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["whisper", "bert", "llama"])
def test_the_trainer(name: str, pruned: Pruned, three: Callable[..., Three], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    dense, compact, _ = three(name)
    inputs = tiny.inputs(compact)
    inputs["labels"] = inputs["decoder_input_ids" if name == "whisper" else "input_ids"]
    rows = [{key: value[i % 2] for key, value in inputs.items()} for i in range(8)]
    losses = []
    for model, folder in ((dense, "dense"), (compact, "compact")):
        arguments = TrainingArguments(
            str(tmp_path / folder),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=2e-2,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_steps=6,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            gradient_checkpointing=folder == "compact",
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[1][-1] < losses[1][0]
    if name == "llama":  # the other models have dropout
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    again = load(tmp_path / "compact" / "checkpoint-6")
    assert close(compact.eval(), again, 1e-6)
    assert not close(load(pruned(name)), again)
    assert [s.vo_ranks for s in open_model(tmp_path / "compact" / "checkpoint-6").attention] == [
        s.vo_ranks for s in open_model(pruned(name)).attention
    ]
