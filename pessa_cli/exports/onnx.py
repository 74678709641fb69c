"""Exporting a model as ONNX graphs for onnxruntime, with the file and tensor names of optimum.

Whisper becomes encoder_model.onnx, decoder_model.onnx (for the prompt, without a cache) and
decoder_with_past_model.onnx (for the tokens after it). BERT becomes model.onnx. The exporter is torch.onnx.export with
dynamo=True. Each graph is run in onnxruntime with other shapes than those it was traced with, and its output is
compared with that of the model in transformers.
"""

from __future__ import annotations

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
from pessa_cli.blocks.site import AttentionSite
from pessa_cli.checkpoint.files import CONFIG_FILE, sha256_of, write_json
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.manifest import write_manifest
from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.checkpoint.staging import new_folder
from pessa_cli.common.errors import PessaError
from pessa_cli.common.memory import raise_if_out_of_memory
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import badness, listed
from pessa_cli.common.version import VERSION
from pessa_cli.exports.onnx_attention import CacheSlots, HeadByHead, kept_heads
from pessa_cli.exports.onnx_modules import Encoder, FirstPass, LaterPass, TextEncoder
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.surgery.block_io import read_site
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.side_files import UnknownWeights, copy_side_files, output_contents

TOLERANCE = 1e-4  # relative Frobenius error of a graph's output, the limit of `verify` for float32
LARGEST = 3 * 2**29  # bytes of weights inside a graph; protobuf allows 2 GiB, so larger weights get a file of their own
STEPS = (3, 1, 2)  # tokens of the prompt and of each later pass, when graphs are checked
ERROR = 40  # logging.ERROR
Arrays = dict[str, Any]
Check = Callable[[Callable[[str], Any]], dict[str, float]]  # sessions by file -> relative error by file


@dataclass(frozen=True)
class Graph:
    """A graph to export: its file, the module, sample inputs for tracing, and the names of inputs and outputs.

    shapes: the dynamic axes of each input, as torch.export expects them.
    """

    file: str
    module: nn.Module
    samples: tuple[Any, ...]
    shapes: tuple[Any, ...]
    inputs: list[str]
    outputs: list[str]


def export_onnx(
    folder: Path,
    out: Path,
    force: bool = False,
    progress: Progress = quietly,
    unknown_weights: UnknownWeights = "refuse",
) -> dict[str, float]:
    """Write a Whisper or BERT as ONNX graphs with its config and tokenizer; returns the relative error of each graph.

    Graphs are float32 with dynamic batch and sequence axes. The folder `out` appears only if every graph agrees with
    torch within TOLERANCE. Raises PessaError when onnxruntime is missing, for other models, and for disagreeing graphs.
    """
    _need_packages()
    with new_folder(out, [folder], force) as staging, torch.no_grad(), _quiet():
        model = open_model(folder)
        kind = model.reader.config.get("model_type")
        if kind not in ("whisper", "bert") or model.reader.config.get("is_decoder"):
            raise PessaError(
                f"{folder}: a {kind} {'decoder ' if kind == 'bert' else ''}cannot be exported to ONNX",
                "only whisper models and bert encoders can; for others `pessa export --layout dense`, then use optimum",
            )
        names = output_contents(model.reader, unknown_weights).copied
        staging.need(model.nbytes)
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
                "install other versions of onnxruntime and torch",
            )
        _write_side_files(model.reader, names, staging.folder, errors)
    return errors


def _need_packages() -> None:
    """Raise PessaError when a package of the `onnx` extra is missing."""
    try:
        import onnxruntime  # noqa: F401  # checks every graph
        import onnxscript  # noqa: F401  # torch's exporter needs it
    except ImportError as error:
        raise PessaError(
            f"--to onnx needs a package that is not installed: {error}", "pip install 'pessa[onnx]'"
        ) from error


def _whisper(model: Model, loaded: Any, tick: Callable[[int, int], None]) -> tuple[list[Graph], Check]:
    """The graphs of the encoder and of the decoder with and without a cache, and their check against transformers."""
    config = loaded.config
    if not isinstance(loaded, transformers.WhisperForConditionalGeneration):
        raise PessaError(
            f"{model.reader.folder} is a {type(loaded).__name__}, which cannot be exported to ONNX",
            "give a WhisperForConditionalGeneration",
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
    """The graph of the whole model and its check. Outputs have the names of transformers; the pooler's is left out."""
    config = loaded.config
    loaded.set_attn_implementation("eager")  # with this implementation the mask is added to the scores
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


def _cache_names(layers: int, kind: str) -> list[tuple[str, str]]:
    return [(f"{layer}.{kind}.key", f"{layer}.{kind}.value") for layer in range(layers)]


def _swap_attention(model: Model, loaded: Any, tick: Callable[[int, int], None]) -> None:
    """Replace each attention module by one that is only as wide as the kept directions."""
    names = ModuleNames(name for name, _ in loaded.named_modules())
    for site in model.attention:
        q, o = names.find(site.q), names.find(site.o)
        if q is None or o is None:
            raise PessaError(f"{type(loaded).__name__} has no module named {site.q}", "use the class it was saved from")
        place = q.rpartition(".")[0]
        attention = _attention(model.reader, site, float(loaded.get_submodule(place).scaling))
        if o.rpartition(".")[0] != place:  # BERT applies W_O outside its attention module
            loaded.set_submodule(o, attention.o)
            attention.o = nn.Identity()
        loaded.set_submodule(place, attention)
        tick(sum(model.reader.header[name].nbytes for name in site.tensors), 1)


def _attention(reader: CheckpointReader, site: AttentionSite, scaling: float) -> HeadByHead | CacheSlots:
    """The module for a block: slots where there is a cache or the input is short, otherwise head by head."""
    if not site.spec.sums_to_one:
        raise PessaError(
            f"{site.name}: its attention weights do not sum to one, which the ONNX modules rely on",
            "export with --layout dense, and use another exporter",
        )
    heads, o_bias = kept_heads(read_site(reader, site), scaling)
    if site.kind.startswith("decoder"):
        return CacheSlots(site.name, heads, o_bias)
    if reader.config["model_type"] == "whisper":
        return HeadByHead(heads, o_bias)
    key_width, value_width = max(1, *(len(head.k) for head in heads)), max(1, *(len(head.v) for head in heads))
    return CacheSlots(
        site.name, heads, o_bias, key_width, value_width
    )  # texts are short, so few graph nodes matter more


def _write(graph: Graph, path: Path) -> None:
    """Trace a module and save its graph, with the weights inside if protobuf allows their size."""
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
    except Exception as error:  # torch raises many types, all of them caused by this model
        raise_if_out_of_memory(error, f"export {path.name}")
        raise PessaError(
            f"torch cannot export {path.name}\n{listed(str(error).splitlines())}", "install another version of torch"
        ) from error
    assert program is not None
    _check_axes(graph, program.model.graph.inputs)
    inside = sum(value.nbytes for value in graph.module.state_dict().values()) <= LARGEST
    onnx_ir.save(program.model, path, external_data=None if inside else f"{path.name}_data")


def _check_axes(graph: Graph, inputs: Any) -> None:
    """Raise PessaError when the exporter has fixed the size of a dynamic axis, which it may do without a warning."""
    shapes = [shape for one in graph.shapes for shape in (one if isinstance(one, list) else [one])]
    wanted = [(value.name, axis) for value, shape in zip(inputs, shapes, strict=True) for axis in shape]
    free = {
        (value.name, axis) for value in inputs for axis, size in enumerate(value.shape) if not isinstance(size, int)
    }
    fixed = [f"axis {axis} of {name}" for name, axis in wanted if (name, axis) not in free]
    if fixed:
        raise PessaError(
            f"torch fixed the size of {len(fixed)} dynamic axes of {graph.file}\n{listed(fixed)}",
            "install another version of torch",
        )


def _session(path: Path) -> Any:
    """An onnxruntime session on the CPU with the threads of torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _run(session: Any, inputs: Arrays) -> Arrays:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def _error(found: list[Any], expected: Tensor) -> float:
    """The relative Frobenius error of the outputs of successive passes, concatenated in time."""
    whole = torch.cat([torch.from_numpy(part) for part in found], 1)
    return float((whole - expected).norm() / expected.norm())


def _write_side_files(reader: CheckpointReader, names: list[str], folder: Path, errors: dict[str, float]) -> None:
    """Copy the side files of the model, such as its tokenizer, and write config.json and pessa.json."""
    copy_side_files(reader.folder, folder, [name for name in names if not name.endswith(".py")], card=False)
    config = {key: value for key, value in reader.config.items() if key not in ("quantization_config", "auto_map")}
    write_json(folder / CONFIG_FILE, config | {key: "float32" for key in ("dtype", "torch_dtype") if key in config})
    about = {
        "pessa": VERSION,
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxscript", "onnxruntime")},
        "command": "export",
        "to": "onnx",
        "error": errors,
        "tolerance": TOLERANCE,
    }
    write_manifest(folder, about, {name: sha256_of(path) for name, path in visible_files(folder).items()})


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@contextmanager
def _quiet() -> Iterator[None]:
    """Turn off the messages of torch's exporter and of transformers, for example about packages that are not needed."""
    logger = transformers.utils.logging.get_logger("torch.onnx")
    level = logger.level
    logger.setLevel(ERROR)
    try:
        with quiet_transformers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
