"""A fine-tuning run as data: the one definition of the options of `pessa tune` and of the keys of its recipes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from pessa_cli.common.options import Range, at_least, check_options, option
from pessa_cli.common.toml import from_table, read_toml

POSITIVE = Range(lambda value: 0 < value < math.inf, "is not above 0", "give a finite number above 0")


@dataclass(frozen=True)
class AdapterOptions:
    """Which parameters are trained."""

    method: str = option("pessa", "Fine-tuning method: pessa (the default), sorsa, pica, svft, lora, dora, ...")
    rank: int | None = option(None, "Rank of the adapter, for methods that have one.")
    targets: tuple[str, ...] | None = option(
        None,
        "Names of the modules to adapt, e.g. q_proj,v_proj; the default depends on the method.",
        metavar="NAMES",
        example="q_proj",
    )
    options: Mapping[str, Any] = option(
        None, "Options of the method's own configuration class.", factory=dict, recipe_only=True
    )


@dataclass(frozen=True)
class DataOptions:
    """How examples become tokens. Raises UsageError for values out of range."""

    template: Literal["alpaca", "chat"] = option("alpaca", "Prompt format for instructions.")
    max_length: int = option(
        512, "Maximum number of tokens in an example; longer ones are cut at the end.", allowed=at_least(2)
    )
    mask_prompt: bool = option(True, "Compute the loss on the answers only.", recipe_only=True)
    packing: bool = option(False, "Put several examples into one row of max-length tokens; they do not see each other.")
    language: str | None = option(None, "Spoken language, for a multilingual Whisper.")

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class TrainOptions:
    """How long, how fast and on what a model is trained. Raises UsageError for values out of range."""

    learning_rate: float = option(1e-4, "Peak learning rate.", flags=("--learning-rate", "--lr"), allowed=POSITIVE)
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = option(
        "linear", "How the learning rate changes after the warm-up."
    )
    warmup: float = option(
        0.03, "Warm-up steps; a number below 1 is a share of all training steps.", allowed=at_least(0)
    )
    epochs: float = option(1.0, "Number of passes over the training data.", allowed=POSITIVE)
    max_steps: int = option(
        0, "Stop after this many training steps; 0 for as many as the epochs have.", allowed=at_least(0)
    )
    batch: int = option(16, "Examples in each training step, over all processes.", allowed=at_least(1))
    micro_batch: int = option(
        0,
        "Examples that one process computes at the same time; fewer need less memory. 0 for all of a step.",
        allowed=at_least(0),
    )
    weight_decay: float = option(0.0, "Weight decay of AdamW.", allowed=at_least(0), recipe_only=True)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.", allowed=at_least(0), recipe_only=True)
    seed: int = option(0, "Random seed for the order of the data and the initial adapter.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Dtype of the frozen weights; auto is bfloat16 on an accelerator that has it, else float32.",
    )
    device: Literal["auto", "cpu"] = option("auto", "Device to train on; auto is an accelerator if there is one.")
    gradient_checkpointing: bool = option(
        False, "Recompute activations in the backward pass: less memory, about a third more time."
    )
    log_steps: int = option(10, "Training steps between progress reports.", allowed=at_least(1))
    eval_steps: int = option(
        0, "Training steps between evaluations on --eval-data; 0 for one after each epoch.", allowed=at_least(0)
    )
    save_steps: int = option(
        500, "Training steps between checkpoints for --resume; 0 for no checkpoints.", allowed=at_least(0)
    )

    def __post_init__(self) -> None:
        check_options(self)


@dataclass(frozen=True)
class Tuning:
    """All options of a run: its fields are the tables of a recipe."""

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
        """The tables and their values, as pessa-tune.json has them."""
        return asdict(self)


def load_tuning(path: Path) -> Tuning:
    """The recipe in a TOML file. Raises UsageError for keys that do not exist and values that make no sense."""
    tables = {"adapter": AdapterOptions, "data": DataOptions, "train": TrainOptions}
    content = read_toml(path, *tables)
    return Tuning(**{name: from_table(kind, path, name, content.get(name, {})) for name, kind in tables.items()})
