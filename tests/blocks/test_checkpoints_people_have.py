"""Checkpoints as they are found: named after other classes, parts of models, wrapped, cut, or with another config.

Each is one row of a table: a tiny model, a change of its folder, and what must come of it. Either it is read as the
class of transformers that stock transformers loads without a missing tensor, and everything written from it computes
the same in that class; or it is refused with an error that names the fault. Nothing in between.
"""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pessa, Tensors, edit_json, edit_weights, is_refusal
from tiny_models import build
from tuned import with_tokenizer

from pessa_cli.common.errors import PessaError
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.models.classes import class_of
from pessa_cli.models.load import quiet_transformers
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import decompose_model, prune_model

Change = Callable[[Path], object]
EXACT = 1e-5


@dataclass(frozen=True)
class Right:
    """A checkpoint that is read. kind: its class in transformers; options: arguments of that class."""

    made: Callable[[], Any]
    kind: str
    changes: tuple[Change, ...] = ()
    options: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Refused:
    """A checkpoint that is refused. says: parts of the error; loads: whether transformers loads all of its weights, or
    None if it would not return."""

    made: Callable[[], Any]
    changes: tuple[Change, ...]
    says: tuple[str, ...]
    loads: bool | None = False


def of(name: str, kind: str = "", **more: Any) -> Callable[[], Any]:
    return lambda: build(name, kind, **more)


def part(name: str, module: str) -> Callable[[], Any]:
    """A submodel by itself."""
    return lambda: build(name).get_submodule(module)


def config(**values: Any) -> Change:
    """Change values of config.json; None removes one."""

    def change(found: dict[str, Any]) -> None:
        for key, value in values.items():
            found.pop(key, None) if value is None else found.__setitem__(key, value)

    return edit_json(change)


def named(*names: str) -> Change:
    return config(architectures=list(names))


UNNAMED = config(architectures=None)


def renamed(old: str, new: str) -> Change:
    """Replace the first `old` in every tensor name that has it, or put `new` before all names if `old` is empty."""

    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            if old in name:
                tensors[name.replace(old, new, 1) if old else new + name] = tensors.pop(name)

    return edit_weights(change)


def without(*parts: str) -> Change:
    """Remove the tensors whose names contain one of these parts."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if any(part in name for part in parts)]:
            del tensors[name]

    return edit_weights(change)


def one_head_less(inputs: str, output: str, width: int = 8) -> Change:
    """Remove the first head of the modules whose names contain `inputs`, and its columns of the module `output`."""

    def change(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            if name.endswith(f"{output}.weight"):
                tensors[name] = tensor[:, width:]
            elif inputs in name and output not in name:
                tensors[name] = tensor[width:]

    return edit_weights(change)


def spare_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if ".layers.1." in name]:
        tensors[name.replace(".layers.1.", ".layers.2.")] = tensors[name] + 1
    tensors["model.layers.2.eh_proj.weight"] = torch.ones(4, 4)


def own_code(folder: Path) -> None:
    """A class that the checkpoint brings itself, whose code must never run."""
    (folder / "modeling_own.py").write_text("raise SystemExit('code of the checkpoint was run')\n")
    classes = dict.fromkeys(("AutoModel", "AutoModelForMaskedLM", "AutoConfig"), "modeling_own.OwnModel")
    config(architectures=["OwnModel"], auto_map=classes)(folder)


RIGHT = {
    "architectures missing, llama": Right(of("llama"), "LlamaForCausalLM", (UNNAMED,)),
    "architectures missing, bert": Right(of("bert"), "BertForMaskedLM", (UNNAMED,)),
    "architectures missing, whisper": Right(of("whisper"), "WhisperForConditionalGeneration", (UNNAMED,)),
    "architectures missing, t5": Right(of("t5"), "T5ForConditionalGeneration", (UNNAMED,)),
    "own code beside a known model_type": Right(of("bert"), "BertForMaskedLM", (own_code,)),
    "MPNetForMaskedLM over a bare encoder": Right(
        of("mpnet", "MPNetModel"), "MPNetModel", (named("MPNetForMaskedLM"),)
    ),
    "BertForMaskedLM over a bare encoder": Right(of("bert", "BertModel"), "BertModel", (named("BertForMaskedLM"),)),
    "a bare encoder without its pooler": Right(
        of("bert", "BertModel"),
        "BertModel",
        (named("BertForMaskedLM"), without("pooler")),
        (("add_pooling_layer", False),),
    ),
    "BertModel over the weights of a masked language model": Right(
        of("bert"), "BertModel", (named("BertModel"),), (("add_pooling_layer", False),)
    ),
    "T5EncoderModel over a whole T5": Right(of("t5"), "T5ForConditionalGeneration", (named("T5EncoderModel"),)),
    "a sequence classifier": Right(
        of("bert", "BertForSequenceClassification", num_labels=3), "BertForSequenceClassification", (UNNAMED,)
    ),
    "question answering": Right(of("bert", "BertForQuestionAnswering"), "BertForQuestionAnswering", (UNNAMED,)),
    "a token classifier": Right(of("bert", "BertForTokenClassification", num_labels=3), "BertForTokenClassification"),
    "a Whisper encoder alone": Right(part("whisper", "model.encoder"), "WhisperEncoder"),
    "a Whisper encoder alone, unnamed": Right(part("whisper", "model.encoder"), "WhisperEncoder", (UNNAMED,)),
    "a Whisper decoder alone": Right(part("whisper", "model.decoder"), "WhisperDecoder"),
    "WhisperForCausalLM": Right(of("whisper", "WhisperForCausalLM"), "WhisperForCausalLM"),
    "WhisperForAudioClassification": Right(
        of("whisper", "WhisperForAudioClassification"), "WhisperForAudioClassification", (UNNAMED,)
    ),
    "WhisperModel": Right(of("whisper", "WhisperModel"), "WhisperModel"),
    "WhisperModel, named otherwise: its output layer is tied": Right(
        of("whisper", "WhisperModel"), "WhisperForConditionalGeneration", (named("WhisperForAudioClassification"),)
    ),
    "T5EncoderModel": Right(of("t5", "T5EncoderModel"), "T5EncoderModel", (UNNAMED,)),
    "a T5 encoder alone": Right(part("t5", "encoder"), "T5Stack"),
    "CLIPTextModel, named CLIPModel": Right(of("clip_text_model"), "CLIPTextModel", (named("CLIPModel"),)),
    "CLIPVisionModel": Right(of("clip_vision_model"), "CLIPVisionModel", (UNNAMED,)),
    "GPT2Model": Right(of("gpt2", "GPT2Model"), "GPT2Model"),
    "a bare GPT-2, unnamed: its output layer is tied": Right(of("gpt2", "GPT2Model"), "GPT2LMHeadModel", (UNNAMED,)),
    "LlamaModel": Right(of("llama", "LlamaModel"), "LlamaModel", (UNNAMED,)),
    "LlamaForSequenceClassification": Right(
        of("llama", "LlamaForSequenceClassification"), "LlamaForSequenceClassification", (UNNAMED,)
    ),
    "the language model of a LLaVA": Right(part("llava", "model.language_model"), "LlamaModel"),
    "the language model of a Gemma 3": Right(part("gemma3", "model.language_model"), "Gemma3TextModel"),
    "the prefix `model.` twice": Right(of("llama"), "LlamaForCausalLM", (renamed("", "model."),)),
    "a spare layer that predicts further tokens": Right(
        of("llama"), "LlamaForCausalLM", (edit_weights(spare_layer), config(num_nextn_predict_layers=1))
    ),
    "a number of key/value heads that is the default of its class left out": Right(
        of("mistral", num_attention_heads=16, num_key_value_heads=8, head_dim=4),
        "MistralForCausalLM",
        (config(num_key_value_heads=None),),
    ),
}
REFUSED = {
    "a head less in one layer": Refused(
        of("bert"),
        (one_head_less("layer.0.attention.self", "layer.0.attention.output.dense"), config(pruned_heads={"0": [0]})),
        ("layer.0.attention.self.query.weight", "24 rows", "32", "pruned_heads"),
    ),
    "a head less in one layer, not in the config": Refused(
        of("bert"),
        (one_head_less("layer.0.attention.self", "layer.0.attention.output.dense"),),
        ("layer.0.attention.self.query.weight", "24 rows", "32"),
    ),
    "a narrower layer": Refused(
        of("llama", num_key_value_heads=4),
        (one_head_less("layers.1.self_attn", "layers.1.self_attn.o_proj"),),
        ("layers.1.self_attn.q_proj.weight", "24 rows", "32"),
    ),
    "all layers narrower, an 8-th of each head": Refused(
        of("gpt2"),
        (edit_weights(lambda tensors: tensors.update({n: t[..., 12:] for n, t in tensors.items() if "c_attn" in n})),),
        ("h.0.attn.c_attn.weight", "84 rows", "96"),
    ),
    "heads for each layer in the config": Refused(
        of("llama"), (config(num_key_value_heads=[2, 1]),), ("num_key_value_heads", "[2, 1]")
    ),
    "a config with fewer layers": Refused(
        of("llama"), (config(num_hidden_layers=1),), ("model.layers.1", "only 1 layers (num_hidden_layers)"), loads=True
    ),
    "a config with more layers": Refused(
        of("llama"), (config(num_hidden_layers=4),), ("4 layers (num_hidden_layers), the file 2", "model.layers.")
    ),
    "a config with more layers, of one side": Refused(
        of("whisper"), (config(decoder_layers=3),), ("3 layers (decoder_layers), the file 2", "decoder.layers.")
    ),
    "an impossible number of layers": Refused(
        of("llama"), (config(num_hidden_layers=10**12),), ("num_hidden_layers", "1000000000000"), loads=None
    ),
    "a whole layer missing": Refused(of("llama"), (without("layers.0."),), ("layers.0",)),
    "a block missing": Refused(of("llama"), (without("layers.1.self_attn"),), ("model.layers.1", "decoder.self")),
    "half a block missing": Refused(
        of("llama"),
        (without("layers.1.self_attn.v", "layers.1.self_attn.o"),),
        ("layers.1.self_attn.v_proj", "missing"),
    ),
    "all cross-attention missing": Refused(
        of("whisper"), (without("encoder_attn."),), ("decoder.layers.0", "decoder.cross")
    ),
    "the wrapper of torch.compile": Refused(of("llama"), (renamed("", "_orig_mod."),), ("torch.compile", "_orig_mod")),
    "the wrapper of DistributedDataParallel": Refused(
        of("llama"), (renamed("", "module."),), ("DistributedDataParallel", "module.")
    ),
    "the wrapper of FSDP": Refused(
        of("llama"), (renamed(".self_attn.", "._fsdp_wrapped_module.self_attn."),), ("FSDP", "_fsdp_wrapped_module")
    ),
    "the wrapper of activation checkpointing": Refused(
        of("llama"), (renamed(".mlp.", "._checkpoint_wrapped_module.mlp."),), ("activation checkpointing",)
    ),
    "the wrapper of PEFT": Refused(of("llama"), (renamed("", "base_model.model."),), ("PEFT", "merge_and_unload")),
    "layers of LoRA": Refused(
        of("llama"), (renamed("q_proj.weight", "q_proj.base_layer.weight"),), ("PEFT", "q_proj.base_layer.weight")
    ),
    "another head_dim": Refused(of("llama"), (config(head_dim=16),), ("q_proj.weight", "32 rows", "64")),
    "another number of heads": Refused(of("mistral"), (config(num_attention_heads=2),), ("q_proj.weight", "24")),
    "another number of key/value heads": Refused(
        of("llama"), (config(num_key_value_heads=4),), ("k_proj.weight", "(16, 32)", "(32, 32)")
    ),
    "another d_kv": Refused(of("t5"), (config(d_kv=24),), ("SelfAttention.q.weight", "48 rows", "96")),
}


def stock(folder: Path, built: Any, kind: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """Load a folder with transformers alone, in a class from the file that the class of `built` is in."""
    found = getattr(sys.modules[type(built).__module__], kind)
    loaded, info = found.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    return loaded.eval(), info


@torch.no_grad()
def said(model: Any) -> torch.Tensor:
    """The output of a model for inputs that are the same on every call."""
    generator = torch.Generator().manual_seed(1)
    takes, ids = inspect.signature(model.forward).parameters, torch.randint(5, 80, (2, 9), generator=generator)
    ids[:, -1] = 2  # CLIP reads the output at the end of the text
    shapes = {"input_features": (2, 8, 60), "pixel_values": (2, 3, 16, 16)}
    name = model.main_input_name
    inputs: dict[str, Any] = {name: torch.randn(shapes[name], generator=generator) if name in shapes else ids}
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids
    elif model.config.model_type == "whisper" and name == "input_ids":
        states = torch.randn(2, 30, 32, generator=generator)
        inputs |= (
            {"encoder_hidden_states": states} if "encoder_hidden_states" in takes else {"encoder_outputs": (states,)}
        )
    output: torch.Tensor = model(**inputs)[0]
    return output


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / a.norm())


def made(case: Right | Refused, folder: Path) -> Any:
    """Write the checkpoint of a case; returns the model that it was made from."""
    built = case.made()
    built.save_pretrained(folder)
    for change in case.changes:
        change(folder)
    return built


@pytest.mark.parametrize("name", RIGHT)
def test_read_as_what_transformers_loads(name: str, tmp_path: Path) -> None:
    case = RIGHT[name]
    source, options = tmp_path / "source", dict(case.options)
    built = made(case, source)
    model = open_model(source)
    with quiet_transformers():
        chosen = class_of(model)
        assert (chosen.kind.__name__, chosen.options) == (case.kind, options)
        loaded, info = stock(source, built, case.kind, **options)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        wanted = said(loaded)
        whole, compact, dense = (tmp_path / folder for folder in ("whole", "compact", "dense"))
        decompose_model(model, whole)
        prune_model(model, compact, Rule(ratio=0.5))
        prune_model(model, dense, Rule(ratio=0.5), layout="dense")
        outputs = {folder: said(stock(folder, built, case.kind, **options)[0]) for folder in (whole, compact, dense)}
        assert distance(wanted, outputs[whole]) < EXACT
        assert distance(outputs[dense], outputs[compact]) < EXACT
        assert distance(wanted, outputs[dense]) > 1e-3
        cut = verify_models(model, open_model(compact))
        assert cut.outputs is not None
        assert not cut.same
        errors = {found.where: found.error for found in cut.blocks}
        assert errors.keys() == {site.name for site in model.sites}  # every block has run
        assert min(errors.pop(site.name) for site in model.attention) > 1e-3
        assert max(errors.values()) < EXACT  # those of the MLPs, which were not pruned
        words = [json.loads((folder / "config.json").read_text()).get("architectures") for folder in (source, compact)]
        assert words[0] == words[1]


@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_why(name: str, tmp_path: Path) -> None:
    case = REFUSED[name]
    source = tmp_path / "source"
    built = made(case, source)
    with pytest.raises(PessaError) as raised:
        open_model(source)
    error = raised.value
    assert error.hint
    assert [says for says in (str(source), *case.says) if says not in f"{error.message}\n{error.hint}"] == []
    if case.loads is None:
        return
    with quiet_transformers():
        try:
            _, info = stock(source, built, type(built).__name__)
        except (ValueError, TypeError, OverflowError, AttributeError, MemoryError):  # of a config that cannot be
            return
        except Exception as other:
            assert "Error" in type(other).__name__  # noqa: PT017
            return
    assert bool(info["missing_keys"] or info["mismatched_keys"]) != case.loads


STORY = "the keeper lit the lamp on the ninth of march, and it burned until three sails came home. " * 8


@pytest.mark.slow
def test_commands_work_on_a_bare_encoder_named_otherwise(tmp_path: Path, pessa: Pessa) -> None:
    """inspect, prune, verify, eval and --calibrate, as a user would call them."""
    made(RIGHT["BertForMaskedLM over a bare encoder"], tmp_path / "plain")
    source = with_tokenizer(tmp_path / "plain", tmp_path / "source")
    (tmp_path / "story.txt").write_text(STORY)
    (tmp_path / "pairs.csv").write_text("the lamp,the lamp,5\nthe keeper,the lamp,1\nthe ninth,three sails,2\n")
    for arguments in (
        ("inspect", source, "--calibrate", tmp_path / "story.txt"),
        ("prune", source, "-o", tmp_path / "out", "--target-attention", "0.7", "--calibrate", tmp_path / "story.txt"),
        ("decompose", source, "-o", tmp_path / "whole"),
        ("verify", source, tmp_path / "whole"),
        ("verify", source, tmp_path / "whole", "--level", "blocks"),
        ("eval", source, tmp_path / "out", "--pairs", tmp_path / "pairs.csv"),
    ):
        done = pessa(*arguments)
        assert done.code == 0, done.err
    is_refusal(pessa("eval", source, "--text", tmp_path / "story.txt"), "BertModel", "--pairs", code=2)


def test_commands_work_on_a_whisper_encoder_alone(tmp_path: Path, pessa: Pessa) -> None:
    made(RIGHT["a Whisper encoder alone"], tmp_path / "source")
    for arguments in (
        ("inspect", tmp_path / "source"),
        ("prune", tmp_path / "source", "-o", tmp_path / "out", "--ratio", "0.3"),
        ("export", tmp_path / "out", "-o", tmp_path / "dense", "--layout", "dense"),
        ("verify", tmp_path / "out", tmp_path / "dense"),
    ):
        done = pessa(*arguments)
        assert done.code == 0, done.err
    assert pessa("verify", tmp_path / "source", tmp_path / "out").code == 1
    is_refusal(pessa("eval", tmp_path / "source", "--speech", tmp_path), "WhisperEncoder", code=2)
