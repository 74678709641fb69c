"""Compare whole `pessa` processes with copying the folder: time, CPU time and peak memory.

Each round copies the folder (`cp -r`, then `sync -f`), decomposes it, prunes it, and prunes the decomposed folder, one
after the other; each figure is the median over the rounds. Outputs are removed after each run, and the disk is
synced before it. The folder is in the page cache if memory allows.

    python scripts/make_synthetic.py whisper-large-v3 synthetic/whisper-large-v3
    python scripts/bench_prune.py synthetic/whisper-large-v3 [--rounds 3] [--jobs 1 2] [--threads 2]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# No torch in this process: a child's peak memory starts from that of its parent.


class Cost(NamedTuple):
    """The cost of a process and its children: elapsed seconds, CPU seconds, and the largest peak memory in bytes."""

    wall: float
    cpu: float
    peak: float


def run(command: Sequence[str], threads: int | None) -> Cost:
    """Run a command to its end. Raises SystemExit with the command's messages if it fails."""
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


def measure(
    folder: Path, place: Path, rounds: int, jobs: list[int], threads: int | None, rule: list[str]
) -> dict[str, list[Cost]]:
    """Return the costs of each step by name, in the order of a round; outputs are written below `place`."""
    pessa = [sys.executable, "-c", "from pessa_cli.cli.main import main; main()"]
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
        step("cp -r, sync", ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(folder), str(copy)], copy)
        for more in [["--jobs", str(count)] for count in jobs] or [[]]:
            label = " ".join(["", *more])
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the checkpoint")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, nargs="*", default=[], help="run pessa with each of these --jobs")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS of the processes (default: unchanged)")
    parser.add_argument("--qk-thr", type=float, default=5e-3)
    parser.add_argument("--vo-thr", type=float, default=5e-3)
    parser.add_argument("--target", type=Path, help="where to write (default: beside the folder)")
    args = parser.parse_args()
    rule = ["--qk-thr", str(args.qk_thr), "--vo-thr", str(args.vo_thr)]
    target = args.target or args.folder.resolve().parent
    with tempfile.TemporaryDirectory(prefix="bench-prune-", dir=target) as place:
        costs = measure(args.folder, Path(place), args.rounds, args.jobs, args.threads, rule)
    size = folder_size(args.folder) / 1e9
    print(f"{args.folder}, {size:.2f} GB, {os.cpu_count()} cores, medians of {args.rounds}")
    show(costs)


if __name__ == "__main__":
    main()
