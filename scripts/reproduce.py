"""Reproduce the tables of docs/results.md: real models, cut in several ways to equal shares, and scored.

    python scripts/reproduce.py $PESSA_DATA -o out/results [--only "MiniLM"] [--speech out/speech] [--threads 2]

Shares of attention that are pruned:

- vanilla: the paper's baseline, which ranks the original dimensions by the product of their L2 norms.
- plain: singular values of the weights alone, separately for Q-K and V-O (`--ratio`).
- calibrated: statistics of inputs, and one budget for all heads, blocks and sides (`--calibrate --target-attention`).
- in sequence: the same, with each block calibrated on the outputs of the pruned blocks before it (`--sequential`).

Under RoPE, vanilla and plain drop this share of the frequency pairs of Q-K by the weights alone (`--rope-ratio`).

Shares of the layers' parameters that are kept, attention and MLPs, all calibrated:

- joint: one budget for attention and MLPs (`--calibrate --target-layers`), by the plan that trials choose.
- same share: of the directions of attention, and of the channels of each MLP (`--ratio --mlp-ratio`).
- one width: the budget with the same width for all layers (`--uniform`).
- MLPs alone, attention alone: the budget of the same number of parameters over one of them (`--sites`), if that is met.

A model is never scored on what it is calibrated on; `reproduce_data` has the data, and which figures are measured. Each
result is appended to OUT/runs.jsonl, with intervals that 95 % of bootstrap samples of the clips, windows or pairs fall
into. Results and statistics that are there are not made again, so a run can be stopped at any time. At the end OUT
holds table.md and results.png. Give different data another OUT.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from reproduce_data import KL, NATS, OTHER, SPEARMAN, WORDS, Fold, Places, figures
from reproduce_subjects import OF_ATTENTION, OF_LAYERS, SUBJECTS, TARGETS, Subject, jobs, recipe

from pessa_cli.blocks.site import count, select
from pessa_cli.calibration.collect import collect
from pessa_cli.evaluation.bench import peak_memory
from pessa_cli.evaluation.figures import Figure
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.ranks.cost import UnmetBudgetError
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.run import Run
from pessa_cli.workflow.prune import prune

Entry = dict[str, Any]  # a line of runs.jsonl


def calibrate(model: str, kinds: tuple[str, ...], files: Sequence[Path], out: Path, n: int) -> Entry:
    """Write statistics and return their cost; meant to run in a separate process."""
    torch.set_num_threads(n)
    opened, started = open_model(fetch(model)), time.perf_counter()
    partial = out.with_suffix(".partial")
    collect(opened, select(opened.sites, kinds), files, partial)
    partial.rename(out)
    return {"calibration": out.stem, "seconds": time.perf_counter() - started, "peak": peak_memory()}


class Results:
    """The results of all runs; each run is made only once."""

    def __init__(self, places: Places, threads: int) -> None:
        self._out, self._threads, self._file = places.out, threads, places.out / "runs.jsonl"
        self._folds = cache(lambda data, model: data(places, fetch(model)))
        self._original = cache(self._figures_of_original)
        self.runs: list[Entry] = []
        if self._file.exists():
            self.runs = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
        (places.out / "statistics").mkdir(parents=True, exist_ok=True)

    def make(self, subject: Subject, method: str, share: float) -> None:
        key = {"subject": subject.title, "method": method, "share": share}
        if any(key.items() <= run.items() for run in self.runs):
            return
        started, model = time.perf_counter(), open_model(fetch(subject.model))
        folds, original = self._folds(subject.data, subject.model), self._original(subject.data, subject.model)
        found: Entry = {"parameters": model.parameters, "pruned": 0.0, "figures": _entries(original, None)}
        if method != "original":
            sites = select(model.sites, subject.kinds)
            scores, sizes, compared = [], [], []
            with tempfile.TemporaryDirectory() as folder:
                for number, fold in enumerate(folds):
                    statistics = partial(self._statistics, subject, number)
                    given = recipe(method, share, sites, fold.calibration, statistics)
                    try:
                        if given is None:
                            raise UnmetBudgetError("more would have to be cut than there is", "give a larger share")
                        written = prune(model.reader.folder, Path(folder) / str(number), given, Run(jobs=self._threads))
                    except UnmetBudgetError as error:
                        self._add(key | {"unmet": str(error)})
                        return
                    sizes.append(written.totals["parameters_after"])
                    compared.append(written.manifest.get("compared"))
                    scores.append(fold.score(load(open_model(written.out))))
            size = max(sizes)
            pruned = (model.parameters - size) / sum(count(site.tensors) for site in sites)
            found = {"parameters": size, "pruned": pruned, "figures": _entries(figures(scores), original)}
            found |= {"compared": compared} if any(compared) else {}
        self._add(key | found | {"seconds": time.perf_counter() - started})

    def _figures_of_original(self, data: Callable[[Places, Path], list[Fold]], name: str) -> dict[str, Figure]:
        model = load(open_model(fetch(name)))
        return figures([fold.score(model) for fold in self._folds(data, name)])

    def _statistics(self, subject: Subject, number: int) -> Path:
        kinds = () if subject.layers else ("attention",)
        parts = (subject.model, subject.data.__name__, "layers" if subject.layers else "attention", str(number))
        file = self._out / "statistics" / f"{'-'.join(parts)}.safetensors"
        if not file.exists():
            # A separate process, because its peak memory is measured.
            context = multiprocessing.get_context("spawn")
            data = self._folds(subject.data, subject.model)[number].calibration
            with ProcessPoolExecutor(1, context) as pool:
                self._add(pool.submit(calibrate, subject.model, kinds, data, file, self._threads).result())
        return file

    def _add(self, run: Entry) -> None:
        self.runs.append(run)
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
        print(json.dumps(run), file=sys.stderr, flush=True)

    def of(self, subject: str, method: str, share: float) -> Entry | None:
        """The run, unless its budget cannot be met."""
        key = {"subject": subject, "method": method, "share": share, "unmet": None}
        return next((run for run in self.runs if key.items() <= ({"unmet": None} | run).items()), None)


def _entries(found: dict[str, Figure], original: dict[str, Figure] | None) -> Entry:
    """The figures for runs.jsonl, with the differences to the original's."""
    return {
        name: figure.to_dict() | ({} if original is None else {"difference": figure.less(original[name]).to_dict()})
        for name, figure in found.items()
    }


def interval(figure: Entry, form: Callable[[float], str]) -> str:
    if figure["interval"] is None:
        return form(figure["value"])
    low, high = map(form, figure["interval"])
    return f"{form(figure['value'])} ({low} to {high})"


def percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def shown(run: Entry | None, layers: bool) -> str:
    """The cell of a run: in the table of layers with intervals, and against the original."""
    if run is None:
        return ""
    found = run["figures"]
    if WORDS in found:
        if not layers:
            return f"{percent(found[WORDS]['value'])} ({found[NATS]['value']:.2f})"
        return f"{interval(found[KL], '{:.4f}'.format)}; {found[NATS]['value']:.3f}; {percent(found[WORDS]['value'])}"
    if SPEARMAN in found:
        change = found[SPEARMAN].get("difference") if layers else None
        text = f"{found[SPEARMAN]['value']:.3f}"
        return text if change is None else f"{text}, {interval(change, '{:+.4f}'.format)}"
    if not layers or run["method"] == "original":
        return "; ".join(f"{math.exp(found[name]['value']):,.1f}" for name in (NATS, OTHER) if name in found)
    ratios = (found[name]["difference"] for name in (NATS, OTHER))
    return "; ".join(interval(each, lambda nats: f"{math.exp(nats):.3f}") for each in ratios)


def table(results: Results, subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield the tables in Markdown; the parameters are those of the largest of a row."""
    for layers, title in ((False, "pruned"), (True, "kept")):
        chosen = [subject for subject in subjects if subject.layers is layers]
        if not chosen:
            continue
        methods = OF_LAYERS if layers else OF_ATTENTION
        yield f"| model | {title} | parameters | {' | '.join(methods)} |"
        yield "|---" * (3 + len(methods)) + "|"
        for subject in chosen:
            if original := results.of(subject.title, "original", 0.0):
                first = [subject.title, percent(float(layers)), f"{original['parameters']:,}", shown(original, layers)]
                yield f"| {' | '.join([*first, *[''] * (len(methods) - 1)])} |"
            for share in subject.shares:
                found = {method: results.of(subject.title, method, share) for method in methods}
                if any(found.values()):
                    size = max(run["parameters"] for run in found.values() if run is not None)
                    cells = [
                        subject.title,
                        percent(share),
                        f"{size:,}",
                        *(shown(run, layers) for run in found.values()),
                    ]
                    yield f"| {' | '.join(cells)} |"
        yield ""


def loss(run: Entry) -> float:
    """Return the loss against the original, in the unit of TARGETS."""
    if SPEARMAN in run["figures"]:
        return -float(run["figures"][SPEARMAN]["difference"]["value"])
    if WORDS in run["figures"]:
        return float(run["figures"][WORDS]["difference"]["value"])
    return math.exp(run["figures"][NATS]["difference"]["value"]) - 1


def harm(run: Entry) -> float:
    """Return the first figure against the original, by which methods are compared: KL, nats or lost correlation."""
    name = next(iter(run["figures"]))
    change = float(run["figures"][name]["difference"]["value"])
    return -change if name == SPEARMAN else change


def verdicts(results: Results, subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield lines on which targets are met, and where a method is worse than one that it should not be worse than."""
    for title, share, method, most in TARGETS:
        run = results.of(title, method, share)
        if run is not None and title in [subject.title for subject in subjects]:
            verdict = "met" if loss(run) <= most else "MISSED"
            yield f"{title}, {share:.0%}, {method}: {loss(run):+.4f}, target {most}: {verdict}"
    for subject in subjects:
        better = ("joint",) if subject.layers else ("calibrated", "in sequence")
        others = OF_LAYERS[1:] if subject.layers else ("plain",)
        for share, method, other in ((s, m, o) for s in subject.shares for m in better for o in others):
            run, against = (results.of(subject.title, each, share) for each in (method, other))
            if run is not None and against is not None and harm(run) > harm(against):
                both = f"{harm(run):.4f} and {harm(against):.4f}"
                yield f"{subject.title}, {share:.0%}: {method} WORSE than {other}, {both}"


def costs(results: Results) -> Iterator[str]:
    for run in results.runs:
        if "calibration" in run:
            yield f"calibrating {run['calibration']}: {run['seconds']:.0f} s, {run['peak'] / 1e6:,.0f} MB at the peak"
        if "unmet" in run:
            yield f"{run['subject']}, {run['share']:.0%}, {run['method']}: {run['unmet']}"


def plot(results: Results, subjects: Sequence[Subject], file: Path) -> None:
    """Plot the first figure of each run against the share that is pruned."""
    from matplotlib.figure import Figure as Picture

    picture = Picture(figsize=(4 * len(subjects), 4), layout="constrained")
    for axes, subject in zip(picture.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        for method in subject.methods:
            runs = [run for share in subject.shares if (run := results.of(subject.title, method, share))]
            if runs:
                name = next(iter(runs[0]["figures"]))
                x, y = [run["pruned"] for run in runs], [run["figures"][name]["value"] for run in runs]
                axes.plot(x, y, marker="o", linestyle="none" if method == "in sequence" else "-", label=method)
                axes.set(title=subject.title, xlabel="share pruned", ylabel=name)
                axes.legend()
    picture.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with speech/clips.jsonl, text/wikitext2-valid.txt and more")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=[subject.title for subject in SUBJECTS], help="run only these subjects"
    )
    parser.add_argument("--methods", nargs="+", choices=[*OF_ATTENTION, *OF_LAYERS], help="run only these methods")
    parser.add_argument("--shares", type=float, nargs="+", help="run only these shares")
    parser.add_argument("--speech", type=Path, help="a folder of scripts/speech_data.py instead of two halves of clips")
    parser.add_argument("--windows", type=int, default=0, help="of each text of layers to score, evenly spaced; 0: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="only show the existing results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subjects = [subject for subject in SUBJECTS if not args.only or subject.title in args.only]
    results = Results(Places(args.data, args.out, args.speech, args.windows), args.threads)
    with quiet_transformers():
        for subject, method, share in [] if args.show else jobs(subjects):
            wanted = not args.methods or method in args.methods, not args.shares or share in args.shares
            if method == "original" or all(wanted):
                results.make(subject, method, share)
    lines = [*table(results, subjects), *verdicts(results, subjects), "", *costs(results)]
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(results, subjects, args.out / "results.png")


if __name__ == "__main__":
    main()
