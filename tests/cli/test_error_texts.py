"""Error messages: examples of all kinds of errors, with the parts that their text must contain, and the exit code.

EXAMPLES has at least one error for every module that raises errors. Each error is caused in this process on tiny
models. The tests look only for parts of a message that do not depend on its wording: names, numbers, options, commands.
"""

from __future__ import annotations

import ast
import shutil
import struct
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

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
from pessa_cli.blocks.discover import specs_of
from pessa_cli.blocks.mlp_discover import find_mlps, mlp_specs_of
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.checkpoint.reader import CheckpointReader, TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter
from pessa_cli.cli.prune import run
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.memory import raise_if_out_of_memory
from pessa_cli.common.packages import need
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.word_errors import WordErrors
from pessa_cli.models.classes import class_of
from pessa_cli.models.hooks import block_modules
from pessa_cli.models.inputs import random_signal
from pessa_cli.models.load import from_folder
from pessa_cli.ranks.rule import Rule
from pessa_cli.sources.openai_tokenizer import get_encoding
from pessa_cli.sources.whisper_folder import read_vocabulary
from pessa_cli.statistics.sums import MlpStatistics, shapes_of
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposed_block import decompose_block
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.writing import check_layout
from pessa_cli.tuning.registry import build_config
from pessa_cli.tuning.tuner_sorsa import regularizer

Change = Callable[[Path], object]
CT2 = ("model.bin", "vocabulary.json")
STORY = "the keeper lit the lamp on the ninth of march, and it burned until three sails came home. " * 3


@dataclass(frozen=True)
class Example:
    """An error.

    run: the command line, or the call, that causes it. says: the parts that its text must contain. code: the exit code.
    change: a change of the folder with the models before the run. missing: the name of a package that is hidden as if
    it were not installed, and the modules of pessa that must be imported again. hint: whether the error has a hint; for
    errors without one, HINTLESS has the reason.
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


def link(name: str, target: str) -> Change:
    return lambda place: (place / name).symlink_to((place / target).absolute())


def weights(name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    return within(name, edit_weights(change))


def openai_file(place: Path) -> None:
    torch.save({"dims": {"n_mels": 80}, "model_state_dict": {}}, place / "mine.pt")


def pickled_list(place: Path) -> None:
    torch.save([1], place / "list.pt")


QUERY = "bert.encoder.layer.0.attention.self.query.weight"
NO_RANKS = {"model.decoder.layers.0.self_attn.q_proj": "many"}
GGUF_BERT = b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 20) + b"general.architecture" + struct.pack("<IQ", 8, 4) + b"bert"


def huge(tensors: dict[str, torch.Tensor]) -> None:
    """Make weights so large that their products overflow in float64."""
    for name in list(tensors):
        tensors[name] = tensors[name].double() * (1e200 if "self_attn" in name else 1)


def without_compact(folder: Path) -> list[AttentionSite]:
    """Return the blocks of a model as if its attention could not load the compact layout."""
    return [replace(site, spec=replace(site.spec, compact=False)) for site in open_model(folder).attention]


def mlps(folder: Path) -> list[MlpSite]:
    """Return the MLPs of a dense model."""
    reader = CheckpointReader(folder)
    rows = specs_of(reader.config, reader.header)
    return find_mlps(mlp_specs_of(reader.config), reader.config, reader.header, {}, rows)


def damaged_moment(place: Path) -> None:
    model = open_model(place / "bert")
    site = mlps(place / "bert")[0]
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes_of(site).items()}
    sums |= {"frames": torch.tensor(9.0), "moment": torch.eye(site.width).double() - 0.5}
    decompose_block(BlockReader(model.reader).weights(site), site, "calibrated", MlpStatistics.of(sums))


def run_recipe(place: Path) -> None:
    """Run a recipe whose output is written, outside of the folder that must not change, and then fails to verify."""
    source = {"architecture": None, "revision": None, "allow_pickle": False, "follow_links": False}
    options = {
        "resume": False,
        "jobs": 1,
        "device": "cpu",
        "max_shard_size": None,
        "unknown_weights": "refuse",
        "force": False,
    }
    run(recipe_file=place / "r.toml", model="whisper", out=place.parent / "differs", **options, **source)


def written_twice(place: Path) -> None:
    header = {"a": TensorInfo("F32", (1,))}
    with CheckpointWriter(place / "whisper", {WEIGHTS: header}, {}) as writer:
        writer.put("b", torch.ones(1))


def tuned_with_lora(place: Path) -> None:
    regularizer(get_peft_model(tiny.load(place / "llama"), build_config("lora", 2, ["q_proj"])))


def merged_in_memory(place: Path) -> None:
    prune_model(open_model(place / "llama"), place.parent / "compact", Rule(ratio=0.3))
    get_peft_model(tiny.load(place.parent / "compact"), build_config("lora", 2, ["v_proj"])).merge_and_unload()


Q0 = "model.encoder.layers.0.self_attn.q_proj.weight"
EXAMPLES: Mapping[str, Example] = {
    # Models that cannot be found, read or converted.
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
    "an unknown architecture in --as": usage("inspect llama --as gpt9", "gpt9", "pessa architectures"),
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
    "damaged spectra": failure(
        "inspect whisper", "spectra.safetensors", "decompose", change=write("whisper/spectra.safetensors", "x")
    ),
    "CTranslate2, damaged": failure(
        "inspect ct2", "ct2/model.bin", change=lambda p: [write(f"ct2/{name}", b"\6\0\0\0")(p) for name in CT2]
    ),
    "GGUF, damaged": failure("inspect x.gguf", "x.gguf", change=write("x.gguf", b"GGUF\3\0\0\0")),
    "GGUF without its package": failure(
        "inspect x.gguf", "gguf", "pip install", change=write("x.gguf", b"GGUF\3\0\0\0"), missing=("gguf",)
    ),
    "not an openai-whisper checkpoint": failure("inspect mine.pt", "mine.pt", "n_vocab", change=openai_file),
    "an unknown vocabulary": failure(lambda p: get_encoding(p / "mine.pt", 100), "mine.pt", "100"),
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
    "a rank that is no number": failure(
        "inspect pruned",
        "decoder.layers.0",
        change=within("pruned", edit_json(lambda c: c["quantization_config"].update(modules=NO_RANKS))),
    ),
    "an MLP that is missing": failure(
        "inspect llama",
        "model.layers.1.mlp.down_proj.weight",
        change=weights("llama", lambda t: t.pop("model.layers.1.mlp.down_proj.weight")),
    ),
    "numbers of channels that do not fit": failure(
        "inspect llama",
        "pessa.json",
        "decoder.mlp.1",
        change=write("llama/pessa.json", '{"channels": {"decoder.mlp.1": "0 0"}}'),
    ),
    "a pickle of a list": failure("inspect list.pt", "holds a list", change=pickled_list),
    "GGUF of another architecture": failure(
        "inspect x.gguf", "'bert'", "supported: llama", change=write("x.gguf", GGUF_BERT)
    ),
    "a link out of the folder": failure(
        "inspect llama", "vocab.txt", "words.txt", "--follow-links", change=link("llama/vocab.txt", "words.txt")
    ),
    "a link to nothing": failure(
        "inspect llama --follow-links", "vocab.txt", "no.txt", "dvc pull", change=link("llama/vocab.txt", "no.txt")
    ),
    "weights of nobody": failure(
        "prune llama -o out", "llama", "extra.pt", "--unknown-weights", change=write("llama/extra.pt", "x")
    ),
    "an unknown thing to do with them": usage(lambda _: Run(unknown_weights=cast(Any, "eat")), "'eat'", "leave-out"),
    "a dense layer that is missing": failure(
        "prune bert -o out",
        "2_Dense",
        "modules.json",
        change=write("bert/modules.json", '[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]'),
    ),
    "an adapter as a model": failure(
        "inspect adapter",
        "adapter of 'llama'",
        "pessa merge llama adapter",
        change=write("adapter/adapter_config.json", '{"base_model_name_or_path": "llama"}'),
    ),
    "parts of a training run as a model": failure(
        "inspect run", "run", "merge-weights", change=write("run/__0_0.distcp", "x")
    ),
    "a folder of models": failure(
        "inspect models", "models", "whisper", change=lambda p: copy_of(p / "whisper", p / "models" / "whisper")
    ),
    "MLPs of another width": failure(
        lambda p: mlps(p / "bert"), "48 channels", "40 (intermediate_size)", change=config("bert", intermediate_size=40)
    ),
    "weights that are no matrix": failure(
        "inspect bert",
        *("query.weight", "a matrix of floats", "(1024,)", "--as"),
        change=weights("bert", lambda found: found.update({QUERY: found[QUERY].flatten()})),
    ),
    "a model_type that transformers does not have": failure(
        lambda place: class_of(open_model(place / "llama", "llama")),
        *("llama", "architectures", "MyLlama", "--level weights"),
        change=config("llama", architectures=["MyLlama"], model_type="mine"),
    ),
    "a model without a tokenizer": failure(
        lambda place: from_folder(transformers.WhisperProcessor, place / "whisper", "preprocessor"),
        "whisper",
        "preprocessor",
    ),
    "a model that was saved within a wrapper": failure(
        "inspect llama",
        *("DataParallel", "module.", "save_pretrained"),
        change=weights("llama", lambda found: found.update({f"module.{name}": found.pop(name) for name in [*found]})),
    ),
    "memory that runs out": failure(
        lambda place: raise_if_out_of_memory(MemoryError("no room"), f"load {place}"), "memory", "no room", "load"
    ),
    "weights of another size": failure(
        "verify llama llama", "embed_tokens", "(90, 32)", change=config("llama", vocab_size=90)
    ),
    # Selection of blocks, and rules.
    "no such blocks": usage("prune whisper -o out --sites encoders", "encoders", "encoder.self, decoder.self"),
    "no such layer": usage("prune whisper -o out --layers 7", "--layers 7", "1"),
    "a ratio of 1": usage("prune whisper -o out --ratio 1", "--ratio 1"),
    "two rules": usage("prune whisper -o out --rank 3 --energy 0.9", "--rank", "--energy"),
    "lossless and a rule": usage("prune whisper -o out --lossless --rank 3", "--lossless"),
    "a threshold above all singular values": failure("prune whisper -o out --qk-thr 1e9", "Q-K", "pessa inspect"),
    "an invalid size": usage("prune whisper -o out --target-size big", "--target-size", "'big'"),
    "the seconds of a text": usage("prune bert -o out --target-flops 0.5 --seconds 3", "--seconds 3", "bert"),
    "tokens without a budget of work": usage("prune bert -o out --tokens 5", "--tokens 5", "--target-flops"),
    "a budget that is too small": failure("prune bert -o out --target-params 0.1", "0.1", "0."),
    "a limit that no plan keeps": failure(
        "prune bert -o out --max-error 1e-12 --calibrate story.txt", "--max-error 1e-12", "at least"
    ),
    "a limit on the error without data": usage("prune bert -o out --max-error 0.1", "--max-error", "--calibrate"),
    "no RoPE": usage("prune bert -o out --rope-ratio 0.1", "--rope-ratio"),
    "vanilla of a decomposed model": usage(
        "prune decomposed -o out --method vanilla --rank 3", "decomposed", "--method"
    ),
    "augmented without data": usage("prune bert -o out --augment 4", "--augment", "--calibrate"),
    "augmented text": usage("prune bert -o out --augment 4 --calibrate story.txt", "--augment 4", "text"),
    "vanilla with data": usage("prune bert -o out --method vanilla --statistics bert.stats", "vanilla"),
    # Outputs.
    "an output that exists": failure("prune whisper -o llama", "llama exists", "--force"),
    "an output inside a file": failure("prune whisper -o words.txt/out", "words.txt/out"),
    "not a model to replace": failure("prune whisper -o words.txt --force", "words.txt", "--force"),
    "an output that is read": failure("prune whisper -o whisper --force", "whisper", "reads"),
    "a partial folder of someone else": failure(
        "prune whisper -o out", ".out.partial", change=write(".out.partial/thesis.tex", "mine")
    ),
    "parts of an earlier run": failure(
        "prune whisper -o out",
        ".out.partial",
        "--resume",
        change=lambda p: [
            (p / ".out.partial/output").mkdir(parents=True),
            write(".out.partial/.pessa-journal.json", '{"finished": {"a": ""}}')(p),
            write(".out.partial/output/a", "")(p),
        ],
    ),
    "a name that is too long": failure(f"prune whisper -o {'long' * 75}", "longlong", "File name too long"),
    "a negative number of jobs": usage("prune whisper -o out --jobs -1", "--jobs -1"),
    "an unknown device": usage("prune whisper -o out --device warp", "--device warp"),
    "not a model that pessa wrote": failure("export whisper -o out --layout dense", "whisper", "pessa.json"),
    "ranks of other weights": failure(
        "export pruned -o out --layout dense",
        "pessa.json",
        "encoder.self.0",
        change=within("pruned", edit_json(lambda c: c["ranks"]["encoder.self.0"].update(vo="1 1 1 1"), "pessa.json")),
    ),
    "a layout that the attention cannot load": usage(
        lambda p: check_layout(open_model(p / "whisper"), without_compact(p / "whisper"), "compact"),
        "whisper",
        "--layout dense",
    ),
    "a card without a candidate": usage("verify whisper --card", "--card", "CANDIDATE"),
    "a card without a place for the results": failure("verify whisper whisper --card", "whisper/README.md"),
    "another tensor than planned": failure(written_twice, "b", "a", hint=False),
    # Recipes and data.
    "a file that is not a recipe": failure("run words.txt whisper -o out", "words.txt"),
    "an unknown key in a recipe": usage(
        "run r.toml whisper -o out", "r.toml", "'quality'", change=write("r.toml", "[prune]\nquality = 3")
    ),
    "an invalid value in a recipe": usage(
        "run r.toml whisper -o out", "r.toml", "ratio", change=write("r.toml", "[prune]\nratio = 2.0")
    ),
    "a result that is not the same model": failure(
        run_recipe,
        "differs was written",
        "weights:",
        "min_agreement",
        change=write("r.toml", "[prune]\nratio = 0.3\n[verify]\nlevel = 'weights'"),
    ),
    "statistics in a folder that does not exist": usage(
        "prune bert -o out --rank 3 --calibrate story.txt --statistics nowhere/s", "--statistics nowhere/s"
    ),
    "statistics inside the model": usage(
        "prune bert -o out --rank 3 --calibrate story.txt --statistics bert/sums", "--statistics bert/sums", "only read"
    ),
    "in sequence without data": usage(
        "prune bert -o out --rank 3 --sequential --statistics bert.stats", "--sequential", "--calibrate"
    ),
    "a limit on the error without data, in Python": usage(
        lambda place: prune_model(open_model(place / "bert"), place / "out", Rule(max_error=0.1)),
        "--max-error",
        "--calibrate",
    ),
    "outputs that are not finite": failure(
        "prune llama -o out --ratio 0.1 --calibrate story.txt",
        "logits",
        "not finite",
        change=weights("llama", lambda tensors: tensors["model.norm.weight"].fill_(float("nan"))),
    ),
    "damaged statistics of an MLP": failure(damaged_moment, "encoder.mlp.0", "negative eigenvalues"),
    "no data": failure("prune bert -o out --calibrate nowhere", "nowhere"),
    "a text file as a clip": failure("verify whisper whisper --audio words.txt", "words.txt", "WAV"),
    "a clip for a text model": usage("prune llama -o out --calibrate tone.wav", "llama"),
    "not a statistics file": failure("inspect bert --statistics words.txt", "words.txt", "--calibrate"),
    "statistics of another model": failure("inspect llama --statistics bert.stats", "bert.stats", "decoder.self.0"),
    "attention that is NaN": failure(
        "inspect bert --calibrate story.txt",
        "encoder.self.0",
        change=weights("bert", lambda t: t["bert.embeddings.word_embeddings.weight"].fill_(torch.inf)),
    ),
    "a search without data": usage("prune llama -o out --max-ppl-increase 1%", "--max-ppl-increase", "--evaluate"),
    "an invalid increase": usage(
        "prune llama -o out --max-ppl-increase lots --evaluate story.txt", "--max-ppl-increase", "lots"
    ),
    # Comparing and scoring.
    "another model": failure("verify whisper llama", "encoder.self.0", "whisper", "llama"),
    "an invalid tolerance": usage("verify whisper whisper --tolerance nan", "--tolerance nan"),
    "no such text": failure("verify llama llama --text nowhere.txt", "nowhere.txt"),
    "verify a text model on a clip": usage("verify llama llama --audio tone.wav", "--audio", "llama", "--text"),
    "a plot in an unknown format": usage("inspect whisper --plot x.gif", "--plot x.gif", ".png"),
    "no matplotlib": failure("inspect whisper --plot x.png", "matplotlib", "pip install", missing=("matplotlib",)),
    "a report that would replace another file": usage(
        "verify whisper whisper --level weights --junit words.txt", "--junit words.txt", "XML"
    ),
    "a plot in a folder's place": usage(
        "inspect whisper --plot x.png", "--plot x.png", "is a folder", change=lambda p: (p / "x.png").mkdir()
    ),
    "a report in a folder that does not exist": usage(
        "verify whisper whisper --junit nowhere/x.xml", "--junit nowhere/x.xml"
    ),
    "no rounds": usage("bench whisper whisper --rounds 0", "--rounds 0"),
    "no data to score on": usage("eval llama", "--tasks", "--speech"),
    "data that the model cannot be scored on": usage(
        "eval llama --pairs pairs.csv", "--pairs", "LlamaForCausalLM", "--text"
    ),
    "a negative limit": usage("eval llama --text story.txt --limit -1", "--limit -1"),
    "no questions": failure("eval llama --tasks llama", "llama", "test.json"),
    "no text": failure("eval llama --text tone.wav", "tone.wav"),
    "no pairs": failure("eval bert --pairs pairs.csv", "pairs.csv", "row 1", change=write("pairs.csv", "a,b\n")),
    "an unknown language": usage(
        lambda _: WordErrors.of("clips", [], None, ScoreSettings(language="Klingon")), "--language Klingon"
    ),
    "not an adapter to score": failure(
        "eval llama --text story.txt --adapter whisper", "whisper", "adapter_config.json"
    ),
    "no inputs that fit": usage(
        lambda p: random_signal(p / "whisper", transformers.CLIPTextModel(transformers.CLIPTextConfig(**SMALL))),
        "input_ids",
    ),
    "no such module": failure(
        lambda p: block_modules(open_model(p / "bert").attention[:1], tiny.load(p / "llama")), "LlamaForCausalLM"
    ),
    "no such backend": usage(lambda _: pessa_cli.set_backend("sparse"), "'sparse'", "scatter"),  # type: ignore[arg-type]
    "a class of another name": failure(
        lambda p: transformers.WhisperForConditionalGeneration.from_pretrained(p / "pruned"),
        "WhisperForConditionalGeneration",
        change=within("pruned", edit_json(lambda c: c["quantization_config"].update(modules={"x.y": "rows 8: 4 4"}))),
    ),
    # Other programs.
    "to ONNX": failure("export llama -o x --to onnx", "llama"),
    "a layout of ONNX": usage("export whisper -o x --to onnx --layout compact", "--to onnx", "--layout"),
    "to ONNX without its packages": failure(
        "export bert -o x --to onnx", "onnxscript", "pip install", missing=("onnxscript",)
    ),
    "an openai-whisper file by name": usage("export whisper -o x --to openai-whisper", ".pt"),
    "not a Whisper model": failure("export llama -o x.pt --to openai-whisper", "llama"),
    "without openai-whisper": failure(
        lambda p: pessa_cli.load_whisper(p / "whisper"),
        "openai-whisper",
        "pip install",
        missing=("whisper.model", "pessa_cli.compat.for_whisper", "pessa_cli.runtime.openai_whisper"),
    ),
    "a package that is not installed": failure(
        lambda _: need("nobodys_package", extra="eval"), "nobodys_package", "pip install"
    ),
    "a folder without audio": failure("prune whisper -o out --calibrate llama --rank 3", "llama contains no audio"),
    "statistics in the output": usage(
        "prune llama -o out --calibrate words.txt --statistics out/sums --rank 3", "--statistics out/sums"
    ),
    # Fine-tuning.
    "a learning rate of 0": usage("tune llama --data sums.jsonl -o out --lr 0", "0"),
    "no such method": usage("tune llama --data sums.jsonl -o out --method magic", "magic", "lora"),
    "text for a speech model": failure("tune whisper --data sums.jsonl -o out", "sums.jsonl", "whisper"),
    "no examples": failure("tune llama --data words.txt -o out", "words.txt"),
    "answers beyond the maximum length": failure(
        "tune llama --data sums.jsonl -o out --max-length 2", "sums.jsonl", "--max-length"
    ),
    "an unknown pattern": usage(lambda _: build_config("svft", None, ["q_proj"], pattern="dots"), "'dots'"),
    "no SORSA adapter": failure(tuned_with_lora, "SORSA"),
    "a merge in memory into a compact model": failure(merged_in_memory, "layers.0.self_attn.v_proj", "pessa merge"),
    "not an adapter": failure("merge llama whisper -o out", "whisper", "adapter_config.json"),
}
SMALL: dict[str, int] = {
    "vocab_size": 99,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}

# The functions and classes that raise errors without a hint, and the reasons.
INTERNAL = "only an error in pessa itself can cause it"
BY_CALLER = "find_sites or find_mlps collects these errors, and adds the hint"
HINTLESS = {
    "blocks.config_values.number": BY_CALLER,
    "blocks.config_values.head_counts": BY_CALLER,
    "blocks.config_values.rotated_directions": BY_CALLER,
    "blocks.discover._head_dim": BY_CALLER,
    "blocks.discover._site": BY_CALLER,
    "blocks.mlp_discover._channels": BY_CALLER,
    "blocks.mlp_discover._site": BY_CALLER,
    "blocks.stored.check_floats": BY_CALLER,
    "blocks.stored.check_shapes": BY_CALLER,
    "checkpoint.shards.ShardWriter": INTERNAL,
    "checkpoint.shards.CheckpointWriter": INTERNAL,
}


@pytest.fixture
def world(tiny_folder: TinyFolder, place: Path, pessa: Pessa, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models and data of all kinds."""
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
    """Hide the first of these modules as if it were not installed, and let the others be imported again."""
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
    """Each example runs in its own folder, which must not change; together they cover all modules that raise errors."""
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
    assert modules - {module for module, _ in shown} == set(), "no example for these modules"


def listed_as(place: raising.Place) -> bool:
    return any(f"{place.module}.{place.function}".startswith(known) for known in HINTLESS)


def test_every_error_has_a_hint() -> None:
    """This checks all calls in the source; HINTLESS lists the exceptions."""
    found = raising.places()
    assert len(found) > 250
    assert [str(place) for place in found if not place.hinted and not listed_as(place)] == []


def test_no_cause_is_hidden() -> None:
    """`from None` would leave PESSA_TRACEBACK without the error that led to a message."""
    assert raising.hiding(raising.MODULES | raising.SCRIPTS) == []


def test_negative_control_a_hidden_cause_is_found() -> None:
    source = "def load(path):\n    try:\n        read(path)\n    except OSError:\n        raise Error from None\n"
    assert raising.hiding({"module": ast.parse(source)}) == ["module.load"]


def test_there_are_two_classes_of_errors() -> None:
    """The exit code is 2 for a UsageError and 1 for any other PessaError; callers need not expect a third class."""
    assert {"PessaError", "UsageError"} == raising.ERRORS
