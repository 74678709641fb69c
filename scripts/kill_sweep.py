"""Kill commands at many moments, fill their disk, and write to the same place: `python scripts/kill_sweep.py`.

Tiny models are made in a temporary folder. Each command is killed with SIGKILL at `--points` operations on files,
spread over all of them; then something appears at the place of its output, or a second run writes there; then the disk
is too small for it. After each, whatever is not the output must be unchanged, the output complete or absent, the
statistics complete or absent, and the same command must give the same bytes as if nothing had happened.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import killing
import tiny
import torch
import transformers
from harness import snapshot
from transformers import WhisperConfig, WhisperForConditionalGeneration
from tuned import sums, with_tokenizer

from pessa_cli.evaluation.verify import verify_folder
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.run import Run

SHARDS = ("--max-shard-size", "20kB")
TUNE = ("--method", "lora", "--max-steps", 4, "--batch", 4, "--save-steps", 2, "--log-steps", 1, "--device", "cpu")
CALIBRATE = ("prune", "llama", "-o", "out", "--ratio", "0.3", *SHARDS)


@dataclass(frozen=True)
class Command:
    """A command line that writes `out`. again: the line to give after it was killed and has left its statistics."""

    line: tuple[object, ...]
    again: tuple[object, ...] = ()
    out: str = "out"
    resumes: bool = True


COMMANDS = {
    "prune": Command(("prune", "llama", "-o", "out", "--ratio", "0.3", *SHARDS)),
    "prune --force": Command(("prune", "llama", "-o", "old", "--ratio", "0.3", *SHARDS, "--force"), out="old"),
    "decompose": Command(("decompose", "llama", "-o", "out", *SHARDS)),
    "export": Command(("export", "pruned", "-o", "out", *SHARDS)),
    "export to openai-whisper": Command(
        ("export", "whisper", "--to", "openai-whisper", "-o", "out.pt"), out="out.pt", resumes=False
    ),
    "prune --calibrate --statistics": Command(
        (*CALIBRATE, "--calibrate", "story.txt", "--statistics", "sums"), (*CALIBRATE, "--statistics", "sums")
    ),
    "tune": Command(("tune", "llama", "--data", "sums.jsonl", "-o", "out", *TUNE)),
}
TIMED = ("pessa-tune.json", "history.jsonl", "pessa.json")  # files of `tune` that hold seconds


def make_world(place: Path) -> None:
    """Make the models, the data, an output to be replaced, and files that no run may touch."""
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    tiny.build("llama").save_pretrained(place / "plain")
    with_tokenizer(place / "plain", place / "llama")
    shutil.rmtree(place / "plain")
    sizes = {"d_model": 16, "num_mel_bins": 80, "vocab_size": 51865, "encoder_layers": 1, "decoder_layers": 1}
    heads = {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
    config = WhisperConfig(**sizes, **heads, max_source_positions=50, encoder_ffn_dim=64, decoder_ffn_dim=64)
    WhisperForConditionalGeneration(config).half().save_pretrained(place / "whisper")
    prune_model(open_model(place / "llama"), place / "pruned", Rule(ratio=0.3), run=Run(source="llama"))
    prune_model(open_model(place / "llama"), place / "old", Rule(rank=3), run=Run(source="llama"))
    sums(place / "sums.jsonl")
    (place / "story.txt").write_text("3+4=7 and 5+2=7 " * 40)
    for name in ("thesis.tex", ".out.partial.bak", "out.bak", "project/src/main.c", ".old.partialish/notes"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(f"mine: {name}")


def content(place: Path) -> dict[str, str]:
    """Return a digest of each path below a file or folder; of `tune` only what does not depend on the clock."""
    found = snapshot(place) if place.is_dir() else {"": place.read_bytes().hex()} if place.exists() else {}
    return {name: digest for name, digest in found.items() if "pessa-tune.json" not in found or name not in TIMED}


class Sweep:
    """One command in a world of its own for each try. `found` counts what was found after it."""

    def __init__(self, command: Command, world: Path, scratch: Path) -> None:
        self._command, self._world, self._place = command, world, scratch / "place"
        self.found: Counter[str] = Counter()
        self.faults: list[str] = []
        self._others = snapshot(world)
        self._old = content(world / command.out)
        self.fresh()
        self.count = killing.operations(self._place, *command.line)
        self._expected = content(self._place / command.out)
        sums = self._place / "sums"
        self._sums = sums.read_bytes() if sums.exists() else b""

    def fresh(self) -> Path:
        shutil.rmtree(self._place, ignore_errors=True)
        shutil.copytree(self._world, self._place)
        return self._place

    def expect(self, right: bool, what: str) -> None:
        if not right:
            self.faults.append(what)

    def check(self, at: str) -> None:
        """Compare everything on disk with what may be there."""
        command, place = self._command, self._place
        skipped = (command.out, f".{command.out}.partial", "sums")
        others = {name: digest for name, digest in snapshot(place).items() if name.split("/")[0] not in skipped}
        debris = [name for name in others if name.startswith(".pessa-")]
        others = {name: digest for name, digest in others.items() if name not in debris}
        before = {name: digest for name, digest in self._others.items() if name.split("/")[0] not in skipped}
        self.found["temporary files left"] += len(debris)
        self.expect(others == before, f"{at}: other files changed")
        out = content(place / command.out)
        aside = content(place / f".{command.out}.partial" / "replaced")
        if out == self._expected:
            self.found["output complete"] += 1
            self.expect(command.out.endswith(".pt") or not verify_folder(place / command.out), f"{at}: not verified")
        elif self._old and out == self._old:
            self.found["the old output stands"] += 1
        elif not out and self._old and aside == self._old:
            self.found["the old output is aside, and comes back"] += 1
        elif not out and not self._old:
            self.found["output absent"] += 1
        else:
            self.faults.append(f"{at}: something else is at {command.out}")
        sums = place / "sums"
        if self._sums:
            self.found["statistics " + ("complete" if sums.exists() else "absent")] += 1
            self.expect(not sums.exists() or sums.read_bytes() == self._sums, f"{at}: other statistics")

    def finish(self, at: str) -> None:
        """Give the command again, with --resume where it is asked for, and compare its output."""
        command, place = self._command, self._place
        if content(place / command.out) == self._expected:
            return
        line = command.again if command.again and (place / "sums").exists() else command.line
        code, told = killing.run(place, *line)
        if code and "--resume" in told and command.resumes:
            self.found["continued with --resume"] += 1
            code, told = killing.run(place, *line, "--resume")
        self.expect(code == 0, f"{at}: the command fails afterwards: {told}")
        self.expect(content(place / command.out) == self._expected, f"{at}: other bytes afterwards")
        self.expect(not (place / f".{command.out}.partial").exists(), f"{at}: the partial folder is left")

    def kill(self, points: int) -> None:
        for at in killing.spread(self.count, points):
            self.fresh()
            code, told = killing.run(self._place, *self._command.line, at=at)
            self.expect(code < 0, f"operation {at}: it was not killed: {code} {told}")
            self.check(f"killed at {at}")
            self.finish(f"killed at {at}")

    def race(self, points: int) -> None:
        """Something appears at the place of the output, or a second run begins, at some operation."""
        for at in killing.spread(self.count, points):
            self.fresh()
            out = self._place / self._command.out
            if self._old:
                shutil.rmtree(out)
            code, told = killing.run(self._place, *self._command.line, at=at, disturb=partial(appear, out))
            if code == 0:  # it was in place before anything could appear
                self.expect(content(out) == self._expected, f"{at}: {told}")
                continue
            theirs = out / "theirs.txt" if out.is_dir() else out
            self.expect(theirs.exists() and theirs.read_text() == "theirs", f"{at}: what appeared was lost: {told}")
            self.expect(code == 1 and one_error(told), f"{at}: {code} {told}")
            self.found["what appeared stays"] += 1
        for at in killing.spread(self.count, points):
            self.fresh()
            second = self._place.parent / "second"

            def begin(second: Path = second) -> None:
                code = killing.ended(killing.started(self._command.line, lambda: None, second))
                second.with_name("code").write_text(str(code))

            code, told = killing.run(self._place, *self._command.line, at=at, disturb=begin)
            other = int(second.with_name("code").read_text())
            codes = sorted([code, other])
            # With --force the second may end before the first has claimed the place, or begin after it has left it.
            in_turn = bool(self._old) and at in (0, self.count - 1) and codes == [0, 0]
            self.expect(in_turn or codes == [0, 1], f"{at}: exit codes {code}, {other}: {told}")
            self.expect(
                in_turn or one_error(told if code else second.read_text()), f"{at}: {told} {second.read_text()}"
            )
            self.check(f"a second run at {at}")
            self.expect(content(out) == self._expected, f"{at}: two runs give something else")
            self.found["one of two runs wins"] += 1

    def fill(self, points: int) -> None:
        """The place is on a disk that is too small, by more or less."""
        size = sum(path.stat().st_size for path in self._world.rglob("*") if path.is_file())
        grown = sum(path.stat().st_size for path in self._place.rglob("*") if path.is_file()) - size
        for part in range(points):
            free = (grown + 100_000) * part // points
            shutil.rmtree(self._place, ignore_errors=True)
            with small_disk(self._place) as disk:
                shutil.copytree(self._world, self._place, dirs_exist_ok=True)
                disk(free)
                code, told = killing.run(self._place, *self._command.line)
                self.found["full disk: " + ("done" if code == 0 else "one error")] += 1
                self.expect(code in (0, 1) and (code == 0 or one_error(told)), f"{free:,} bytes free: {code} {told}")
                self.check(f"{free:,} bytes free")
                disk(1 << 28)
                self.finish(f"{free:,} bytes free")


def appear(out: Path) -> None:
    """Let something of someone else appear at the place of an output."""
    if out.exists():
        return
    if out.suffix:
        out.write_text("theirs")
    else:
        out.mkdir()
        (out / "theirs.txt").write_text("theirs")


def one_error(told: str) -> bool:
    """Return whether stderr is one error with a hint, after the progress that may stand there."""
    lines = [line for line in told.splitlines() if line.startswith(("error: ", "hint: "))]
    return len(lines) == 2 and "Traceback" not in told


@contextmanager
def small_disk(place: Path) -> Iterator[Callable[[int], None]]:
    """A file system in memory at `place`; the function that is yielded sets the number of its free bytes."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", place], check=True)

    def free(nbytes: int) -> None:
        disk = shutil.disk_usage(place)
        size = -(-(disk.used + nbytes) // 4096) * 4096
        subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)

    try:
        yield free
    finally:
        subprocess.run(["umount", "-l", place], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=50, help="kills of each command")
    parser.add_argument("--races", type=int, default=10, help="races of each kind and command")
    parser.add_argument("--disks", type=int, default=10, help="sizes of a disk that is full; needs root, 0 for none")
    parser.add_argument("--only", help="the name of one command")
    args = parser.parse_args()
    torch.set_num_threads(1)
    faults = 0
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "world"
        world.mkdir()
        make_world(world)
        for name, command in COMMANDS.items():
            if args.only not in (None, name):
                continue
            start = time.monotonic()
            sweep = Sweep(command, world, Path(folder))
            for part, points in ((sweep.kill, args.points), (sweep.race, args.races), (sweep.fill, args.disks)):
                if points:
                    part(points)
            counts = ", ".join(f"{what} {count}" for what, count in sorted(sweep.found.items()) if count)
            print(f"{name}: {sweep.count} operations; {counts}; {time.monotonic() - start:.0f} s")
            for fault in sweep.faults:
                print(f"  FAULT {fault}")
            faults += len(sweep.faults)
    sys.exit(faults > 0)


if __name__ == "__main__":
    main()
