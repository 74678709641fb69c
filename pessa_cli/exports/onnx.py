"""A model as ONNX graphs for onnxruntime, in the files and under the names that optimum gives them.

Whisper becomes encoder_model.onnx, decoder_model.onnx (a prompt, no cache yet) and decoder_with_past_model.onnx (what
comes after it); BERT becomes model.onnx. The exporter is torch's own, by way of torch.export. Each graph is run in
onnxruntime on other shapes than it was traced with, and held against the model as transformers runs it.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.export import Dim

from pessa_cli.blocks.compact_format import ModuleNames
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.files import CONFIG_FILE, sha256_of, visible_files, write_json
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.checkpoint.staging import new_folder
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import badness, listed
from pessa_cli.common.version import VERSION
from pessa_cli.exports.onnx_attention import CacheSlots, HeadByHead, OnnxStep, kept_heads
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import MANIFEST_FILE, Model, open_model
from pessa_cli.surgery.output import WEIGHT_SUFFIXES

TOLERANCE = 1e-4  # relative Frobenius error of a graph's output, as `verify` allows it for float32
LARGEST = 3 * 2**29  # bytes of weights inside a graph; protobuf ends at 2 GiB, what is larger lies beside it
STEPS = (3, 1, 2)  # tokens of the prompt and of each pass after it, when graphs are checked
ERROR = 40  # logging's own number
Arrays = dict[str, Any]
Check = Callable[[Callable[[str], Any]], dict[str, float]]  # sessions by file -> relative error by file


@dataclass(frozen=True)
class Graph:
    """One file to come: what it computes, on what it is traced, and what its inputs and outputs are called.

    `shapes` names the dynamic axes as torch.export wants them.
    """

    file: str
    module: nn.Module
    samples: tuple[Any, ...]
    shapes: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


def export_onnx(folder: Path, out: Path, force: bool = False, progress: Progress = quietly) -> dict[str, float]:
    """Write a Whisper or BERT as ONNX graphs with its config and tokenizer; returns the error of each graph.

    float32, with dynamic batch and sequence axes. The folder is there when every graph agrees with torch, or not at
    all. Raises PessaError when onnxruntime is missing, for other models, and where a graph disagrees.
    """
    _need_packages()
    model = open_model(folder)
    kind = model.reader.config.get("model_type")
    if kind not in ("whisper", "bert") or model.reader.config.get("is_decoder"):
        raise PessaError(
            f"{folder}: a {kind} {'decoder ' if kind == 'bert' else ''}does not become ONNX",
            "whisper and bert encoders do; for others export --layout dense, and use the exporter of transformers",
        )
    with new_folder(out, folder, force) as staging, torch.no_grad(), _quiet():
        loaded = load(model)
        with progress("tracing", model.nbytes, len(model.sites)) as tick:
            graphs, check = (_whisper if kind == "whisper" else _bert)(model, loaded, tick)
            for graph in graphs:
                _write(graph, staging.folder / graph.file)
        model.reader.check_unchanged()
        errors = check(lambda file: _session(staging.folder / file))
        wrong = [f"{file}: off by {error:.2g}" for file, error in errors.items() if not badness(error) <= TOLERANCE]
        if wrong:
            raise PessaError(
                f"onnxruntime and torch disagree by more than {TOLERANCE:g}\n{listed(wrong)}",
                "try other versions of onnxruntime and torch",
            )
        _write_side_files(model.reader, staging.folder, errors)
    return errors


def _need_packages() -> None:
    try:
        import onnxruntime  # noqa: F401  # runs every graph before it is put in place
        import onnxscript  # noqa: F401  # torch's exporter is built on it
    except ImportError as error:
        raise PessaError(f"ONNX needs a package that is not installed: {error}", "pip install 'pessa[onnx]'") from None


def _whisper(model: Model, loaded: Any, tick: Callable[[int, int], None]) -> tuple[list[Graph], Check]:
    """The encoder, and the decoder before and after there is a cache."""
    config = loaded.config
    if not isinstance(loaded, transformers.WhisperForConditionalGeneration):
        raise PessaError(
            f"{model.reader.folder} is a {type(loaded).__name__}", "a WhisperForConditionalGeneration does"
        )
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions, generator=_seeded())
    ids = torch.randint(config.vocab_size, (3, sum(STEPS)), generator=_seeded())
    frames = loaded.model.encoder(features[:1]).last_hidden_state
    three = torch.cat([frames, 2 * frames, -frames])
    expected = loaded(decoder_input_ids=ids, encoder_outputs=(three,)).logits  # (3, sum of STEPS, vocabulary)
    _swap_attention(model, loaded, tick)

    first, later = FirstPass(loaded), LaterPass(loaded)
    names = {kind: _cache_names(config.decoder_layers, kind) for kind in ("decoder", "encoder")}
    both = [name for pair in zip(names["decoder"], names["encoder"], strict=True) for two in pair for name in two]
    self_only = [name for two in names["decoder"] for name in two]
    prompt = ids[:2, :3], three[:2, :5]
    past = list(first(*prompt)[1:])
    batch, tokens, source = Dim("batch_size"), Dim("decoder_sequence_length"), Dim("encoder_sequence_length")
    cached = Dim("past_decoder_sequence_length")
    past_shapes = [{0: batch, 2: source if "encoder" in name else cached} for name in both]
    graphs = [
        Graph(
            "encoder_model.onnx",
            Encoder(loaded),
            (features,),
            ({0: batch},),
            ["input_features"],
            ["last_hidden_state"],
        ),
        Graph(
            "decoder_model.onnx",
            first,
            prompt,
            ({0: batch, 1: tokens}, {0: batch, 1: source}),
            ["input_ids", "encoder_hidden_states"],
            ["logits", *(f"present.{name}" for name in both)],
        ),
        Graph(
            "decoder_with_past_model.onnx",
            later,
            (ids[:2, :2], past),
            ({0: batch, 1: tokens}, past_shapes),
            ["input_ids", *(f"past_key_values.{name}" for name in both)],
            ["logits", *(f"present.{name}" for name in self_only)],
        ),
    ]

    def check(session: Callable[[str], Any]) -> dict[str, float]:
        encoder, decoder, decoder_with_past = (graph.file for graph in graphs)
        one = features[:1].numpy()
        found = [_run(session(encoder), {"input_features": one})["last_hidden_state"]]
        errors = {encoder: _error(found, frames)}
        logits, state = [], {"encoder_hidden_states": three.numpy()}
        start = 0
        running = session(decoder)
        for length in STEPS:
            result = _run(running, {"input_ids": ids[:, start : start + length].numpy(), **state})
            logits.append(result.pop("logits"))
            state.pop("encoder_hidden_states", None)
            state |= {name.replace("present", "past_key_values"): value for name, value in result.items()}
            if start == 0:
                running = session(decoder_with_past)
            start += length
        errors[decoder] = _error(logits[:1], expected[:, : STEPS[0]])
        errors[decoder_with_past] = _error(logits[1:], expected[:, STEPS[0] :])
        return errors

    return graphs, check


def _bert(model: Model, loaded: Any, tick: Callable[[int, int], None]) -> tuple[list[Graph], Check]:
    """The whole model; its outputs are called as transformers calls them, without the pooler's."""
    config = loaded.config
    loaded.set_attn_implementation("eager")  # for which the mask is added to the scores
    ids = torch.randint(config.vocab_size, (3, 7), generator=_seeded())
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    samples = (ids, mask, torch.zeros_like(ids))
    names = ["input_ids", "attention_mask", "token_type_ids"]
    whole = loaded(**dict(zip(names, samples, strict=True)))
    outputs = [name for name, value in whole.items() if isinstance(value, Tensor) and name != "pooler_output"]
    expected = [whole[name] for name in outputs]
    _swap_attention(model, loaded, tick)
    batch, tokens = Dim("batch_size"), Dim("sequence_length")
    traced = tuple(sample[:2, :6] for sample in samples)
    shapes = ({0: batch, 1: tokens},) * 3
    graph = Graph("model.onnx", TextEncoder(loaded, outputs), traced, shapes, names, outputs)

    def check(session: Callable[[str], Any]) -> dict[str, float]:
        arrays = {name: sample.numpy() for name, sample in zip(names, samples, strict=True)}
        found = _run(session(graph.file), arrays)
        errors = [_error([found[name]], value) for name, value in zip(outputs, expected, strict=True)]
        return {graph.file: max(errors, key=badness)}

    return [graph], check


class Encoder(nn.Module):
    """Log-mel features to frames; the window is of one length, which Whisper's positions ask for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_features: Tensor) -> Any:
        return self.encoder(input_features).last_hidden_state


class FirstPass(nn.Module):
    """Whisper's decoder over a prompt: logits, and for each layer keys and values of itself and of the frames."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.proj_out

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor, ...]:
        step = OnnxStep({})
        logits = self.run(input_ids, encoder_hidden_states, step, 0)
        return logits, *(each for name in self.blocks() for each in step.present[name])

    def blocks(self) -> list[str]:
        """Names of the blocks in the order of their caches."""
        return [block.name for layer in self.decoder.layers for block in (layer.self_attn, layer.encoder_attn)]

    def run(self, input_ids: Tensor, frames: Tensor, step: OnnxStep, past: int) -> Tensor:
        positions = torch.arange(input_ids.shape[1]) + past  # (T,)
        hidden = self.decoder.embed_tokens(input_ids) + self.decoder.embed_positions.weight[positions]
        later = torch.arange(input_ids.shape[1] + past) > positions[:, None]  # (T, S)
        mask = later.to(hidden.dtype) * torch.finfo(hidden.dtype).min
        for layer in self.decoder.layers:
            hidden = layer(hidden, mask, frames, past_key_values=step)
        logits: Tensor = self.head(self.decoder.layer_norm(hidden))
        return logits


class LaterPass(FirstPass):
    """The decoder over new tokens: logits, and for each layer its own keys and values, grown by the new ones."""

    def forward(self, input_ids: Tensor, past_key_values: list[Tensor]) -> tuple[Tensor, ...]:  # type: ignore[override]
        pairs = zip(past_key_values[::2], past_key_values[1::2], strict=True)
        step = OnnxStep(dict(zip(self.blocks(), pairs, strict=True)))
        # The layers only ask whether there are frames; their keys and values are in the cache.
        logits = self.run(input_ids, past_key_values[2], step, past_key_values[0].shape[2])
        return logits, *(each for name in self.blocks()[::2] for each in step.present[name])


class TextEncoder(nn.Module):
    """A BERT, with or without a head."""

    def __init__(self, model: Any, outputs: list[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(found[name] for name in self.outputs)


def _cache_names(layers: int, kind: str) -> list[tuple[str, str]]:
    return [(f"{layer}.{kind}.key", f"{layer}.{kind}.value") for layer in range(layers)]


def _swap_attention(model: Model, loaded: Any, tick: Callable[[int, int], None]) -> None:
    """Put attention as wide as the kept directions in the place of the model's own."""
    names = ModuleNames(name for name, _ in loaded.named_modules())
    for site in model.sites:
        q, o = names.find(site.q), names.find(site.o)
        if q is None or o is None:
            raise PessaError(f"{type(loaded).__name__} has no module named {site.q}", "use the class it was saved from")
        place = q.rpartition(".")[0]
        attention = _attention(model.reader, site, float(loaded.get_submodule(place).scaling))
        if o.rpartition(".")[0] != place:  # BERT's own code applies it
            loaded.set_submodule(o, attention.o)
            attention.o = nn.Identity()
        loaded.set_submodule(place, attention)
        tick(sum(model.reader.header[name].nbytes for name in site.tensors), 1)


def _attention(reader: CheckpointReader, site: Site, scaling: float) -> HeadByHead | CacheSlots:
    heads, o_bias = kept_heads(read_site(reader, site), scaling)
    if site.spec.kind.startswith("decoder"):
        return CacheSlots(site.name, heads, o_bias)
    if reader.config["model_type"] == "whisper":
        return HeadByHead(heads, o_bias)
    key_width, value_width = max(1, *(len(head.k) for head in heads)), max(1, *(len(head.v) for head in heads))
    return CacheSlots(site.name, heads, o_bias, key_width, value_width)  # texts are short: few nodes matter more


def _write(graph: Graph, path: Path) -> None:
    """Trace a module and save its graph, the weights inside where protobuf can hold them."""
    import onnx_ir

    try:
        program = torch.onnx.export(
            graph.module.eval(),
            graph.samples,
            dynamo=True,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=graph.shapes,
            verbose=False,
        )
    except Exception as error:  # whatever torch raises, it is about this model
        raise PessaError(f"torch cannot export {path.name}\n{listed(str(error).splitlines())}") from error
    assert program is not None
    _check_axes(graph, program.model.graph.inputs)
    inside = sum(value.nbytes for value in graph.module.state_dict().values()) <= LARGEST
    onnx_ir.save(program.model, path, external_data=None if inside else f"{path.name}_data")


def _check_axes(graph: Graph, inputs: Any) -> None:
    """Raise PessaError when the exporter has fixed an axis that was to be free, as it may without a word."""
    shapes = [shape for one in graph.shapes for shape in (one if isinstance(one, list) else [one])]
    wanted = [(value.name, axis) for value, shape in zip(inputs, shapes, strict=True) for axis in shape]
    free = {
        (value.name, axis) for value in inputs for axis, size in enumerate(value.shape) if not isinstance(size, int)
    }
    fixed = [f"axis {axis} of {name}" for name, axis in wanted if (name, axis) not in free]
    if fixed:
        raise PessaError(f"torch fixed the size of what is free in {graph.file}\n{listed(fixed)}")


def _session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _error(found: list[Any], expected: Tensor) -> float:
    """Relative Frobenius error of the parts, one after the other in time."""
    whole = torch.cat([torch.from_numpy(part) for part in found], 1)
    return float((whole - expected).norm() / expected.norm())


def _write_side_files(reader: CheckpointReader, folder: Path, errors: dict[str, float]) -> None:
    """Config, tokenizer and whatever else a program needs to run the graphs, and pessa.json."""
    sources = visible_files(reader.folder)
    unlike = (CONFIG_FILE, MANIFEST_FILE, "README.md")  # these are about the folder they are in
    for name, path in sources.items():
        if name not in unlike and not name.endswith((*WEIGHT_SUFFIXES, ".py")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)
    config = {key: value for key, value in reader.config.items() if key not in ("quantization_config", "auto_map")}
    write_json(folder / CONFIG_FILE, config | {key: "float32" for key in ("dtype", "torch_dtype") if key in config})
    manifest = {
        "pessa": VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxscript", "onnxruntime")},
        "command": "export",
        "to": "onnx",
        "error": errors,
        "tolerance": TOLERANCE,
        "sha256": {name: sha256_of(path) for name, path in visible_files(folder).items()},
    }
    write_json(folder / MANIFEST_FILE, manifest)


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch's exporter says about packages that are not installed is of no use to a user."""
    logger = transformers.utils.logging.get_logger("torch.onnx")
    level = logger.level
    logger.setLevel(ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
