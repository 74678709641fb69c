"""`pessa bench`: measures time, memory and size of two models on the same inputs, each in its own process.

Both processes stay alive and their runs alternate, so that other load on the machine affects both models alike, and
the peak memory of each process is that of one model. The models run with the default settings of transformers.
"""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import file_size
from pessa_cli.common.memory import MORE_MEMORY, out_of_memory
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.values import check_device
from pessa_cli.models.hooks import output_of
from pessa_cli.models.inputs import Inputs, random_signal, random_speech, random_tokens, with_decoder_ids
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.surgery.model import Model

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
PAUSE = 0.05  # seconds between two runs, after which idle threads of the other process no longer spin
LENGTH = 128  # tokens of a text model's input, unless it has fewer positions


@dataclass(frozen=True)
class BenchSettings:
    """How both models run.

    threads: None for the default of torch. batch: inputs per run. tokens: the number to generate. rounds: timed runs of
    each kind and model. Raises UsageError for values that cannot be used.
    """

    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    batch: int = 1
    tokens: int = 32
    rounds: int = 5

    def __post_init__(self) -> None:
        for name in ("threads", "batch", "tokens", "rounds"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value} is less than 1", "give 1 or more")
        if self.dtype not in DTYPES:
            raise UsageError(f"--dtype {self.dtype} is unknown", f"give one of {', '.join(DTYPES)}")
        check_device(self.device, self.dtype)


@dataclass(frozen=True)
class Measurement:
    """One quantity of both models, where smaller is better.

    unit: seconds, bytes or parameters. runs: for times, the seconds of each run of the reference and of the candidate.
    """

    name: str
    unit: str
    reference: float
    candidate: float
    runs: tuple[list[float], list[float]] = field(default=([], []))

    @property
    def ratio(self) -> float | None:
        """The candidate's value divided by the reference's, None where that is 0."""
        return self.candidate / self.reference if self.reference else None


@dataclass(frozen=True)
class Bench:
    """The result of `bench`, with the number of threads and the processor that the models ran on."""

    settings: BenchSettings
    threads: int
    processor: str
    measures: list[Measurement]

    def to_dict(self) -> dict[str, Any]:
        settings = asdict(self.settings) | {"threads": self.threads, "processor": self.processor}
        return {"settings": settings, "measures": [asdict(m) | {"ratio": m.ratio} for m in self.measures]}


def bench_models(
    reference: Model, candidate: Model, settings: BenchSettings | None = None, progress: Progress = quietly
) -> Bench:
    """Run both models in turn and measure time, memory and size.

    Times are medians over the rounds. Only one model runs at a time, the order of the two changes from round to round,
    and an untimed run of each kind comes first. Raises PessaError when the models are of different types or one cannot
    be run.
    """
    settings = settings or BenchSettings()
    configs = reference.reader.config, candidate.reader.config
    types = [f"{config.get('model_type')} of architectures {config.get('architectures')}" for config in configs]
    if types[0] != types[1]:
        raise PessaError(
            f"{reference.reader.folder} is a {types[0]}, but {candidate.reader.folder} is a {types[1]}",
            "compare a model with the one that it was made from",
        )
    with ExitStack() as running:
        workers = [running.enter_context(_worker(model, settings)) for model in (reference, candidate)]
        kinds, _ = (worker.ask("kinds") for worker in workers)
        total = len(kinds) * (settings.rounds + 1)
        with progress("running", 0, total) as tick:
            seconds = {kind: _alternate(workers, kind, settings.rounds, tick) for kind in kinds}
        facts = [worker.ask("facts") for worker in workers]
    times = [Measurement(kind, "seconds", median(a), median(b), (a, b)) for kind, (a, b) in seconds.items()]
    sizes = [
        Measurement(name, unit, facts[0][name], facts[1][name])
        for name, unit in (("peak memory", "bytes"), ("cache", "bytes"), ("parameters", "parameters"))
        if name in facts[0]
    ]
    disk = [sum(file_size(model.reader.folder / f) for f in model.reader.files) for model in (reference, candidate)]
    files = Measurement("weights on disk", "bytes", disk[0], disk[1])
    return Bench(settings, facts[0]["threads"], facts[0]["processor"], [*times, *sizes, files])


def _alternate(
    workers: list[_Worker], kind: str, rounds: int, tick: Callable[[int, int], None]
) -> tuple[list[float], list[float]]:
    """Time one kind of run in both models by turns; returns the seconds of each run, first and second model."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for which in (0, 1) if i % 2 else (1, 0):
            time.sleep(PAUSE)
            taken = workers[which].ask(kind)
            if i > 0:  # the first round is a warm-up
                seconds[which].append(taken)
        tick(0, 1)
    return seconds


@dataclass(frozen=True)
class _Worker:
    """The process that runs one model, and the pipe to it."""

    folder: Path
    process: Any
    pipe: Connection

    def ask(self, question: str) -> Any:
        """Send a question and wait for the answer of `Runner.answer`. Raises PessaError when the process fails."""
        try:
            self.pipe.send(question)
            answer = self.pipe.recv()
        except (EOFError, OSError) as error:
            self.process.join(5)
            raise PessaError(
                f"the process that ran {self.folder} ended with code {self.process.exitcode}",
                "a negative code is a signal; -9 usually means that memory ran out: try a smaller --batch",
            ) from error
        if isinstance(answer, PessaError):
            raise answer
        return answer


@contextmanager
def _worker(model: Model, settings: BenchSettings) -> Iterator[_Worker]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    # A daemon process ends together with this one.
    process = context.Process(target=_serve, args=(model, settings, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield _Worker(model.reader.folder, process, ours)
    finally:
        ours.close()  # ends the loop in _serve
        process.join(5)
        process.kill()


def _serve(model: Model, settings: BenchSettings, pipe: Connection) -> None:
    """The main function of a worker process: answer questions about one model until the pipe is closed."""
    runner: Runner | None = None
    while True:
        try:
            question = pipe.recv()
        except (EOFError, KeyboardInterrupt):
            return
        try:
            runner = runner or Runner(model, settings)
            pipe.send(runner.answer(question))
        except PessaError as error:
            pipe.send((UsageError if isinstance(error, UsageError) else PessaError)(error.message, error.hint))
        except Exception as error:  # torch and transformers raise many types, all of them caused by this model
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            hint = MORE_MEMORY if out_of_memory(error) else "try another --dtype"
            pipe.send(PessaError(f"{model.reader.folder} cannot be run on {settings.device}: {reason}", hint))


class Runner:
    """One loaded model and the kinds of runs to time: "forward" and, if the model has it, "encoder" and "generate"."""

    def __init__(self, model: Model, settings: BenchSettings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self.settings = settings
        self.device = torch.device(settings.device)
        with quiet_transformers():
            self.model = load(model, DTYPES[settings.dtype]).to(self.device)
        self.inputs = self._inputs(model.reader.folder)
        self.cache = 0
        self.kinds: dict[str, Callable[[], object]] = {"forward": lambda: output_of(self.model, self.inputs)}
        if self.model.config.is_encoder_decoder:
            self.kinds["encoder"] = lambda: self.model.get_encoder()(self.inputs[self.model.main_input_name])
        if self.model.can_generate():
            self.kinds["generate"] = self._generate

    def _inputs(self, folder: Path) -> Inputs:
        """Built-in inputs, which are the same for every model of the same shape."""
        model, batch, tokens = self.model, self.settings.batch, self.settings.tokens
        limits = (getattr(model.config, name, None) for name in ("max_target_positions", "max_position_embeddings"))
        room = next((limit for limit in limits if limit), LENGTH + tokens)
        if model.can_generate() and tokens >= room:
            raise UsageError(
                f"--tokens {tokens}: this model has {room} positions, one of them for the start token",
                f"give at most {room - 1}",
            )
        if model.config.model_type == "whisper":
            inputs = random_speech(model, batch)
        elif model.main_input_name != "input_ids":
            inputs = random_signal(folder, model, batch)
        else:
            length = min(LENGTH, room - tokens if model.can_generate() else room)
            inputs = with_decoder_ids(model, random_tokens(model, batch, length))
        return {name: _moved(value, self.device, model.dtype) for name, value in inputs.items()}

    def _generate(self) -> None:
        """Generate exactly `tokens` tokens greedily, and measure the key/value cache.

        This calls GenerationMixin.generate, because Whisper's own generate decodes again at a higher temperature when
        the result is repetitive or improbable.
        """
        tokens, model = self.settings.tokens, self.model
        prompt = {name: value for name, value in self.inputs.items() if name != "decoder_input_ids"}
        with quiet_transformers():
            found = GenerationMixin.generate(
                model,
                **prompt,
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
                num_beams=1,
                return_dict_in_generate=True,
            )
        self.cache = cache_bytes(found.past_key_values)

    def answer(self, question: str) -> Any:
        """Answer "kinds" with their names, "facts" with sizes, and the name of a kind with the seconds of one run."""
        if question == "kinds":
            return list(self.kinds)
        if question == "facts":
            return self._facts()
        with torch.inference_mode():
            self._wait()
            start = time.perf_counter()
            self.kinds[question]()
            self._wait()
            return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _facts(self) -> dict[str, Any]:
        cuda = self.device.type == "cuda"
        facts: dict[str, Any] = {
            "peak memory": torch.cuda.max_memory_allocated(self.device) if cuda else peak_memory(),
            "parameters": self.model.num_parameters(),
            "threads": torch.get_num_threads(),
            "processor": torch.cuda.get_device_name(self.device) if cuda else torch.backends.cpu.get_cpu_capability(),
        }
        return facts | ({"cache": self.cache} if self.cache else {})


def _moved(value: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return value.to(device, dtype) if value.is_floating_point() else value.to(device)


def cache_bytes(cache: Any) -> int:
    """The bytes of all keys and values in a cache, self- and cross-attention together. Shared storage counts once."""
    parts = [getattr(cache, name) for name in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, name)]
    layers = [layer for part in parts or [cache] for layer in part.layers]
    tensors = [value for layer in layers for value in vars(layer).values() if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def peak_memory() -> int:
    """The peak resident memory of this process in bytes, including its libraries."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would start a child with the peak of its parent
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
