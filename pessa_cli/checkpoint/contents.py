"""The files of a model folder by their names: which of them an output takes over unchanged, and which it leaves out."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from pessa_cli.common.text import listed

INDEX_SUFFIX = ".index.json"
# Files that hold weights, whatever their format. What an output does with them depends on their names.
WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".onnx_data", ".gguf", ".ggml"),
    *(".ot", ".distcp", ".tflite", ".mlmodel", INDEX_SUFFIX),
)
TRAINING, COPY, ADAPTER = "state of a training run", "another copy of the weights", "an adapter, which is not merged"
UNFINISHED, HIDDEN, CHOSEN = "an unfinished download", "hidden", "unknown weights"
# The patterns are those of a .gitignore file: "/name" matches in the model's folder only, "name/" matches a folder.
LEFT_OUT: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        TRAINING,
        (
            *("optimizer*.pt", "optimizer*.bin", "optimizer*.safetensors", "scheduler*.pt", "scheduler*.bin"),
            *("scaler*.pt", "rng_state*.pth", "random_states_*.pkl", "sampler*.bin", "dataloader*.bin"),
            *("custom_checkpoint_*.pkl", "training_args.bin", "trainer_state.json", "*.distcp", "zero_to_fp32.py"),
            *("events.out.tfevents*", "/latest", "zero_pp_rank_*", "mp_rank_*"),
            *("global_step*/", "checkpoint-*/", "runs/", "wandb/", "__pycache__/"),
            *("pytorch_model_fsdp_*/", "optimizer_*/"),
        ),
    ),
    (
        COPY,
        (
            *("/pytorch_model*", "/model-*-of-*.safetensors", "/model.*.safetensors", "/model.fp*.safetensors"),
            *("/model.safetensors", "/consolidated*.safetensors", "/consolidated*.pth", "/*.index.json"),
            *("/*.index.*.json", "/tf_model*", "/flax_model*", "/rust_model.ot", "/model.bin", "/weights.npz"),
            *("*.gguf", "*.ggml", "*.onnx", "*.onnx_data", "*.onnx.data", "*.tflite", "*.mlmodel"),
            *("/original/", "/onnx/", "/openvino/", "/coreml/", "/metal/", "*.mlpackage/"),
        ),
    ),
    (ADAPTER, ("/adapter_config.json", "/adapter_model*.safetensors", "/adapter_model*.bin")),
    (UNFINISHED, ("*.incomplete", "*.part", "*.partial", "*.crdownload", "*.aria2")),
)
# Weights beside those of the transformer that are part of the model: the heads of BGE-M3, the languages of MMS, and the
# language model of a speech recogniser.
CARRIED = ("/colbert_linear.pt", "/sparse_linear.pt", "/adapter.*.safetensors", "/adapter.*.bin", "language_model/")
MODULES_FILE = "modules.json"  # of sentence-transformers: the folders beside it hold modules of the model


@dataclass(frozen=True)
class Contents:
    """The files beside the weights that are read, as names relative to the folder.

    copied: are in the output, byte for byte. left_out: are not, with the reason; a folder is one entry, with a slash.
    unknown: weights of which the names do not tell whether they belong to the model.
    """

    copied: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


def contents_of(files: Iterable[str], own: Collection[str]) -> Contents:
    """Sort the files of a model folder by what an output does with them.

    own: files that the output has in a form of its own, such as config.json and the weights that are read.
    """
    names = sorted(files)
    found, modules = Contents(), MODULES_FILE in names
    for name in names:
        if name in own:
            continue
        reason = why_left_out(name)
        if reason is not None:
            found.left_out[reason[0]] = reason[1]
        elif name.endswith(WEIGHT_SUFFIXES) and not (modules and "/" in name) and matched(name, CARRIED) is None:
            found.unknown.append(name)
        else:
            found.copied.append(name)
    return found


def why_left_out(name: str) -> tuple[str, str] | None:
    """Return what of this name is left out, the file or a folder that it is in, and why; None for other files."""
    found = [(part, reason) for reason, patterns in LEFT_OUT if (part := matched(name, patterns)) is not None]
    return min(found, key=lambda match: len(match[0]), default=None)


def is_training_state(name: str) -> bool:
    """Return whether a file is the state of a training run, by its name; that of a folder ends with a slash."""
    found = why_left_out(name)
    return found is not None and found[1] == TRAINING


def matched(name: str, patterns: Sequence[str]) -> str | None:
    """Return the first part of a relative name that one of the patterns matches: one of its folders, or all of it."""
    parts = name.split("/")
    for depth, part in enumerate(parts):
        last = depth + 1 == len(parts)
        shown = part if last else f"{part}/"
        for pattern in patterns:
            if not (pattern.startswith("/") and depth) and fnmatchcase(shown, pattern.removeprefix("/")):
                return name if last else "/".join(parts[: depth + 1]) + "/"
    return None


def left_out_text(left_out: Mapping[str, str]) -> str:
    """Format what is left out in one line for each reason, without hidden files; empty if there is nothing else."""
    reasons = dict.fromkeys(reason for reason in left_out.values() if reason != HIDDEN)
    lines = []
    for reason in reasons:
        names = [name for name, why in left_out.items() if why == reason]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"{', '.join(names[:4])}{more}: {reason}")
    return listed(lines)
