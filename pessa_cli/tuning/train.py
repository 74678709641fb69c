"""Training an adapter of HF PEFT with the Trainer of transformers, in one process or in several with Accelerate.

The adapter is written into a partial folder beside its destination, which is renamed when it is complete. A stopped
run leaves its checkpoints in the partial folder, for `--resume`.
"""

from __future__ import annotations

import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoTokenizer, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, WhisperProcessor

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.checkpoint.places import partial_output
from pessa_cli.checkpoint.staging import Staging, new_folder, run_identity
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import check_file, disk_error
from pessa_cli.common.version import VERSION
from pessa_cli.compat.for_transformers import bfloat16_is_fast, recomputing, use_one_device
from pessa_cli.models.instructions import EXAMPLE_FILES, form_of, read_rows
from pessa_cli.models.load import from_folder, load, quiet_transformers
from pessa_cli.surgery.model import Model
from pessa_cli.tuning.adapter_folder import finish
from pessa_cli.tuning.examples import SpeechData, collate_speech, collate_text, encode_text
from pessa_cli.tuning.options import TrainOptions, Tuning
from pessa_cli.tuning.registry import callbacks

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


SAMPLE_BATCHES = 16  # for methods that are initialised from data
CHECKPOINTS = "checkpoints"  # the word in messages for the parts that a stopped run leaves


@dataclass(frozen=True)
class TrainingStep:
    """A progress report.

    loss: the mean training loss since the last report. eval_loss: the loss on the evaluation data. One of them is None.
    """

    step: int
    first: int  # the step that this run resumed from, or 0
    steps: int
    epoch: float
    loss: float | None
    eval_loss: float | None
    learning_rate: float | None
    tokens_per_second: float
    seconds: float


Watch = Callable[[TrainingStep], None]


@dataclass(frozen=True)
class Job:
    """The model, the data, the destination of the adapter and the options of a run.

    source: the name that the user gave for the model. tensorboard: a folder for TensorBoard logs. watch: called with
    every TrainingStep, only in the first process.
    """

    model: Model
    data: Path
    out: Path
    tuning: Tuning
    source: str
    eval_data: Path | None = None
    force: bool = False
    resume: bool = False
    tensorboard: Path | None = None
    watch: Watch = lambda _: None

    @property
    def run(self) -> str:
        """A digest of model, options and data. Only a run with the same digest may resume from its checkpoints."""
        data = [None if path is None else sha256_of(path) for path in (self.data, self.eval_data)]
        return run_identity(self.model.reader, VERSION, self.tuning.to_dict(), data)


def tune(job: Job) -> dict[str, Any] | None:
    """Train an adapter and write it; returns the contents of pessa-tune.json, or None in all but the first process.

    Raises PessaError for data that do not fit the model, when the loss is not finite, and when the destination exists;
    UsageError for options that do not fit the model.
    """
    for path in filter(None, (job.data, job.eval_data)):
        check_file(path, EXAMPLE_FILES)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # deprecations inside transformers
        arguments = _arguments(job)  # first, because it also connects the processes
        with _staged(job) as (folder, staging):
            try:
                return _train(job, arguments, folder, staging)
            except (SafetensorError, RuntimeError) as error:
                if failed := disk_error(error):
                    raise failed from error
                raise


def _train(job: Job, arguments: TrainingArguments, folder: Path, staging: Staging | None) -> dict[str, Any] | None:
    """Train the adapter of a job and write it into a folder."""
    base = load(job.model, _dtype(job.tuning.train))
    if arguments.device.type != "mps":  # adapters start from decompositions, which MPS does not have
        base = base.to(arguments.device)
    collate, examples = _data(job, base, job.data)
    held_out = None if job.eval_data is None else _data(job, base, job.eval_data)[1]
    model = adapted(base, job.tuning, _steps(job.tuning, len(examples)), _sample(examples, collate, arguments))
    config = model.peft_config["default"]
    trainer = _trainer_class(config)(
        model=model, args=arguments, train_dataset=examples, eval_dataset=held_out, data_collator=collate
    )
    trainer.pop_callback(PrinterCallback)
    progress = ProgressCallback(trainer, job.watch, staging)
    for callback in [progress, *callbacks(config), *_tensorboard(job.tensorboard)]:
        trainer.add_callback(callback)
    done = trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
    trainer.save_model(str(folder))
    trainer.accelerator.wait_for_everyone()
    record = _record(job, model, trainer, done.metrics, len(examples))
    if staging is not None:
        finish(folder, record, map(asdict, progress.history))
    return None if staging is None else record


def _steps(tuning: Tuning, examples: int) -> int:
    """The number of optimizer steps of a run."""
    train = tuning.train
    return train.max_steps or math.ceil(math.ceil(examples / train.batch) * train.epochs)


def _sample(examples: Any, collate: Callable[..., dict[str, Tensor]], arguments: TrainingArguments) -> Any:
    """Yield the first SAMPLE_BATCHES batches, for methods initialised from data; the same in every process."""
    size = arguments.per_device_train_batch_size
    for start in range(0, min(len(examples), SAMPLE_BATCHES * size), size):
        rows = [examples[i] for i in range(start, min(start + size, len(examples)))]
        yield collate(rows)


def adapted(base: Any, tuning: Tuning, steps: int = 0, batches: Iterable[Mapping[str, Tensor]] = ()) -> PeftModel:
    """Put a new adapter on a model; all other parameters are frozen.

    steps: the length of the training, for AdaLoRA. batches: data for methods that are initialised from data. Raises
    UsageError for options and modules that do not fit the model.
    """
    from pessa_cli.tuning.registry import attach, build_config

    chosen = tuning.adapter
    targets = None if chosen.targets is None else list(chosen.targets)
    options = ({"total_step": steps} if chosen.method == "adalora" else {}) | dict(chosen.options)
    try:
        config = build_config(chosen.method, chosen.rank, targets, **options)
        if base.main_input_name != "input_features":
            config.task_type = "CAUSAL_LM"
        torch.manual_seed(tuning.train.seed)
        return attach(base, config, batches)
    except (ValueError, TypeError) as error:  # from PEFT, for modules that are missing or of unsupported types
        hint = (
            "name the modules to tune, for example --targets q_proj,v_proj" if targets is None else "change --targets"
        )
        raise UsageError(
            f"--method {chosen.method}: {error}", f"{hint}; other options are set in [adapter] of a recipe"
        ) from error


class TuneTrainer(Trainer):  # type: ignore[misc]
    """The Trainer of transformers with a count of the tokens it has trained on."""

    tokens = 0

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if model.training:
            mask = inputs.get("attention_mask")
            ids = inputs.get("input_ids", inputs["labels"])
            self.tokens += ids.numel() if mask is None else int(mask.sum())
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def _trainer_class(config: PeftConfig) -> type[TuneTrainer]:
    """The Trainer for a method: that of SORSA adds its regulariser to the loss."""
    if config.peft_type != "SORSA":
        return TuneTrainer
    from pessa_cli.tuning.tuner_sorsa import SorsaTrainer

    class RegularisedTrainer(SorsaTrainer, TuneTrainer):
        pass

    return RegularisedTrainer


class ProgressCallback(TrainerCallback):  # type: ignore[misc]
    """Reports progress, records complete checkpoints, and raises PessaError when the loss is not finite."""

    def __init__(self, trainer: TuneTrainer, watch: Watch, staging: Staging | None) -> None:
        self._trainer, self._watch, self._staging = trainer, watch, staging
        self._began = self._last = time.monotonic()
        self._tokens = self._first = 0
        self.history: list[TrainingStep] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._began = self._last = time.monotonic()
        self._first = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:  # noqa: ARG002
        loss, eval_loss = logs.get("loss"), logs.get("eval_loss")
        if loss is None and eval_loss is None:
            return
        if loss is not None and not math.isfinite(loss):
            raise PessaError(
                f"the loss is {loss} at step {state.global_step}", "give a lower --learning-rate, or --dtype float32"
            )
        now, tokens = time.monotonic(), self._trainer.tokens * args.world_size
        speed = (tokens - self._tokens) / (now - self._last) if loss is not None else 0.0
        if loss is not None:
            self._last, self._tokens = now, tokens
        step = TrainingStep(
            step=state.global_step,
            first=self._first,
            steps=state.max_steps,
            epoch=round(state.epoch or 0.0, 4),
            loss=loss,
            eval_loss=eval_loss,
            learning_rate=logs.get("learning_rate"),
            tokens_per_second=round(speed, 1),
            seconds=round(now - self._began, 2),
        )
        self.history.append(step)
        if self._staging is not None:
            self._watch(step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        self._trainer.accelerator.wait_for_everyone()  # each process saves its random state in the checkpoint
        if self._staging is not None:
            name = f"checkpoint-{state.global_step}"
            self._staging.done(name, sha256_of(self._staging.folder / name))


def _arguments(job: Job) -> TrainingArguments:
    """The options of a run for the Trainer.

    Raises UsageError when the batch cannot be split over the processes, and for float16 on a CPU.
    """
    train = job.tuning.train
    dtype = _dtype(train)
    plain = {name: getattr(train, name) for name in ("learning_rate", "weight_decay", "max_grad_norm", "seed")}
    arguments = TrainingArguments(
        output_dir=str(partial_output(job.out)),
        num_train_epochs=train.epochs,
        max_steps=train.max_steps or -1,
        lr_scheduler_type=train.schedule,
        warmup_steps=train.warmup,
        logging_steps=train.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # a loss that is not finite is an error, and must be logged
        eval_strategy="no" if job.eval_data is None else "steps" if train.eval_steps else "epoch",
        eval_steps=train.eval_steps or None,
        save_strategy="steps" if train.save_steps else "no",
        save_steps=train.save_steps or 500,
        save_total_limit=2,  # a run that is killed while it saves still has the previous checkpoint
        **recomputing(train.gradient_checkpointing),
        use_cpu=train.device == "cpu",
        bf16=dtype == torch.bfloat16,  # autocast: the adapter stays in float32
        fp16=dtype == torch.float16,  # autocast, and loss scaling
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=torch.cuda.is_available() and train.device != "cpu",
        ddp_find_unused_parameters=False,
        **plain,
    )
    use_one_device(arguments)
    micro = train.micro_batch or max(1, train.batch // arguments.world_size)
    if train.batch % (micro * arguments.world_size):
        raise UsageError(
            f"--batch {train.batch} is not a multiple of --micro-batch {micro} times {arguments.world_size} processes",
            "give another --batch or --micro-batch",
        )
    arguments.per_device_train_batch_size = arguments.per_device_eval_batch_size = micro
    arguments.gradient_accumulation_steps = train.batch // (micro * arguments.world_size)
    return arguments


def _dtype(train: TrainOptions) -> torch.dtype:
    """The dtype of the frozen weights. Raises UsageError for float16 on a CPU, which has no loss scaling."""
    on_accelerator = train.device != "cpu" and torch.accelerator.is_available()
    if train.dtype == "auto":
        return torch.bfloat16 if on_accelerator and bfloat16_is_fast() else torch.float32
    dtype: torch.dtype = getattr(torch, train.dtype)
    if dtype == torch.float16 and not on_accelerator:
        raise UsageError("--dtype float16 needs an accelerator, such as a GPU", "give --dtype float32 or bfloat16")
    return dtype


def _data(job: Job, base: Any, path: Path) -> tuple[Callable[..., dict[str, Tensor]], Any]:
    """The collator and the encoded examples for this kind of model.

    Raises PessaError for data of another kind, UsageError for options or models that training does not support.
    """
    rows, options, folder = read_rows(path), job.tuning.data, job.model.reader.folder
    speech = base.main_input_name == "input_features"
    spoken = [form_of(row) in (("audio", "text"), ("file", "text")) for row in rows]
    if speech != spoken[0] or len(set(spoken)) > 1:
        needs = "audio and text" if speech else "text alone"
        raise PessaError(
            f"{path} does not fit {job.source}, which is trained on {needs}",
            "give examples with audio and text to a speech model, and without audio to a language model",
        )
    if speech:
        if options.packing:
            raise UsageError(f"--packing is for text, but {job.source} is a speech model", "leave --packing out")
        options = replace(options, max_length=min(options.max_length, base.config.max_target_positions))
        return collate_speech, SpeechData(path, rows, from_folder(WhisperProcessor, folder, "processor"), options)
    if not base.can_generate():
        raise UsageError(
            f"{job.source} is a {type(base).__name__}, which cannot generate text", "give a language model"
        )
    tokenizer = from_folder(AutoTokenizer, folder, "tokenizer")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    return collate_text(pad), encode_text(path, rows, tokenizer, options)


@contextmanager
def _staged(job: Job) -> Iterator[tuple[Path, Staging | None]]:
    """The folder to write into, and the staging that renames it at the end; None in all but the first process."""
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()  # until the first process has made the folder
        yield partial_output(job.out), None
        return
    with new_folder(job.out, [job.model.reader.folder], job.force, job.resume, CHECKPOINTS) as staging:
        staging.begin(job.run)
        state.wait_for_everyone()
        yield staging.folder, staging


def _last_checkpoint(folder: Path) -> str | None:
    """The checkpoint of the highest step in a folder, or None."""
    steps = [int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")]
    return str(folder / f"checkpoint-{max(steps)}") if steps else None


def _tensorboard(folder: Path | None) -> list[TrainerCallback]:
    if folder is None:
        return []
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise PessaError("--tensorboard needs the package tensorboardX", "pip install 'pessa[tune]'") from error
    from transformers.integrations import TensorBoardCallback

    return [TensorBoardCallback(SummaryWriter(str(folder)))]


def _record(
    job: Job, model: PeftModel, trainer: TuneTrainer, metrics: Mapping[str, float], examples: int
) -> dict[str, Any]:
    """The contents of pessa-tune.json: versions, options, hashes of the data, and results."""
    packages = ("torch", "transformers", "peft", "accelerate")
    trainable, parameters = model.get_nb_trainable_parameters()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    held_out = job.eval_data
    return {
        "pessa": VERSION,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "command": "tune",
        "source": job.source,
        "options": job.tuning.to_dict(),
        "data": {"file": job.data.name, "sha256": sha256_of(job.data), "rows": examples},
        "eval_data": None if held_out is None else {"file": held_out.name, "sha256": sha256_of(held_out)},
        "trainable_parameters": trainable,
        "parameters": parameters,
        "processes": trainer.args.world_size,
        "steps": trainer.state.global_step,
        "loss": metrics["train_loss"],
        "eval_loss": losses[-1] if losses else None,
        "seconds": round(metrics["train_runtime"], 2),
    }
