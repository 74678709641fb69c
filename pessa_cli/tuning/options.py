"""The options of a fine-tuning run, from the command line and a recipe, checked before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import UsageError
from pessa_cli.common.toml import checked, read_toml

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
DTYPES = ("auto", "float32", "bfloat16", "float16")
TEMPLATES = ("alpaca", "chat")
_NUMBER = (int, float)


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} {value!r} is unknown", f"give one of {', '.join(choices)}")


def _at_least(name: str, value: float, least: int) -> None:
    if not least <= value < math.inf:
        raise UsageError(f"{name} {value:g} is out of range", f"give a finite number of {least} or more")


@dataclass(frozen=True)
class AdapterOptions:
    """What is trained: a method of `tuning.registry`, its rank, the modules to adapt, and options of the method."""

    method: str = "pessa"
    rank: int | None = None
    targets: tuple[str, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DataOptions:
    """How examples are encoded.

    template: the prompt template of instructions. max_length: tokens per example; longer ones are truncated.
    mask_prompt: whether the loss ignores the prompt. packing: whether several examples share a row without attending to
    each other. language: of the speech, for a multilingual Whisper. Raises UsageError for values out of range.
    """

    template: str = "alpaca"
    max_length: int = 512
    mask_prompt: bool = True
    packing: bool = False
    language: str | None = None

    def __post_init__(self) -> None:
        _one_of("template", self.template, TEMPLATES)
        _at_least("max_length", self.max_length, 2)


@dataclass(frozen=True)
class TrainOptions:
    """Schedule, batch sizes, dtype and device of the training.

    learning_rate: its peak. batch: examples per optimizer step, over all processes. micro_batch: examples per forward
    pass in one process; 0 for all of its step. warmup: a number of steps or, below 1, a share of all steps. max_steps:
    0 for as many as the epochs need. eval_steps: 0 for once per epoch. save_steps: 0 for no checkpoints. dtype: of the
    frozen weights; auto is bfloat16 on an accelerator and float32 on the CPU. Raises UsageError for other values.
    """

    learning_rate: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.03
    epochs: float = 1.0
    max_steps: int = 0
    batch: int = 16
    micro_batch: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "auto"
    device: str = "auto"
    gradient_checkpointing: bool = False
    log_steps: int = 10
    eval_steps: int = 0
    save_steps: int = 500

    def __post_init__(self) -> None:
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("device", self.device, ("auto", "cpu"))
        for name in ("batch", "log_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_steps", "micro_batch", "warmup", "weight_decay", "max_grad_norm", "eval_steps", "save_steps"):
            _at_least(name, getattr(self, name), 0)
        for name in ("learning_rate", "epochs"):
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise UsageError(f"{name} {value:g} is not above 0", "give a finite number above 0")


@dataclass(frozen=True)
class Tuning:
    """All options of a run, in the three tables of a recipe."""

    adapter: AdapterOptions = AdapterOptions()
    data: DataOptions = DataOptions()
    train: TrainOptions = TrainOptions()

    def changed(self, **options: Any) -> Tuning:
        """A copy with other values. Each goes into the table with a field of its name; None keeps the present value."""
        given = {name: value for name, value in options.items() if value is not None}
        tables = {f.name: getattr(self, f.name) for f in fields(self)}
        return Tuning(
            **{
                name: replace(table, **{f.name: given[f.name] for f in fields(table) if f.name in given})
                for name, table in tables.items()
            }
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


_Types = Mapping[str, type | tuple[type, ...]]
_ADAPTER: _Types = {"method": str, "rank": int, "targets": list, "options": dict}
_DATA: _Types = {"template": str, "max_length": int, "mask_prompt": bool, "packing": bool, "language": str}
_FLOATS = ("learning_rate", "warmup", "epochs", "weight_decay", "max_grad_norm")
_WORDS = ("schedule", "dtype", "device")
_TRAIN: _Types = {
    **{f.name: _NUMBER if f.name in _FLOATS else str if f.name in _WORDS else int for f in fields(TrainOptions)},
    "gradient_checkpointing": bool,
}


def load_tuning(path: Path) -> Tuning:
    """Read a recipe from a TOML file. Raises UsageError for unknown keys, wrong types and values out of range."""
    content = read_toml(path, "adapter", "data", "train")
    adapter = checked(path, "adapter", content.get("adapter", {}), _ADAPTER)
    if "targets" in adapter:
        adapter["targets"] = tuple(adapter["targets"])
    data = checked(path, "data", content.get("data", {}), _DATA)
    train = checked(path, "train", content.get("train", {}), _TRAIN)
    try:
        return Tuning(AdapterOptions(**adapter), DataOptions(**data), TrainOptions(**train))
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from None
