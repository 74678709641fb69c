"""Give each reader of files many hostile files: `python scripts/fuzz.py --cases 100000`.

It prints for each reader how many files were read and how many refused, the slowest case, and the most memory; and each
kind of failure with the number of a case, which `--reader NAME --first NUMBER --cases 1` runs again. What is a failure
is said in tests/helpers/fuzzing.py. `--whole` runs whole commands on hostile models instead, of
tests/helpers/hostile.py, as tests/sources/test_hostile.py does.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import hostile
import torch
from fuzzing import make_fuzzers
from hypothesis import HealthCheck, Phase, given, seed, settings

from pessa_cli.common.errors import PessaError

CHUNK = 1000  # cases that a process runs before it returns its results
HANGS = 60  # seconds after which a process that no signal reaches is ended, with its traceback
EVERY = 20  # one case in so many is measured, because that takes three times as long


@dataclass
class Found:
    """The outcomes of some cases; `failures` has a case for each kind."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: dict[str, str] = field(default_factory=dict)
    slowest: float = 0.0
    memory: int = 0

    def add(self, other: Found) -> None:
        self.counts += other.counts
        self.failures = other.failures | self.failures
        self.slowest, self.memory = max(self.slowest, other.slowest), max(self.memory, other.memory)


def run_readers(name: str, numbers: range) -> Found:
    """Run the cases of these numbers of a reader."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = Found()
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        fuzzer = make_fuzzers(Path(folder))[name]
        with suppress(PessaError):
            fuzzer.read(fuzzer.folder / fuzzer.file)  # the first use of a library takes time and memory
        for number in numbers:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            outcome = fuzzer.run(number, Path(folder) / "place", measured=number % EVERY == 0)
            failed = outcome.kind.startswith("FAILURE")
            found.counts["FAILURE" if failed else outcome.kind] += 1
            if failed:
                found.failures.setdefault(outcome.kind, str(number))
            found.slowest, found.memory = max(found.slowest, outcome.seconds), max(found.memory, outcome.memory)
    faulthandler.cancel_dump_traceback_later()
    return found


def run_commands(target: str, numbers: range) -> Found:
    """Run whole commands on as many models, in which one kind of file is hostile."""
    torch.set_num_threads(1)
    found = Found()
    with tempfile.TemporaryDirectory(dir=_memory()) as folder:
        bases = hostile.make_bases(Path(folder))

        @seed(numbers.start)
        @settings(
            max_examples=len(numbers),
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(hostile.targets(bases)[target])
        def attack(case: hostile.Case) -> None:
            start = time.perf_counter()
            try:
                kind = hostile.outcome(case, bases, Path(folder) / "place")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = "FAILURE"
                what = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
                found.failures.setdefault(what, repr(case)[:2000])
            found.slowest = max(found.slowest, time.perf_counter() - start)
            found.counts["read" if kind == "fine" else kind] += 1

        attack()
    return found


def _memory() -> Path | None:
    """The folder of files in memory, where there is one."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000, help="of each reader")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--reader", action="append", help="by default all")
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        bases: dict[str, Any] = (
            hostile.targets(hostile.make_bases(Path(folder))) if options.whole else dict(make_fuzzers(Path(folder)))
        )
    names = [name for name in bases if name in (options.reader or bases)]
    found = {name: Found() for name in names}
    start = time.perf_counter()
    # Processes are spawned, because a fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        tasks: dict[Future[Found], str] = {}
        for name in names:
            share = 1.0 if options.whole else bases[name].share
            end = options.first + max(1, round(options.cases * share))
            for first in range(options.first, end, CHUNK):
                numbers = range(first, min(first + CHUNK, end))
                tasks[pool.submit(run_commands if options.whole else run_readers, name, numbers)] = name
        for task in as_completed(tasks):
            found[tasks[task]].add(task.result())
    print(f"{'reader':18}{'cases':>10}{'read':>10}{'PessaError':>12}{'failures':>10}{'slowest':>10}{'memory':>12}")
    for name in names:
        counts = found[name].counts
        print(
            f"{name:18}{counts.total():10,}{counts['read']:10,}{counts['PessaError']:12,}{counts['FAILURE']:10,}"
            f"{found[name].slowest:8.2f} s{found[name].memory / 1e6:9.1f} MB"
        )
    print(f"{time.perf_counter() - start:.0f} s")
    for name in names:
        for what, case in found[name].failures.items():
            print(f"\n{name}: {what}\n  {case}")
    return 1 if any(found[name].failures for name in names) else 0


if __name__ == "__main__":
    raise SystemExit(main())
