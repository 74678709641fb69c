"""Test pessa with many hostile files: `python scripts/fuzz.py --cases 100000`.

It prints the outcomes for each target, and for each kind of failure the exception and a case, which `hostile.outcome`
can run again. The strategies are those of tests/sources/test_hostile.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import hostile
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

SHARES = {"header": 3, "bytes": 2, "index": 2, "config": 3, "manifest": 1, "spectra": 1, "recipe": 1}
CHUNK = 1000  # cases that a process generates before it returns its results


def run_chunk(target: str, cases: int, number: int, first: int) -> tuple[Counter[str], dict[str, str], float]:
    """Run cases of a target; returns the outcomes, one case for each kind of failure, and the longest time."""
    torch.set_num_threads(1)
    found: Counter[str] = Counter()
    failures: dict[str, str] = {}
    slowest = 0.0
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        bases = hostile.make_bases(Path(folder))

        @seed(number + first)
        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(hostile.targets(bases)[target])
        def attack(case: hostile.Case) -> None:
            nonlocal slowest
            start = time.perf_counter()
            try:
                kind = hostile.outcome(case, bases, Path(folder) / "place")
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                where = traceback.extract_tb(error.__traceback__)[-1]
                kind = "FAILURE"
                what = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}: {str(error)[:200]}"
                ours = [f for f in traceback.extract_tb(error.__traceback__) if "pessa_cli" in f.filename]
                if ours:
                    what += f" (from {Path(ours[-1].filename).name}:{ours[-1].lineno})"
                failures.setdefault(what, repr(case)[:2000])
            slowest = max(slowest, time.perf_counter() - start)
            found[kind] += 1

        attack()
    return found, failures, slowest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--target", choices=SHARES, action="append")
    options = parser.parse_args()
    shares = {name: share for name, share in SHARES.items() if name in (options.target or SHARES)}
    start = time.perf_counter()
    found: dict[str, Counter[str]] = {name: Counter() for name in shares}
    slowest = dict.fromkeys(shares, 0.0)
    failures: dict[str, str] = {}
    # Processes are spawned, because a fork of a process with torch's threads may hang.
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = []
        for name, share in shares.items():
            left, number = -(-options.cases * share // sum(shares.values())), 0
            while left > 0:
                task = pool.submit(run_chunk, name, min(CHUNK, left), number, 1_000_000 * options.seed)
                futures.append((name, task))
                left, number = left - CHUNK, number + 1
        for name, task in futures:
            counts, broken, longest = task.result()
            found[name] += counts
            failures |= {f"{name}: {what}": case for what, case in broken.items()}
            slowest[name] = max(slowest[name], longest)
    print(f"{'target':10}{'cases':>10}{'read fine':>12}{'PessaError':>12}{'failures':>10}{'slowest':>10}")
    for name, counts in [*found.items(), ("all", sum(found.values(), Counter()))]:
        longest = max(slowest.values()) if name == "all" else slowest[name]
        print(
            f"{name:10}{counts.total():10,}{counts['fine']:12,}{counts['PessaError']:12,}"
            f"{counts['FAILURE']:10,}{longest:8.2f} s"
        )
    print(f"{time.perf_counter() - start:.0f} s, seed {options.seed}")
    for what, case in failures.items():
        print(f"\n{what}\n  {case}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
