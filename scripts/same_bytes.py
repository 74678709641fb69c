"""Record the SHA-256 of every file that a checkout of pessa writes, and compare two such records.

    git worktree add ../before v0.1.0
    python scripts/same_bytes.py record ../before -o before.json
    python scripts/same_bytes.py record . -o after.json
    python scripts/same_bytes.py compare before.json after.json

A record covers the 82 tiny models of the tests and the real models in models/, with every rule, with and without
calibration, in both layouts, and with all exports. Calibration needs text: PESSA_DATA names the folder of the benchmark
data; without it only the real speech model is calibrated. Version strings are removed from JSON and Markdown files, and
names of Python code from ONNX graphs. A refused command is recorded by its exit code. Everything runs on one thread,
because sums that are split differently are rounded differently.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent.parent
MODELS = HERE / "models"
CLIP = MODELS / "speech" / "beckett.wav"
LINES = 8  # lines of text to calibrate on
RULES = {
    "lossless": [],
    "ratio": ["--ratio", "0.4"],
    "rank": ["--rank", "5"],
    "energy": ["--energy", "0.9"],
    "rounded": ["--ratio", "0.4", "--round-to", "4", "--min-rank", "2"],
    "rope ratio": ["--ratio", "0.2", "--rope-ratio", "0.3"],
    "target params": ["--target-params", "0.95"],
    "target attention": ["--target-attention", "0.6"],
}


class Case(NamedTuple):
    """One command; in its arguments {model} stands for the input and {NAME} for the output of an earlier case."""

    name: str
    arguments: Sequence[str]


def cases(
    thresholds: tuple[str, str], sizes: str, calibrate: Sequence[str], whole: bool, sequential: bool = True
) -> Iterator[Case]:
    """Return the commands for one model; `whole` adds those that take long, for real models."""
    rules = RULES | {"thresholds": ["--qk-thr", thresholds[0], "--vo-thr", thresholds[1]], "target size": [sizes]}
    rules["target size"] = ["--target-size", sizes]
    yield Case("decompose", ["decompose", "{model}"])
    for name, rule in rules.items():
        yield Case(f"prune {name}", ["prune", "{model}", *rule])
    yield Case("prune decomposed", ["prune", "{decompose}", *RULES["ratio"]])
    yield Case("prune vanilla", ["prune", "{model}", *RULES["ratio"], "--method", "vanilla"])
    yield Case("prune dense", ["prune", "{model}", *RULES["ratio"], "--layout", "dense"])
    yield Case("prune one layer", ["prune", "{model}", *RULES["ratio"], "--layers", "1"])
    yield Case("prune again", ["prune", "{prune ratio}", "--ratio", "0.2"])
    yield Case("export dense", ["export", "{prune ratio}", "--layout", "dense"])
    yield Case("export compact", ["export", "{prune dense}", "--layout", "compact"])
    if whole:
        yield Case("shards", ["prune", "{model}", *RULES["ratio"], "--max-shard-size", "20MB"])
        yield Case("onnx", ["export", "{prune ratio}", "--to", "onnx"])
        yield Case("openai-whisper", ["export", "{prune ratio}", "--to", "openai-whisper"])
    if not calibrate:
        return
    data = [argument for path in calibrate for argument in ("--calibrate", path)]
    yield Case("calibrated decompose", ["decompose", "{model}", *data])
    for name in ("lossless", "ratio", "rope ratio", "target attention", "thresholds"):
        yield Case(f"calibrated {name}", ["prune", "{model}", *rules[name], *data])
    yield Case("calibrated max error", ["prune", "{model}", "--max-error", "0.2", *data])
    yield Case("calibrated dense", ["prune", "{model}", *RULES["ratio"], *data, "--layout", "dense"])
    if sequential:
        yield Case("sequential", ["prune", "{model}", *RULES["ratio"], *data, "--sequential"])
        yield Case("sequential budget", ["prune", "{model}", *RULES["target attention"], *data, "--sequential"])
    yield Case("prune calibrated", ["prune", "{calibrated decompose}", *RULES["target attention"]])


def searches(kind: str, data: Sequence[str], evaluate: str) -> Iterator[Case]:
    """Return the commands that search for a rule, with and without calibration data."""
    limit = ["--max-wer-increase", "5"] if kind == "speech" else ["--max-ppl-increase", "5%"]
    given = [argument for path in data for argument in ("--calibrate", path)]
    yield Case("search", ["prune", "{model}", *limit, "--evaluate", evaluate])
    yield Case("calibrated search", ["prune", "{model}", *limit, "--evaluate", evaluate, *given])


def entry_point(checkout: Path) -> Callable[[], None]:
    """Return the function behind the `pessa` command of a checkout, as named in its pyproject.toml."""
    sys.path.insert(0, str(checkout.resolve()))
    named = tomllib.loads((checkout / "pyproject.toml").read_text())["project"]["scripts"]["pessa"]
    module, _, function = named.partition(":")
    loaded = importlib.import_module(module)
    if not Path(str(loaded.__file__)).is_relative_to(checkout.resolve()):
        raise SystemExit(f"{module} was imported from {loaded.__file__}, not from {checkout}")
    found: Callable[[], None] = getattr(loaded, function)
    return found


def run(main: Callable[[], None], arguments: Sequence[str]) -> tuple[int, str]:
    """Run one command, and return its exit code and its output."""
    sys.argv = ["pessa", *arguments]
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            main()
    except SystemExit as leaving:
        return int(leaving.code or 0), printed.getvalue()
    except BaseException as error:  # an exception of the checkout is also a result
        return 99, f"{type(error).__name__}: {error}"
    return 0, printed.getvalue()


def digests(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file below a path, or of the file itself."""
    files = sorted(path for path in out.rglob("*") if path.is_file()) if out.is_dir() else [out]
    return {path.relative_to(out).as_posix(): hashlib.sha256(canonical(path)).hexdigest() for path in files}


def canonical(path: Path) -> bytes:
    """Return the content of a file without versions of pessa and without references to its code."""
    if path.suffix == ".onnx":
        return _graph(path)
    content = path.read_bytes()
    if path.suffix == ".md":
        return re.sub(rb"pessa(\W{1,3})\d+\.\d+\.\d+\w*", rb"pessa\1VERSION", content)
    if path.name == "pessa.json":
        document = json.loads(content)
        document.pop("pessa", None)
        document.pop("versions", None)
        for hashes in (document.get("sha256", {}), document.get("source_sha256", {})):
            for name in [name for name in hashes if name.endswith((".md", ".onnx", ".json"))]:
                hashes[name] = "in a file of its own"
        return json.dumps(document, sort_keys=True).encode()
    return content


def _graph(path: Path) -> bytes:
    """Return an ONNX model without its documentation, in which the exporter puts stack traces and class names."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    graphs = [model.graph, *model.functions]
    for owner in [model, *graphs, *(node for graph in graphs for node in graph.node)]:
        owner.ClearField("metadata_props")
        owner.ClearField("doc_string")
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.ClearField("metadata_props")
        value.ClearField("doc_string")
    model.ClearField("producer_version")
    return bytes(model.SerializeToString(deterministic=True))


def record(main: Callable[[], None], names: Sequence[str], file: Path) -> None:
    """Write the digests of all outputs, by model and case, to a file; after each model it holds those so far."""
    found: dict[str, Any] = {}
    for name, source, commands in plan(names):
        found[name] = {}
        with tempfile.TemporaryDirectory() as folder:
            model = source(Path(folder) / "source")
            outputs = {"model": str(model)}
            for number, case in enumerate(commands):
                outputs[case.name] = str(Path(folder) / f"out{number}")
                arguments = [argument.format_map(outputs) for argument in case.arguments]
                code, printed = run(main, [*arguments, "-o", outputs[case.name]])
                out = Path(outputs[case.name])
                found[name][case.name] = digests(out) if code == 0 else {"exit code": code}
                if code == 99:
                    print(f"{name}: {case.name}: {printed}", file=sys.stderr)
        done = sum("exit code" not in files for files in found[name].values())
        print(f"{name}: {done} of {len(found[name])} commands wrote a model", file=sys.stderr, flush=True)
        file.write_text(json.dumps(found, indent=1))


def plan(names: Sequence[str]) -> Iterator[tuple[str, Callable[[Path], Path], list[Case]]]:
    """Return for each model its name, a function that puts it into a folder, and its commands."""
    sys.path.insert(1, str(HERE / "tests" / "helpers"))
    import characters
    import tiny_models
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    data = Path(os.environ["PESSA_DATA"]) if os.environ.get("PESSA_DATA") else None
    with tempfile.TemporaryDirectory() as folder:
        text, other = Path(folder) / "text.txt", Path(folder) / "other.txt"
        if data is not None:
            lines = [line for line in (data / "text" / "wikitext2-valid.txt").read_text().splitlines() if line.strip()]
            text.write_text("\n".join(lines[:LINES]))
            other.write_text("\n".join(lines[1000 : 1000 + LINES]))
        for name, (_, _, reads) in tiny_models.TINIES.items():
            if names and name not in names:
                continue

            def build(into: Path, name: str = name) -> Path:
                tiny_models.build(name).save_pretrained(into)
                characters.tokenizer().save_pretrained(into)
                return into

            few = Path(folder) / "few.txt"
            few.write_text(" ".join(str(i * i) for i in range(400)))
            yield name, build, list(cases(("2.0", "2.0"), "100kB", [str(few)] * (reads == "text"), whole=False))
        speech = [CLIP] if CLIP.exists() else []
        real: dict[str, tuple[str, list[str], str | None]] = {
            "whisper-tiny.en": ("60MB", [str(path) for path in speech], None if data is None else _clips(data, folder)),
            "minilm": ("80MB", [str(text)] if data else [], None),
            "smollm2-135m": ("520MB", [str(text)] if data else [], str(other) if data else None),
        }
        for name, (size, calibrate, evaluate) in real.items():
            if (names and name not in names) or not (MODELS / name).exists():
                continue
            # In sequence SmolLM2 would run once for each of its thirty blocks.
            commands = list(cases(("5e-3", "6e-3"), size, calibrate, whole=True, sequential=name != "smollm2-135m"))
            if evaluate is not None:
                commands += searches("speech" if "whisper" in name else "text", calibrate, evaluate)
            yield name, partial(_in_place, MODELS / name), commands


def _in_place(model: Path, _into: Path) -> Path:
    """Return a function for a model that exists already."""
    return model


def _clips(data: Path, folder: str) -> str:
    """Write three short clips with their transcripts, for scoring."""
    rows = [json.loads(line) for line in (data / "speech" / "clips.jsonl").read_text().splitlines() if line.strip()]
    said = [row for row in rows if row.get("text") and "sentences" in str(row.get("file", row.get("audio")))][:3]
    for row in said:
        row["audio"] = str(data / "speech" / Path(row.pop("file", row.get("audio"))).name)
    path = Path(folder) / "clips.jsonl"
    path.write_text("".join(f"{json.dumps({'audio': row['audio'], 'text': row['text']})}\n" for row in said))
    return str(path)


def compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    """Print a table of both records and every file that differs; returns the number of files that differ."""
    print(f"{'model':28}{'commands':>10}{'files':>8}{'refused':>9}{'differ':>8}")
    total, lines, counts = 0, [], [0, 0, 0]
    for name in dict.fromkeys([*before, *after]):
        old, new = before.get(name, {}), after.get(name, {})
        differ = 0
        for case in dict.fromkeys([*old, *new]):
            a, b = old.get(case, {}), new.get(case, {})
            wrong = [file for file in dict.fromkeys([*a, *b]) if a.get(file) != b.get(file)]
            differ += len(wrong)
            lines += [f"{name}, {case}: {file}: {a.get(file)} before, {b.get(file)} after" for file in wrong]
        files = sum(len(each) for each in new.values() if "exit code" not in each)
        refused = sum("exit code" in each for each in new.values())
        print(f"{name:28}{len(new):10}{files:8}{refused:9}{differ:8}")
        total += differ
        counts = [count + more for count, more in zip(counts, (len(new), files, refused), strict=True)]
    print(f"{'all':28}{counts[0]:10}{counts[1]:8}{counts[2]:9}{total:8}")
    print("\n".join(lines) if lines else "every file is the same")
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="write the digests of all files that a checkout writes")
    recording.add_argument("checkout", type=Path)
    recording.add_argument("-o", "--out", type=Path, required=True)
    recording.add_argument("--models", nargs="*", default=[], help="only these")
    comparing = commands.add_parser(
        "compare", help="show the differences between two records; exits with status 1 if there are any"
    )
    comparing.add_argument("records", type=Path, nargs=2)
    args = parser.parse_args()
    if args.command == "compare":
        sys.exit(bool(compare(*(json.loads(path.read_text()) for path in args.records))))
    record(entry_point(args.checkout), args.models, args.out)


if __name__ == "__main__":
    main()
