"""Checkpoints that differ from another one in one place, for the tests of `pessa verify`.

All changes are generated from the files of the folder, so that a new key or tensor gets a changed value, too.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tiny
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, WhisperFeatureExtractor

from pessa_cli.common.errors import PessaError
from pessa_cli.evaluation.settings import NOT_COMPARED
from pessa_cli.evaluation.verify import verify_models
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.workflow.decompose import decompose
from pessa_cli.workflow.prune import prune
from pessa_cli.workflow.recipe import Recipe

WEIGHTS = "model.safetensors"
JSON_FILES = (
    *("config.json", "generation_config.json", "preprocessor_config.json", "tokenizer_config.json", "modules.json"),
    *("sentence_bert_config.json", "1_Pooling/config.json"),
)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# What transformers writes into these files, and does not read from them.
UNREAD = ("chunk_size_feed_forward",)


class Change(NamedTuple):
    """A change of one place. apply: changes the copy in a folder."""

    name: str
    apply: Callable[[Path], None]


class Pair(NamedTuple):
    """Two folders of the same model, of which the second one is changed."""

    reference: Path
    candidate: Path


def pairs(place: Path) -> dict[str, Pair]:
    """Tiny models with all that people keep beside the weights: dense, factored and compact."""
    dense = {name: _dense(name, place / name) for name in ("bert", "llama", "whisper", "gpt2", "t5")}
    found = {name: Pair(folder, folder) for name, folder in dense.items()}
    for name in ("bert", "t5", "whisper"):
        decompose(dense[name], place / f"{name}-factored")
        found[f"{name}, factored"] = Pair(dense[name], place / f"{name}-factored")
    for name in ("llama", "whisper"):
        prune(dense[name], place / f"{name}-compact", Recipe(rule=Rule(ratio=0.4)))
        found[f"{name}, compact"] = Pair(place / f"{name}-compact", place / f"{name}-compact")
    return found


def _dense(name: str, folder: Path) -> Path:
    (tiny.build(name) if name in tiny.NAMES else tiny_models.build(name)).save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({f"word{i}": i for i in range(100)}, unk_token="word0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="word0", bos_token="word1", eos_token="word2", model_max_length=40
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    if name == "whisper":
        WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    if name == "bert":
        (folder / "1_Pooling").mkdir()
        (folder / "2_Dense").mkdir()
        write(folder / "modules.json", [{"idx": i, "path": p} for i, p in enumerate(("", "1_Pooling", "2_Dense"))])
        write(folder / "1_Pooling/config.json", {"pooling_mode_mean_tokens": True, "word_embedding_dimension": 32})
        write(folder / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})
        save_file({"linear.weight": torch.eye(32)}, folder / "2_Dense" / WEIGHTS)
    elif name != "whisper":
        settings = json.loads((folder / "generation_config.json").read_text())
        write(folder / "generation_config.json", settings | {"do_sample": True, "temperature": 0.7, "top_k": 20})
    return folder


def said(pair: Pair, change: Change, place: Path) -> str:
    """Change a copy of the candidate, and return what `verify` says to it at level weights; empty for "the same"."""
    folder = place / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(pair.candidate, folder)
    change.apply(folder)
    try:
        report = verify_models(open_model(pair.reference), open_model(folder), "weights")
    except PessaError as error:
        return f"error: {error.message}".replace("\n", " ")
    return "; ".join(report.failures)


def changes(folder: Path) -> Iterator[Change]:
    """Changes of which each makes another model."""
    yield from _of_tensors(folder)
    for file in JSON_FILES:
        if (folder / file).exists():
            document = json.loads((folder / file).read_text())
            for path, value in _leaves(document):
                names = [step for step in path if isinstance(step, str)]
                if names[0] not in (*NOT_COMPARED.get(file, ()), *UNREAD) and not _part_dtype(names):
                    yield Change(f"{file} {'.'.join(map(str, path))}", _setting(file, path, _other(value, names[-1])))
    tokens = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokens["model"]["vocab"]
    swapped = vocabulary | {"word7": vocabulary["word8"], "word8": vocabulary["word7"]}
    yield Change("tokenizer.json two tokens swapped", _setting("tokenizer.json", ["model", "vocab"], swapped))
    renamed = {("ward9" if word == "word9" else word): i for word, i in vocabulary.items()}
    yield Change("tokenizer.json a token renamed", _setting("tokenizer.json", ["model", "vocab"], renamed))
    fewer = {word: i for word, i in vocabulary.items() if word != "word99"}
    yield Change("tokenizer.json a token less", _setting("tokenizer.json", ["model", "vocab"], fewer))
    for key in ("special", "normalized", "lstrip"):
        flipped = _setting("tokenizer.json", ["added_tokens", 0, key], not tokens["added_tokens"][0][key])
        yield Change(f"tokenizer.json added_tokens.0.{key}", flipped)
    yield Change("tokenizer.json normalizer", _setting("tokenizer.json", ["normalizer"], {"type": "Lowercase"}))
    splitter = {"type": "WhitespaceSplit"}
    yield Change("tokenizer.json pre_tokenizer", _setting("tokenizer.json", ["pre_tokenizer"], splitter))
    yield Change("chat_template.jinja", lambda new: append(new / "chat_template.jinja", "!"))
    for file in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "preprocessor_config.json"):
        # A generation config that only repeats config.json is not missed, and encoders have none.
        plain = file == "generation_config.json" and "temperature" not in (folder / "config.json").read_text()
        if (folder / file).exists() and not (plain and "temperature" not in (folder / file).read_text()):
            yield Change(f"{file} missing", lambda new, file=file: (new / file).unlink())  # type: ignore[misc]
    if (folder / "2_Dense").exists():
        changed = torch.eye(32).mul(1.01)
        yield Change("2_Dense scaled", lambda new: save_file({"linear.weight": changed}, new / "2_Dense" / WEIGHTS))
        yield Change("2_Dense missing", lambda new: shutil.rmtree(new / "2_Dense"))
        yield Change("1_Pooling missing", lambda new: shutil.rmtree(new / "1_Pooling"))


def harmless(folder: Path) -> Iterator[Change]:
    """Changes that leave the model what it is."""
    config = json.loads((folder / "config.json").read_text())
    yield Change("key order", lambda new: write(new / "config.json", dict(reversed(config.items()))))
    for key, value in (("transformers_version", "4.0.0"), ("_name_or_path", "somewhere/else")):
        yield Change(key, _setting("config.json", [key], value))
    yield Change("dtype as torch_dtype", _renamed("dtype", "torch_dtype"))
    yield Change("dtype not written", _renamed("dtype", None))
    yield Change("attention kernel", _setting("config.json", ["attn_implementation"], "eager"))
    kind = type(tiny_models.build("gpt2").config) if config["model_type"] == "gpt2" else None
    if kind is not None:
        yield Change("a default written out", _setting("config.json", ["attn_pdrop"], config.get("attn_pdrop", 0.1)))
    defaults = {"bert": "layer_norm_eps", "llama": "rms_norm_eps", "whisper": "activation_function", "t5": "d_kv"}
    if (name := defaults.get(config["model_type"], "")) and config[name] in (1e-12, 1e-6, "gelu"):
        yield Change(f"the default {name} left out", _without("config.json", name))
    if config["model_type"] == "llama":
        yield Change("rope_theta as before transformers 5", _old_rope)
        yield Change("head_dim left out", _without("config.json", "head_dim"))
    yield Change("README.md", lambda new: append(new / "README.md", "more"))
    yield Change("another file", lambda new: append(new / "notes.txt", "more"))
    yield Change("indented otherwise", lambda new: write(new / "config.json", config, 7))
    yield Change("padding of the tokenizer", _setting("tokenizer.json", ["truncation"], {"max_length": 7}))
    yield Change("template within tokenizer_config.json", _template_inside)
    tensors = load_file(folder / WEIGHTS)
    yield Change("shards", _sharded)
    if "model.embed_tokens.weight" in tensors or "bert.embeddings.word_embeddings.weight" in tensors:
        yield Change("position_ids stored", _with_tensor("model.position_ids", torch.arange(8)))
    if config["model_type"] == "whisper":
        yield Change("a tied copy", _with_copy("proj_out.weight", "model.decoder.embed_tokens.weight"))
    if config["model_type"] == "bert" and "quantization_config" not in config:
        name = next(name for name in tensors if name.endswith("key.bias"))
        yield Change("a key bias, which softmax removes", _with_tensor(name, tensors[name] + 0.3))


def _of_tensors(folder: Path) -> Iterator[Change]:
    tensors = load_file(folder / WEIGHTS)
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel() > 1}
    for i, (name, tensor) in enumerate(sorted(floats.items())):
        key_bias = name.endswith("key.bias")  # it adds the same to all scores of a query, which softmax removes
        if not key_bias:
            first = tensor.flatten().clone()
            first[0] += 0.1 * float(tensor.abs().max()) + 1e-3
            yield Change(f"{name} first entry", _with_tensor(name, first.reshape(tensor.shape)))
        if tensor.any() and not key_bias and i % 2 == 0:
            yield Change(f"{name} scaled by 1.01", _with_tensor(name, tensor * 1.01))
        if i % 9 == 0:
            yield Change(f"{name} missing", _with_tensor(name, None))
        if i % 9 == 1:
            yield Change(f"{name} in float64", _with_tensor(name, tensor.double()))
        if i % 9 == 2:
            broken = tensor.clone()
            broken.view(-1)[-1] = float("nan") if i % 2 else float("inf")
            yield Change(f"{name} not finite", _with_tensor(name, broken))
    by_shape: dict[tuple[int, ...], str] = {}
    for name, tensor in floats.items():
        other = by_shape.setdefault(tuple(tensor.shape), name)
        if other != name and len(tensor.shape) == 2 and not torch.equal(tensor, tensors[other]):
            yield Change(f"{name} swapped with {other}", _with_swapped(name, other))
    for name, tensor in floats.items():
        if name.endswith(("q_proj.weight", "query.weight", "v_proj.weight", "SelfAttention.v.weight")):
            rows = tensor.roll(8, 0) if len(tensor) == 32 else tensor.flip(0)
            yield Change(f"{name} heads in another order", _with_tensor(name, rows.contiguous()))
    yield Change("another tensor", _with_tensor("extra.weight", torch.ones(3)))


def _part_dtype(names: list[str]) -> bool:
    return len(names) > 1 and names[-1] in ("dtype", "torch_dtype")


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, (*path, key))
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for i, inner in enumerate(value):
            yield from _leaves(inner, (*path, i)) if path else ((("[]", i, *p), v) for p, v in _leaves(inner))
    else:
        yield path, value


def _other(value: Any, key: str) -> Any:
    if key == "tokenizer_class":  # by a name that it does not know, transformers takes the class of the file
        return "BertTokenizer"
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case float():
            return value * 1.5 + 0.25
        case str():
            return f"{value}x"
        case list():
            return [*value, 3]
        case None:
            return 7
    return {"another": 1}


def _setting(file: str, path: Any, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        *steps, last = [step for step in path if step != "[]"]
        place = document
        for step in steps:
            place = place[step]
        place[last] = copy.deepcopy(value)
        write(folder / file, document)

    return apply


def _without(file: str, key: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / file).read_text())
        del document[key]
        write(folder / file, document)

    return apply


def _renamed(key: str, other: str | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        value = document.pop(key)
        write(folder / "config.json", document | ({} if other is None else {other: value}))

    return apply


def _old_rope(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    write(folder / "config.json", config | {"rope_theta": config.pop("rope_parameters")["rope_theta"]})


def _template_inside(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    _setting("tokenizer_config.json", ["chat_template"], template)(folder)


def _with_tensor(name: str, tensor: torch.Tensor | None) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        others = {key: value for key, value in tensors.items() if key != name}
        _save(others | ({} if tensor is None else {name: tensor}), folder / WEIGHTS)

    return apply


def _with_copy(name: str, other: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        _save(tensors | {name: tensors[other].clone()}, folder / WEIGHTS)

    return apply


def _with_swapped(name: str, other: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        _save(tensors | {name: tensors[other], other: tensors[name]}, folder / WEIGHTS)

    return apply


def _sharded(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names = list(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, held in halves.items():
        _save({name: tensors[name] for name in held}, folder / file)
    weight_map = {name: file for file, held in halves.items() for name in held}
    write(folder / f"{WEIGHTS}.index.json", {"metadata": {}, "weight_map": weight_map})


def _save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})


def write(path: Path, document: Any, indent: int = 2) -> None:
    path.write_text(json.dumps(document, indent=indent))


def append(path: Path, text: str) -> None:
    path.write_text((path.read_text() if path.exists() else "") + text)
