"""Change the code in one place at a time, and count the changes that the tests notice.

    python scripts/mutation_tests.py algebra ranks statistics surgery

For each package, mutmut makes the mutants in a copy of the repository and runs the fast tests that reach the changed
function, until one fails. Printed are the numbers of mutants per package, and with --survivors every change that no
test noticed. The exit code is 1 if a package has less than 90 % killed. With --work FOLDER the copies are kept, and a
second run with the same folder only tests again what was not killed, after you have added a test or changed the code.

Not mutated are annotations, docstrings, decorators and what runs while a module is imported (mutmut mutates functions,
and switches mutants on after the import), and the arguments of raised errors: their texts are for people, and have
tests of their own in tests/cli/test_error_texts.py. scripts/mutants.toml has mutants that cannot be noticed, with the
reason, and changes to constants and properties, which mutmut does not make. surgery/card.py, which is left out, is the
text of the model card.
"""

from __future__ import annotations

import argparse
import ast
import fnmatch
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import ndiff
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LISTED = ROOT / "scripts" / "mutants.toml"
LEAST = 0.9  # the share of mutants that must be killed
STATUS = {0: "survived", 1: "killed", 3: "killed", 5: "untested", 33: "untested", None: "unchecked"}  # others: timeout
SETTINGS = """
[tool.mutmut]
source_paths = ["pessa_cli"]
only_mutate = ["pessa_cli/{package}/*.py"]
do_not_mutate = ["pessa_cli/surgery/card.py"]
also_copy = ["scripts"]
do_not_mutate_patterns = ['raise \\w+Error\\(']
pytest_add_cli_args = ["-n", "0", "-p", "no:cacheprovider", "-p", "no:hypothesispytest"]
pytest_add_cli_args_test_selection = [{tests}]
track_dependencies = false
use_git_change_detection = false
timeout_constant = 2.0
"""
FAST = ("-m", "not slow and not real")
TESTS: Mapping[str, tuple[str, ...]] = {
    "algebra": tuple(f"tests/algebra/test_{name}.py" for name in ("absorb", "heads", "factors", "weighted", "rope")),
    "ranks": ("tests/ranks", *FAST, "-k", "not trials_are and not budgets_are_better and not commands"),
    "statistics": ("tests/statistics", *FAST),
    "surgery": (
        *(f"tests/surgery/test_{name}.py" for name in ("block_io", "blocks", "parts", "decompositions", "card")),
        "tests/surgery/test_equivalence.py",
        "tests/surgery/test_edges.py::test_float16_subnormals_are_not_taken_for_changed_weights",
        *FAST,
        "-k",
        "not whisper and not 16_bit",
    ),
}


@dataclass(frozen=True)
class Mutant:
    """One change: the function, the statement before and after it, and what the tests said."""

    where: str  # "algebra.decompose.triangular"
    old: str
    new: str
    status: str


def main() -> int:
    parser = argparse.ArgumentParser(description="Change the code in one place at a time, and see whether tests fail.")
    parser.add_argument("packages", nargs="*", choices=[*TESTS, []], help="default: all of them")
    parser.add_argument("--survivors", action="store_true", help="print each change that no test noticed")
    parser.add_argument("--jobs", type=int, default=2, help="mutants that are tested at the same time")
    parser.add_argument("--work", type=Path, help="keep the copies in this folder, or continue with those there")
    given = parser.parse_args()
    listed = tomllib.loads(LISTED.read_text(encoding="utf-8"))
    enough = True
    with tempfile.TemporaryDirectory() as temporary:
        for package in given.packages or TESTS:
            started = time.monotonic()
            folder = _copy((given.work or Path(temporary)) / package, package)
            mutants = [*_mutated(folder, given.jobs), *_changed(folder, package, listed["change"])]
            enough &= _report(package, mutants, listed["equivalent"], time.monotonic() - started, given.survivors)
    return 0 if enough else 1


def _copy(folder: Path, package: str) -> Path:
    """Copy what the tests need into the folder, with the settings of mutmut for one package."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in ("pessa_cli", "tests", "scripts"):
        for copy in (folder / part, folder / "mutants" / part):
            if copy.exists() and not (part == "pessa_cli" and copy.parent != folder):  # mutmut renews its mutants
                shutil.rmtree(copy)
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    tests = ", ".join(f'"{argument}"' for argument in TESTS[package])
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (folder / "pyproject.toml").write_text(settings + SETTINGS.format(package=package, tests=tests), encoding="utf-8")
    return folder


def _environment() -> dict[str, str]:
    """Return the environment of the tests: one thread each, no hub, and no other copy of the package on the path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def _mutated(folder: Path, jobs: int) -> Iterator[Mutant]:
    """Run mutmut in the folder, and yield what became of each mutant."""
    for path, results in _results(folder):  # of an earlier run: mutmut tests again what has no result
        again = {
            name: code if STATUS.get(code, "timeout") in ("killed", "timeout") else None
            for name, code in results.items()
        }
        whole = json.loads(path.read_text(encoding="utf-8")) | {"exit_code_by_key": again}
        path.write_text(json.dumps(whole), encoding="utf-8")
    command = [sys.executable, "-m", "mutmut", "run", "--max-children", str(jobs)]
    with (folder / "mutmut.log").open("w") as log:
        done = subprocess.run(command, cwd=folder, env=_environment(), stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        text = (folder / "mutmut.log").read_text(encoding="utf-8", errors="replace")
        raise SystemExit(f"mutmut failed in {folder}:\n{text[-3000:]}")
    for path, results in _results(folder):
        functions = _functions(path.with_suffix(""))
        for name, code in results.items():
            module, _, function = name.rpartition(".")
            plain = function.partition("__mutmut_")[0]
            where = f"{module}.{plain.removeprefix('x_').removeprefix('xǁ').replace('ǁ', '.')}"
            old, new = functions[f"{plain}__mutmut_orig"], functions[function]
            changed = [line for line in ndiff(old, new) if line[:2] in ("- ", "+ ")]
            before, after = (" ".join(line[2:].strip() for line in changed if line[0] == sign) for sign in "-+")
            yield Mutant(where.removeprefix("pessa_cli."), before, after, STATUS.get(code, "timeout"))


def _results(folder: Path) -> Iterator[tuple[Path, dict[str, int | None]]]:
    """Yield the file of each module's results, and the exit code of the tests for each mutant by its name."""
    for path in sorted(folder.glob("mutants/pessa_cli/*/*.meta")):
        yield path, json.loads(path.read_text(encoding="utf-8"))["exit_code_by_key"]


def _functions(path: Path) -> dict[str, list[str]]:
    """Return the lines of all functions of a file without comments, one statement a line, by name."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and "__mutmut_" in node.name:
            name, node.name = node.name, "f"
            found[name] = ast.unparse(node).splitlines()
    return found


def _changed(folder: Path, package: str, changes: list[dict[str, Any]]) -> Iterator[Mutant]:
    """Make the listed changes of the package one after the other, and run its tests."""
    for change in changes:
        path = folder / "pessa_cli" / change["file"]
        if not change["file"].startswith(f"{package}/"):
            continue
        text = path.read_text(encoding="utf-8")
        if text.count(change["old"]) != 1:
            raise SystemExit(f"{LISTED.name}: {change['old']!r} is not once in {change['file']}")
        path.write_text(text.replace(change["old"], change["new"]), encoding="utf-8")
        tests = change.get("tests", TESTS[package])
        command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *tests]
        done = subprocess.run(
            command, cwd=folder, env=_environment() | {"PYTHONPATH": str(folder)}, capture_output=True
        )
        path.write_text(text, encoding="utf-8")
        where = change["file"].removesuffix(".py").replace("/", ".")
        yield Mutant(where, change["old"], change["new"], STATUS.get(done.returncode, "timeout"))


def _is_equivalent(mutant: Mutant, equivalents: list[dict[str, Any]]) -> bool:
    """Return whether the change is a listed one: one piece of the statement replaced by another."""
    for listed in equivalents:
        if not any(fnmatch.fnmatchcase(mutant.where, pattern) for pattern in listed["where"]):
            continue
        for old, new in listed["changes"]:
            if old == new == "*":
                return True
            start = mutant.old.find(old)
            while start >= 0:
                if mutant.old[:start] + new + mutant.old[start + len(old) :] == mutant.new:
                    return True
                start = mutant.old.find(old, start + 1)
    return False


def _report(
    package: str, mutants: list[Mutant], equivalents: list[dict[str, Any]], seconds: float, survivors: bool
) -> bool:
    """Print the figures of a package, and return whether enough mutants are killed."""
    left = [mutant for mutant in mutants if mutant.status in ("survived", "untested", "unchecked")]
    noticed = [mutant for mutant in left if not _is_equivalent(mutant, equivalents)]
    counts = Counter(mutant.status for mutant in mutants)
    killed = counts["killed"] + counts["timeout"]
    share = killed / (killed + len(noticed))
    print(
        f"{package}: {len(mutants):,} mutants, {counts['killed']:,} killed, {counts['timeout']:,} timeouts, "
        f"{len(noticed):,} survived ({sum(m.status != 'survived' for m in noticed):,} of them without a test), "
        f"{len(left) - len(noticed):,} equivalent: {share:.1%} killed, in {seconds / 60:.1f} minutes"
    )
    if survivors:
        for mutant in noticed:
            print(f"  {mutant.where} ({mutant.status})\n    - {mutant.old}\n    + {mutant.new}")
    return share >= LEAST


if __name__ == "__main__":
    raise SystemExit(main())
