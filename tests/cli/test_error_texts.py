"""Every kind of error that a user can meet, with one example of its text: who is to blame, what to do, which exit code.

EXAMPLES is the list: at least one for every module that raises an error. Each is provoked for real, in this process, on
tiny models. Looked for are the parts of a message that stay when it is reworded: names, numbers, options, commands.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import raising
import soundfile
import tiny
import torch
import transformers
from harness import (
    WEIGHTS,
    Pessa,
    TinyFolder,
    copy_of,
    edit_json,
    edit_weights,
    is_refusal,
    snapshot,
)
from peft import get_peft_model
from tuned import sums, with_tokenizer, write_lines

import pessa_cli
from pessa_cli.checkpoint.reader import TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.packages import need
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.word_errors import WordErrors
from pessa_cli.models.hooks import block_modules
from pessa_cli.models.inputs import random_signal
from pessa_cli.sources.openai_tokenizer import get_encoding
from pessa_cli.sources.whisper_folder import read_vocabulary
from pessa_cli.surgery.model import open_model
from pessa_cli.tuning.registry import build_config
from pessa_cli.tuning.tuner_sorsa import regularizer

Change = Callable[[Path], object]
CT2 = ("model.bin", "vocabulary.json")
STORY = "the keeper lit the lamp on the ninth of march, and it burned until three sails came home. " * 3


@dataclass(frozen=True)
class Example:
    """An error: the command line that ends in it, or a call; what its text must name; the exit code.

    change: what is done before to the folder that has the models. missing: a package that is as if not installed, with
    the module of ours to be imported anew. hint: whether there is one; the reason of those without is in HINTLESS.
    """

    run: str | Callable[[Path], object]
    says: tuple[str, ...]
    code: int = 1
    change: Change = lambda _: None
    missing: tuple[str, ...] = ()
    hint: bool = True


def usage(run: str | Callable[[Path], object], *says: str, **more: Any) -> Example:
    return Example(run, says, 2, **more)


def failure(run: str | Callable[[Path], object], *says: str, **more: Any) -> Example:
    return Example(run, says, 1, **more)


def within(name: str, change: Change) -> Change:
    return lambda place: change(place / name)


def config(name: str, **values: Any) -> Change:
    return within(name, edit_json(lambda content: content.update(values)))


def write(name: str, content: str | bytes) -> Change:
    def change(place: Path) -> None:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return within(name, edit_weights(change))


def openai_file(place: Path) -> None:
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": {}}, place / "mine.pt")


def huge(tensors: dict[str, torch.Tensor]) -> None:
    """So large that no float64 holds a product of two of them."""
    for name in list(tensors):
        tensors[name] = tensors[name].double() * (1e200 if "self_attn" in name else 1)


def written_twice(place: Path) -> None:
    header = {"a": TensorInfo("F32", (1,))}
    with CheckpointWriter(place / "whisper", {WEIGHTS: header}, {}) as writer:
        writer.put("b", torch.ones(1))


def tuned_with_lora(place: Path) -> None:
    regularizer(get_peft_model(tiny.load(place / "llama"), build_config("lora", 2, ["q_proj"])))


Q0 = "model.encoder.layers.0.self_attn.q_proj.weight"
EXAMPLES: Mapping[str, Example] = {
    # Models: what is there at all, and where it is from.
    "no such model": failure("inspect nowhere", "nowhere", "owner/name"),
    "a file as a model": failure("inspect words.txt", "words.txt", ".pt"),
    "a revision of a folder": usage("inspect whisper --revision main", "--revision", "whisper"),
    "a name with two meanings": usage("inspect whisper-large", "whisper-large", "large-v3"),
    "no config": failure(
        "inspect whisper", "whisper/config.json", change=lambda p: (p / "whisper/config.json").unlink()
    ),
    "config not JSON": failure("inspect whisper", "whisper/config.json", change=write("whisper/config.json", "{")),
    "cut off": failure("inspect whisper", WEIGHTS, "100", change=write(f"whisper/{WEIGHTS}", b"\xff" * 100)),
    "an unknown architecture": failure(
        "inspect llama", "'mystery'", "--as llama", change=config("llama", model_type="mystery")
    ),
    "an architecture that nobody knows": usage("inspect llama --as gpt9", "gpt9", "pessa architectures"),
    "an impossible number of heads": failure(
        "inspect whisper", "encoder_attention_heads", "'4'", change=config("whisper", encoder_attention_heads="4")
    ),
    "quantised": failure(
        "inspect whisper", "gptq", change=config("whisper", quantization_config={"quant_method": "gptq"})
    ),
    "not finite": failure(
        "prune whisper -o out", Q0, "1 NaN", change=weights("whisper", lambda t: t[Q0].view(-1)[3].fill_(torch.nan))
    ),
    "not finite, outside of attention": failure(
        "prune llama -o out",
        "model.norm.weight",
        "NaN",
        change=weights("llama", lambda t: t["model.norm.weight"][3].fill_(torch.nan)),
    ),
    "too large to multiply": failure("prune llama -o out", "float64", "1e+150", change=weights("llama", huge)),
    "spectra of nothing": failure(
        "inspect whisper", "spectra.safetensors", "decompose", change=write("whisper/spectra.safetensors", "x")
    ),
    "CTranslate2, damaged": failure(
        "inspect ct2", "ct2/model.bin", change=lambda p: [write(f"ct2/{name}", b"\6\0\0\0")(p) for name in CT2]
    ),
    "GGUF, damaged": failure("inspect x.gguf", "x.gguf", change=write("x.gguf", b"GGUF\3\0\0\0")),
    "GGUF without its package": failure(
        "inspect x.gguf", "gguf", "pip install", change=write("x.gguf", b"GGUF\3\0\0\0"), missing=("gguf",)
    ),
    "no openai-whisper checkpoint": failure("inspect mine.pt", "mine.pt", "n_vocab", change=openai_file),
    "a vocabulary of nobody": failure(lambda p: get_encoding(p / "mine.pt", 100), "mine.pt", "100"),
    "a vocabulary of another size": failure(
        lambda p: read_vocabulary(p / "ct2", 9), "vocabulary.json", "9", change=write("ct2/vocabulary.json", '["a"]')
    ),
    "pickled": failure(
        "inspect pickled",
        "pytorch_model.bin",
        "--allow-pickle",
        change=lambda p: [write("pickled/pytorch_model.bin", "x")(p), write("pickled/config.json", "{}")(p)],
    ),
    "a damaged pickle": failure(
        "inspect pickled --allow-pickle",
        "pytorch_model.bin",
        change=lambda p: [write("pickled/pytorch_model.bin", "x")(p), write("pickled/config.json", "{}")(p)],
    ),
    "no class in config.json": failure(
        "verify llama llama", "architectures", "weights", change=config("llama", architectures=None)
    ),
    "weights of another size": failure(
        "verify llama llama", "embed_tokens", "(90, 32)", change=config("llama", vocab_size=90)
    ),
    # Which blocks, and how much of them.
    "no such blocks": usage("prune whisper -o out --sites encoder", "encoder", "encoder.self, decoder.self"),
    "no such layer": usage("prune whisper -o out --layers 7", "--layers 7", "1"),
    "a share of all": usage("prune whisper -o out --ratio 1", "--ratio 1"),
    "two rules": usage("prune whisper -o out --rank 3 --energy 0.9", "--rank", "--energy"),
    "lossless and a rule": usage("prune whisper -o out --lossless --rank 3", "--lossless"),
    "a threshold above all": failure("prune whisper -o out --qk-thr 1e9", "Q-K", "pessa inspect"),
    "a size": usage("prune whisper -o out --target-size big", "--target-size", "'big'"),
    "too small a budget": failure("prune bert -o out --target-params 0.1", "0.1", "0."),
    "an error without data": usage("prune bert -o out --max-error 0.1", "--max-error", "--calibrate"),
    "no rotation": usage("prune bert -o out --rope-ratio 0.1", "--rope-ratio"),
    "vanilla of what is decomposed": usage(
        "prune decomposed -o out --method vanilla --rank 3", "decomposed", "--method"
    ),
    "vanilla with data": usage("prune bert -o out --method vanilla --statistics bert.stats", "vanilla"),
    # Where it goes.
    "in the way": failure("prune whisper -o llama", "llama exists", "--force"),
    "no place": failure("prune whisper -o words.txt/out", "words.txt/out"),
    "not a model to replace": failure("prune whisper -o words.txt --force", "words.txt", "--force"),
    "jobs": usage("prune whisper -o out --jobs -1", "--jobs -1"),
    "a device": usage("prune whisper -o out --device warp", "--device warp"),
    "not pessa's": failure("export whisper -o out --layout dense", "whisper", "pessa.json"),
    "ranks of other weights": failure(
        "export pruned -o out --layout dense",
        "pessa.json",
        "encoder.self.0",
        change=within("pruned", edit_json(lambda c: c["ranks"]["encoder.self.0"].update(vo="1 1 1 1"), "pessa.json")),
    ),
    "a card without a place": failure("verify whisper whisper --card", "whisper/README.md"),
    "another tensor than planned": failure(written_twice, "b", "a", hint=False),
    # Recipes and data.
    "a recipe that is none": failure("run words.txt whisper -o out", "words.txt"),
    "a key of no recipe": usage(
        "run r.toml whisper -o out", "r.toml", "'quality'", change=write("r.toml", "[prune]\nquality = 3")
    ),
    "a rule of no sense in a recipe": usage(
        "run r.toml whisper -o out", "r.toml", "ratio", change=write("r.toml", "[prune]\nratio = 2.0")
    ),
    "in sequence without data": usage(
        "prune bert -o out --rank 3 --sequential --statistics bert.stats", "--sequential", "--calibrate"
    ),
    "no data": failure("prune bert -o out --calibrate nowhere", "nowhere"),
    "a clip of text": failure("verify whisper whisper --audio words.txt", "words.txt", "WAV"),
    "a clip for a reader": usage("prune llama -o out --calibrate tone.wav", "llama"),
    "statistics of nothing": failure("inspect bert --statistics words.txt", "words.txt", "--calibrate"),
    "statistics of another model": failure("inspect llama --statistics bert.stats", "bert.stats", "decoder.self.0"),
    "attention that is no number": failure(
        "inspect bert --calibrate story.txt",
        "encoder.self.0",
        change=weights("bert", lambda t: t["bert.embeddings.word_embeddings.weight"].fill_(torch.inf)),
    ),
    "a search without data": usage("prune llama -o out --max-ppl-increase 1%", "--max-ppl-increase", "--evaluate"),
    "an increase": usage(
        "prune llama -o out --max-ppl-increase lots --evaluate story.txt", "--max-ppl-increase", "lots"
    ),
    # Comparing and scoring.
    "another model": failure("verify whisper llama", "encoder.self.0", "whisper", "llama"),
    "a tolerance": usage("verify whisper whisper --tolerance nan", "--tolerance nan"),
    "no such text": failure("verify llama llama --text nowhere.txt", "nowhere.txt"),
    "a clip for one who reads": usage("verify llama llama --audio tone.wav", "--audio", "llama", "--text"),
    "no file for a plot": usage("inspect whisper --plot x.gif", "--plot x.gif", ".png"),
    "no matplotlib": failure("inspect whisper --plot x.png", "matplotlib", "pip install", missing=("matplotlib",)),
    "no file for a report": usage("verify whisper whisper --junit nowhere/x.xml", "--junit nowhere/x.xml"),
    "rounds": usage("bench whisper whisper --rounds 0", "--rounds 0"),
    "nothing to score on": usage("eval llama", "--tasks", "--speech"),
    "not for this model": usage("eval llama --pairs pairs.csv", "--pairs", "LlamaForCausalLM", "--text"),
    "a limit": usage("eval llama --text story.txt --limit -1", "--limit -1"),
    "no questions": failure("eval llama --tasks llama", "llama", "test.json"),
    "no text": failure("eval llama --text tone.wav", "tone.wav"),
    "no pairs": failure("eval bert --pairs pairs.csv", "pairs.csv", "row 1", change=write("pairs.csv", "a,b\n")),
    "a language": usage(
        lambda _: WordErrors.of("clips", [], None, ScoreSettings(language="Klingon")), "--language Klingon"
    ),
    "no adapter to score": failure("eval llama --text story.txt --adapter whisper", "whisper", "adapter_config.json"),
    "no inputs that fit": usage(
        lambda p: random_signal(p / "whisper", transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL))),
        "input_ids",
    ),
    "no such module": failure(
        lambda p: block_modules(open_model(p / "bert").sites[:1], tiny.load(p / "llama")), "LlamaForCausalLM"
    ),
    "no such backend": usage(lambda _: pessa_cli.set_backend("sparse"), "'sparse'", "scatter"),  # type: ignore[arg-type]
    "a class of another name": failure(
        lambda p: transformers.WhisperForConditionalGeneration.from_pretrained(p / "pruned"),
        "WhisperForConditionalGeneration",
        change=within("pruned", edit_json(lambda c: c["quantization_config"].update(modules={"x.y": "rows 8: 4 4"}))),
    ),
    # Other programs.
    "to ONNX": failure("export llama -o x --to onnx", "llama"),
    "to ONNX without its packages": failure(
        "export bert -o x --to onnx", "onnxscript", "pip install", missing=("onnxscript",)
    ),
    "an openai-whisper file by name": usage("export whisper -o x --to openai-whisper", ".pt"),
    "no Whisper": failure("export llama -o x.pt --to openai-whisper", "llama"),
    "without openai-whisper": failure(
        lambda p: pessa_cli.load_whisper(p / "whisper"),
        "openai-whisper",
        "pip install",
        missing=("whisper.model", "pessa_cli.runtime.openai_whisper"),
    ),
    "a package that is not there": failure(
        lambda _: need("nobodys_package", extra="eval"), "nobodys_package", "pip install"
    ),
    # Fine-tuning.
    "a learning rate": usage("tune llama --data sums.jsonl -o out --lr 0", "0"),
    "no such method": usage("tune llama --data sums.jsonl -o out --method magic", "magic", "lora"),
    "text for a listener": failure("tune whisper --data sums.jsonl -o out", "sums.jsonl", "whisper"),
    "no examples": failure("tune llama --data words.txt -o out", "words.txt"),
    "answers beyond the end": failure(
        "tune llama --data sums.jsonl -o out --max-length 2", "sums.jsonl", "--max-length"
    ),
    "a pattern": usage(lambda _: build_config("svft", None, ["q_proj"], pattern="dots"), "'dots'"),
    "no SORSA": failure(tuned_with_lora, "SORSA", hint=False),
    "no adapter": failure("merge llama whisper -o out", "whisper", "adapter_config.json"),
}
SMALL: dict[str, int] = {
    "vocab_size": 99,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}

# Errors without a hint, by where they are made, and why.
OWN_FAULT = "can only come of a fault of pessa itself"
BY_CALLER = "find_sites collects these, and gives the hint"
HINTLESS = {
    "blocks.discover._head_count": BY_CALLER,
    "blocks.discover._turned": BY_CALLER,
    "blocks.discover._site": BY_CALLER,
    "checkpoint.shards.ShardWriter": OWN_FAULT,
    "checkpoint.shards.CheckpointWriter": OWN_FAULT,
    "evaluation.verify._paired": "the message names both models, and what one of them lacks",
    "exports.onnx._check_axes": "torch's exporter decides that; there is nothing to be done about it",
    "exports.onnx._write": "the message is that of torch's exporter",
    "sources.whisper_folder.write_side_files": "no such model is known",
    "models.instructions._conversation": "the message is that of the model's own template",
    "tuning.registry._adalora": "of the Python library; the command gives the number of steps",
    "tuning.registry.attach": "of the Python library; the command gives the data",
    "tuning.tuner_sorsa.regularizer": "of the Python library",
    "tuning.tuner_sorsa.gamma": "of the Python library",
}
# `raise ... from None` under `except Exception`: the cause is not shown, so it must be no fault of our own code.
HIDDEN = {
    "models.instructions._conversation": "a chat template is a program of the model's own, and ends in any error",
    "sources.gguf._architecture": "a damaged file ends in any error of the package that reads it",
    "sources.pickled.load_pickle": "a damaged pickle ends in any error, and torch's text advises to run its code",
}


@pytest.fixture
def world(tiny_folder: TinyFolder, place: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and data of every kind."""
    monkeypatch.chdir(place)
    base = place / "base"
    base.mkdir()
    copy_of(tiny_folder("whisper"), base / "whisper")
    for name in ("llama", "bert"):
        with_tokenizer(tiny_folder(name), base / name)
    (base / "words.txt").write_text("some words")
    (base / "story.txt").write_text(STORY)
    soundfile.write(base / "tone.wav", np.sin(np.arange(8000) / 9), 16000)
    sums(base / "sums.jsonl")
    write_lines(base / "pairs.csv", [])
    assert pessa("prune", base / "whisper", "-o", base / "pruned", "--ratio", "0.3").code == 0
    assert pessa("decompose", base / "whisper", "-o", base / "decomposed").code == 0
    data = ("--calibrate", base / "story.txt", "--statistics", base / "bert.stats")
    assert pessa("inspect", base / "bert", *data).code == 0
    return base


@contextmanager
def without(names: tuple[str, ...]) -> Iterator[None]:
    """As if a package were not installed: the first name is not found, the others are imported anew."""
    kept = dict(sys.modules)
    for name in names[1:]:
        sys.modules.pop(name, None)
    if names:
        sys.modules[names[0]] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in names:
            sys.modules.pop(name, None)
            if name in kept:
                sys.modules[name] = kept[name]


def provoke(example: Example, pessa: Pessa, place: Path) -> None:
    if isinstance(example.run, str):
        is_refusal(pessa(*example.run.split()), *example.says, code=example.code)
        return
    with pytest.raises(PessaError) as raised:
        example.run(place)
    error = raised.value
    assert isinstance(error, UsageError) == (example.code == 2)
    assert bool(error.hint) == example.hint
    assert [part for part in example.says if part not in f"{error.message}\n{error.hint}"] == []


def test_every_kind_of_error(
    world: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch, subtests: pytest.Subtests
) -> None:
    """Each example, in a folder of its own that stays as it is; together they come by every module that raises."""
    shown: set[tuple[str, int]] = set()
    for number, (name, example) in enumerate(EXAMPLES.items()):
        place = world.parent / f"{number}"
        shutil.copytree(world, place)
        monkeypatch.chdir(place)
        example.change(place)
        before = snapshot(place)
        absent = without(example.missing) if example.missing else nullcontext()
        with subtests.test(name), raising.noting() as seen, absent:
            provoke(example, pessa, place)
            assert snapshot(place) == before, "something was written"
            assert seen
        shown |= seen
        monkeypatch.chdir(world)
        shutil.rmtree(place)
    modules = {place.module for place in raising.places()}
    assert modules - {module for module, _ in shown} == set(), "no example comes by these"


def listed_as(place: raising.Place) -> bool:
    return any(f"{place.module}.{place.function}".startswith(known) for known in HINTLESS)


def test_every_error_says_what_to_do() -> None:
    """Statically, of all places in the source; the list of those without a hint is above, with reasons."""
    found = raising.places()
    assert len(found) > 250
    assert [str(place) for place in found if not place.hinted and not listed_as(place)] == []


def test_no_unexpected_error_is_hidden() -> None:
    """`from None` leaves out the cause, which is right for what was expected, as a file that is not there."""
    broad = {
        f"{module}.{function}"
        for module, function, kinds in raising.hiding()
        if kinds in ("", "Exception", "BaseException")
    }
    assert broad <= set(HIDDEN)


def test_what_is_shown_to_the_user_is_one_of_our_errors() -> None:
    """The exit codes: 2 for a UsageError, 1 for every other, and no third class that a caller would not expect."""
    assert {"PessaError", "UsageError"} == raising.ERRORS
