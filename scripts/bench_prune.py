"""Compare whole `pessa` processes with copying, and with another checkout: time, CPU time and peak memory.

Each round copies the folder (`cp -rL`, then `sync -f`), decomposes it, prunes it, and prunes what was decomposed, one
after the other; with --before the other checkout takes its turn at each step. Each figure is the median over the
rounds. Outputs are removed after each run, and the disk is synced before it. The folder lies in the page cache wherever
memory allows.

    python scripts/make_synthetic.py whisper-large-v3 synthetic/whisper-large-v3
    python scripts/bench_prune.py synthetic/whisper-large-v3 [--rounds 3] [--jobs 1 2] [--before ../before]

With --calibrate DATA only a calibrated prune to a budget (--target-attention 0.6) is measured, on one thread, and its
CPU time is divided: into the model's own forward and backward passes, the hooks that add up statistics, imports of
packages, loading (weights, tokenizer or processor), and the rest.

    python scripts/bench_prune.py models/whisper-tiny.en --calibrate models/speech/beckett.wav --before ../before
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# No torch in this process: a child's peak memory starts from that of its parent.

HERE = Path(__file__).resolve().parent.parent
BUDGET = ["--target-attention", "0.6", "--jobs", "1"]
KINDS = ("model", "hooks", "imports", "loading", "rest")


class Cost(NamedTuple):
    """What a process and its children took: seconds, seconds of all cores, and bytes at the peak of the largest."""

    wall: float
    cpu: float
    peak: float


def run(command: Sequence[str], threads: int | None) -> Cost:
    """Run a command to its end. Raises SystemExit with its messages when it fails."""
    environment = dict(os.environ) | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    os.sync()
    with tempfile.TemporaryFile() as log:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} failed\n{log.read().decode()}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def command_of(checkout: Path) -> list[str]:
    """A command line that runs the `pessa` of a checkout in this environment."""
    return [sys.executable, str(Path(__file__).resolve()), "--child", str(checkout.resolve())]


def measure(
    folder: Path,
    place: Path,
    rounds: int,
    jobs: list[int],
    threads: int | None,
    rule: list[str],
    checkouts: dict[str, Path],
) -> dict[str, list[Cost]]:
    """The costs of each step, by its name, in the order of a round; outputs go below `place`."""
    costs: dict[str, list[Cost]] = {}
    sizes: dict[str, int] = {}

    def step(name: str, command: Sequence[str], out: Path, keep: bool = False) -> None:
        cost = run(command, threads)
        costs.setdefault(name, []).append(cost)
        sizes.setdefault(name, folder_size(out))
        print(f"{name}: {cost.wall:.2f} s, {sizes[name] / 1e9:.2f} GB", file=sys.stderr, flush=True)
        if not keep:
            shutil.rmtree(out)

    for _ in range(rounds):
        copy, pruned, decomposed = place / "copy", place / "pruned", place / "decomposed"
        step("cp, sync", ["sh", "-c", 'cp -rL "$0" "$1" && sync -f "$1"', str(folder), str(copy)], copy)
        for more in [["--jobs", str(count)] for count in jobs] or [[]]:
            for title, checkout in checkouts.items():
                pessa, label = command_of(checkout), " ".join([title, *more])
                step(f"prune{label}", [*pessa, "prune", str(folder), *rule, *more, "-o", str(pruned)], pruned)
                command = [*pessa, "decompose", str(folder), *more, "-o", str(decomposed)]
                step(f"decompose{label}", command, decomposed, keep=True)
                command = [*pessa, "prune", str(decomposed), *rule, *more, "-o", str(pruned)]
                step(f"prune, decomposed{label}", command, pruned)
                shutil.rmtree(decomposed)
    return costs


def show(costs: dict[str, list[Cost]]) -> None:
    medians = {name: Cost(*map(statistics.median, zip(*found, strict=True))) for name, found in costs.items()}
    base = next(iter(medians.values()))
    print(f"{'':28}{'seconds':>9}{'ratio':>8}{'CPU s':>9}{'ratio':>8}{'peak MB':>10}")
    for name, cost in medians.items():
        times = f"{cost.wall:9.2f}{cost.wall / base.wall:8.2f}{cost.cpu:9.2f}{cost.cpu / base.cpu:8.2f}"
        print(f"{name:28}{times}{cost.peak / 1e6:10.0f}")


def measure_calibrated(folder: Path, data: Path, place: Path, rounds: int, checkouts: dict[str, Path]) -> None:
    """Print the CPU seconds of a calibrated prune in each checkout by what they went to, medians over the rounds."""
    found: dict[str, list[dict[str, float]]] = {}
    for _ in range(rounds):
        for title, checkout in checkouts.items():
            out, figures = place / "out", place / "figures.json"
            arguments = ["prune", str(folder), *BUDGET, "--calibrate", str(data), "-o", str(out)]
            run([*command_of(checkout), "--figures", str(figures), *arguments], threads=1)
            shutil.rmtree(out)
            found.setdefault(title.strip(" ,") or "now", []).append(json.loads(figures.read_text()))
    medians = {
        title: {kind: statistics.median(each[kind] for each in rounds_) for kind in KINDS}
        for title, rounds_ in found.items()
    }
    print(f"{'CPU seconds':24}" + "".join(f"{title:>10}" for title in medians))
    for kind in KINDS:
        print(f"{kind:24}" + "".join(f"{each[kind]:10.2f}" for each in medians.values()))
    for title, left_out in (("all but model", ("model",)), ("and but imports", ("model", "imports"))):
        sums = [sum(each[kind] for kind in KINDS if kind not in left_out) for each in medians.values()]
        print(f"{title:24}" + "".join(f"{total:10.2f}" for total in sums) + f"   {sums[-1] / sums[0]:.2f} of the first")


class Ledger:
    """The CPU seconds of this process by what they go to: the innermost of what is going on."""

    def __init__(self) -> None:
        self.spent: defaultdict[str, float] = defaultdict(float)
        self._open = ["rest"]
        self._last = time.process_time()

    def settle(self) -> None:
        now = time.process_time()
        self.spent[self._open[-1]] += now - self._last
        self._last = now

    @contextmanager
    def on(self, kind: str) -> Iterator[None]:
        self.settle()
        self._open.append(kind)
        try:
            yield
        finally:
            self.settle()
            self._open.pop()

    def counted(self, function: Callable[..., Any], kind: str) -> Callable[..., Any]:
        """The function, with its time counted as of this kind, but for calls within one of the same kind."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self._open[-1] == kind:
                return function(*args, **kwargs)
            with self.on(kind):
                return function(*args, **kwargs)

        return call


def instrument(ledger: Ledger) -> None:
    """Count calls of modules and gradients as the model's, and hooks, imports and loading as what they are."""
    with ledger.on("imports"):
        import torch
        import transformers
    from importlib.machinery import SourceFileLoader

    torch.set_num_threads(1)
    module: Any = torch.nn.Module
    module.__call__ = ledger.counted(module.__call__, "model")
    torch.autograd.grad = ledger.counted(torch.autograd.grad, "model")
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        register = getattr(module, name)

        def registered(self: Any, hook: Any, register: Any = register, **options: Any) -> Any:
            return register(self, ledger.counted(hook, "hooks"), **options)

        setattr(module, name, registered)
    loader: Any = SourceFileLoader
    loader.exec_module = ledger.counted(loader.exec_module, "imports")
    loader.get_code = ledger.counted(loader.get_code, "imports")
    for kind in (transformers.PreTrainedModel, transformers.AutoProcessor, transformers.AutoTokenizer):
        kind.from_pretrained = classmethod(ledger.counted(kind.from_pretrained.__func__, "loading"))


def child(checkout: Path, arguments: list[str]) -> None:
    """Run the `pessa` of a checkout in this process; with --figures FILE its CPU seconds go there, by kind."""
    sys.path.insert(0, str(checkout))
    named = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]["pessa"]
    module, _, function = named.partition(":")
    ledger, figures = Ledger(), None
    if arguments[0] == "--figures":
        figures, arguments = Path(arguments[1]), arguments[2:]
        instrument(ledger)
    sys.argv = ["pessa", *arguments]
    code: Any = 0
    try:
        getattr(importlib.import_module(module), function)()
    except SystemExit as leaving:
        code = leaving.code
    if figures is not None:
        ledger.settle()
        figures.write_text(json.dumps({kind: ledger.spent[kind] for kind in KINDS}))
    sys.exit(code)


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="*", default=[], help="run pessa with each of these --jobs")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the processes (default: as it is)")
    parser.add_argument("--qk-thr", type=float, default=5e-3)
    parser.add_argument("--vo-thr", type=float, default=5e-3)
    parser.add_argument("--target", type=Path, help="where to write (default: beside the folder)")
    parser.add_argument("--before", type=Path, help="another checkout of pessa to compare with")
    parser.add_argument("--calibrate", type=Path, metavar="DATA", help="measure a calibrated prune on these data")
    args = parser.parse_args()
    checkouts = {"": HERE} if args.before is None else {", before": args.before, "": HERE}
    rule = ["--qk-thr", str(args.qk_thr), "--vo-thr", str(args.vo_thr)]
    target = args.target or args.folder.resolve().parent
    with tempfile.TemporaryDirectory(prefix="bench-prune-", dir=target) as place:
        if args.calibrate is not None:
            measure_calibrated(args.folder, args.calibrate, Path(place), args.rounds, checkouts)
            return
        costs = measure(args.folder, Path(place), args.rounds, args.jobs, args.threads, rule, checkouts)
    size = folder_size(args.folder) / 1e9
    print(f"{args.folder}, {size:.2f} GB, {os.cpu_count()} cores, medians of {args.rounds}")
    show(costs)


if __name__ == "__main__":
    main()
