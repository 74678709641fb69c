"""Reproduce the README's results: real models pruned by four methods at equal shares of their attention.

    python scripts/reproduce.py $PESSA_DATA -o out/results [--only "tiny.en encoder"] [--threads 2]

- vanilla: the paper's baseline, which ranks the original dimensions by the product of their L2 norms.
- plain: singular values of the weights alone, separately for Q-K and V-O (`--ratio`).
- calibrated: statistics of inputs, and one budget for all heads, blocks and sides (`--calibrate --target-attention`).
- in sequence: the same, with each block calibrated on the outputs of the pruned blocks before it (`--sequential`).

Under RoPE, vanilla and plain drop this share of the frequency pairs of Q-K by the weights alone (`--rope-ratio`).

A model is never scored on its calibration data. Whisper: the clips are divided into two halves, and each half is
transcribed by models that were calibrated on the audio of the other half; in addition to the word error rate, the mean
negative log-likelihood of the reference texts is measured, which depends less on single lost sentences. SmolLM2:
calibrated on the end of the text, perplexity over windows from its beginning. MiniLM: calibrated on those sentences of
every fifth pair that are in no other pair, Spearman's correlation over the other pairs.

Each result is appended to OUT/runs.jsonl, and statistics are kept in OUT/statistics; existing ones are not made again,
so a run can be stopped at any time. At the end OUT holds table.md and results.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from transformers import AutoTokenizer, WhisperProcessor

from pessa_cli.blocks.site import select
from pessa_cli.calibration.collect import collect
from pessa_cli.evaluation.bench import peak_memory
from pessa_cli.evaluation.likelihood import likelihoods
from pessa_cli.evaluation.measures import Measure, ScoreSettings
from pessa_cli.evaluation.perplexity import Perplexity
from pessa_cli.evaluation.similarity import Similarity, embedding_of
from pessa_cli.evaluation.word_errors import WordErrors, read_clips
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.ranks.rule import Rule
from pessa_cli.statistics.file import SavedStatistics, Statistics
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.rewrite import Ranking
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.totals import totals

METHODS = ("vanilla", "plain", "calibrated", "in sequence")
CHARACTERS = 45_000  # of the end of the text, to calibrate on
WINDOWS = 20  # from its beginning, to score on
EVERY = 5  # of the pairs, one to calibrate on: the file goes from genre to genre
TENS = (0.1, 0.2, 0.3, 0.4, 0.5)
Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A part of the table: a model, the kinds of blocks that are pruned, and the shares of attention to prune.

    first: the shares that are run before all others. sequence: the shares at which calibration in sequence is run.
    same: the title of a subject whose statistics include these blocks.
    """

    title: str
    model: str
    kinds: tuple[str, ...] = ()
    shares: tuple[float, ...] = TENS
    first: tuple[float, ...] = ()
    sequence: tuple[float, ...] = ()
    same: str | None = None


SUBJECTS = (
    Subject("tiny.en encoder", "whisper-tiny.en", ("encoder.self",), (*TENS[:3], 0.35, *TENS[3:]), *2 * ((0.35, 0.5),)),
    Subject("tiny.en", "whisper-tiny.en", (), (*TENS[:2], 0.25, *TENS[2:]), *2 * ((0.25,),)),
    Subject("tiny.en decoder", "whisper-tiny.en", ("decoder.self", "decoder.cross"), same="tiny.en"),
    Subject("MiniLM", "minilm", first=(0.3,)),
    Subject("SmolLM2", "smollm2-135m", (), (0.1, 0.15, *TENS[1:]), (0.15,)),
)
# The allowed loss against the original: points of word error rate, points of correlation, or a share of the perplexity.
TARGETS = (
    ("tiny.en encoder", 0.35, "calibrated", 0.02),
    ("tiny.en encoder", 0.5, "in sequence", 0.1),
    ("tiny.en", 0.25, "calibrated", 0.02),
    ("MiniLM", 0.3, "calibrated", 0.01),
    ("SmolLM2", 0.15, "calibrated", 0.05),
)


@dataclass(frozen=True)
class Fold:
    """Calibration files, and a quality measure on other data."""

    calibration: Sequence[Path]
    measure: Measure


def speech_folds(data: Path, _out: Path, source: Path) -> list[Fold]:
    clips = read_clips(data / "speech" / "clips.jsonl")
    processor, halves = WhisperProcessor.from_pretrained(source), (clips[0::2], clips[1::2])
    return [
        Fold(
            [clip.file for clip in half],
            WordErrors.of("the other half", other, processor, ScoreSettings(new_tokens=100)),
        )
        for half, other in (halves, halves[::-1])
    ]


def text_folds(data: Path, out: Path, source: Path) -> list[Fold]:
    text = (data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")
    beginning, end = out / "text-beginning.txt", out / "text-end.txt"
    beginning.write_text(text[:-CHARACTERS], encoding="utf-8")
    end.write_text(text[-CHARACTERS:], encoding="utf-8")
    return [
        Fold([end], Perplexity.load(beginning, AutoTokenizer.from_pretrained(source), ScoreSettings(limit=WINDOWS)))
    ]


def pairs_folds(data: Path, out: Path, source: Path) -> list[Fold]:
    with (data / "text" / "stsb-en-dev.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    others = [row for number, row in enumerate(rows) if number % EVERY]
    there = {sentence for row in others for sentence in row[:2]}
    sentences = dict.fromkeys(sentence for row in rows[::EVERY] for sentence in row[:2] if sentence not in there)
    calibration, scored = out / "sentences.jsonl", out / "pairs.csv"
    calibration.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences), encoding="utf-8")
    with scored.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(others)
    embedding = embedding_of(source, open_model(source).reader.config)
    tokenizer = AutoTokenizer.from_pretrained(source)
    return [Fold([calibration], Similarity.load(scored, tokenizer, ScoreSettings(batch=32), embedding))]


FOLDS: dict[str, Callable[[Path, Path, Path], list[Fold]]] = {
    "whisper-tiny.en": speech_folds,
    "minilm": pairs_folds,
    "smollm2-135m": text_folds,
}


def quality(folders: Sequence[Path], measures: Sequence[Measure]) -> Figures:
    """Return the quality of several models together, each on its own data."""
    scores, counts, nats, tokens = [], [], 0.0, 0
    for folder, measure in zip(folders, measures, strict=True):
        model = load(open_model(folder))
        scores.append(measure.score(model))
        counts.append(scores[-1].counts)
        if isinstance(measure, WordErrors):
            likely = likelihoods(model, measure.passages(model), None, measure.name)
            nats, tokens = nats + float(likely.nats.sum()), tokens + int(likely.tokens.sum())
    found: Figures = {"metric": scores[0].metric, "counts": counts}
    if not tokens:
        (score,) = scores
        return found | {"quality": score.value}
    rate = sum(count["errors"] for count in counts) / sum(count["words"] for count in counts)
    return found | {"quality": rate, "nats": nats / tokens}


def calibrate(
    model: str, kinds: tuple[str, ...], files: Sequence[Path], out: Path, rule: Rule | None, n: int
) -> Figures:
    """Write statistics and return their cost; meant to run in a separate process."""
    torch.set_num_threads(n)
    opened, started = open_model(fetch(model)), time.perf_counter()
    partial = out.with_suffix(".partial")
    collect(opened, select(opened.attention, kinds), files, partial, rule)
    partial.rename(out)
    return {"calibration": out.stem, "seconds": time.perf_counter() - started, "peak": peak_memory()}


class Results:
    """The results of all runs; each run is made only once."""

    def __init__(self, data: Path, out: Path, threads: int) -> None:
        self._data, self._out, self._threads = data, out, threads
        self._file = out / "runs.jsonl"
        self._folds = cache(lambda name: FOLDS[name](data, out, fetch(name)))
        self.runs: list[Figures] = []
        if self._file.exists():
            self.runs = [json.loads(line) for line in self._file.read_text(encoding="utf-8").splitlines()]
        (out / "statistics").mkdir(parents=True, exist_ok=True)

    def make(self, subject: Subject, method: str, share: float) -> None:
        key = {"subject": subject.title, "method": method, "share": share}
        if any(key.items() <= run.items() for run in self.runs):
            return
        started, folds, model = time.perf_counter(), self._folds(subject.model), open_model(fetch(subject.model))
        if method == "original":
            size = {"parameters": model.parameters, "attention": 0.0}
            found = quality([model.reader.folder for _ in folds], [fold.measure for fold in folds])
        else:
            with tempfile.TemporaryDirectory() as folder:
                outs = [Path(folder) / str(number) for number in range(len(folds))]
                sizes = [self._pruned(subject, method, share, model, *each) for each in enumerate(outs)]
                size = max(sizes, key=lambda size: size["parameters"])
                found = quality(outs, [fold.measure for fold in folds])
        self._add(key | size | found | {"seconds": time.perf_counter() - started})

    def _pruned(self, subject: Subject, method: str, share: float, model: Model, fold: int, out: Path) -> Figures:
        """Write a pruned model and return its size."""
        sites, statistics = select(model.attention, subject.kinds), None
        rotates = any(site.spec.rope for site in sites)
        rule = Rule(ratio=share, rope_ratio=share if rotates else None)
        if method in ("calibrated", "in sequence"):
            rule = Rule(target_attention=1 - share)
            statistics = self._statistics(subject, fold, rule if method == "in sequence" else None)
        how: Ranking = "vanilla" if method == "vanilla" else "svd"
        run = Run(jobs=self._threads)
        ranks = prune_model(model, out, rule, sites, how, run=run, statistics=statistics).ranks
        counted = totals(model.reader.header, model.attention, sites, ranks)
        names = {"parameters": "parameters_after", "attention": "attention_pruned"}
        return {name: counted[known] for name, known in names.items()}

    def _statistics(self, subject: Subject, number: int, rule: Rule | None) -> Statistics:
        fold = self._folds(subject.model)[number]
        if subject.same is not None and rule is None:
            subject = next(other for other in SUBJECTS if other.title == subject.same)
        name = "-".join(f"{subject.title} {number} {rule or ''}".split())
        file = self._out / "statistics" / f"{name}.safetensors"
        if not file.exists():
            # A separate process, because its peak memory is measured.
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, context) as pool:
                arguments = (subject.model, subject.kinds, fold.calibration, file, rule, self._threads)
                self._add(pool.submit(calibrate, *arguments).result())
        found = SavedStatistics(file)
        if common := set(found.data) & set(fold.measure.sources.values()):
            raise SystemExit(f"{name}: calibrated on what it is scored on, {common}")
        return found

    def _add(self, run: Figures) -> None:
        self.runs.append(run)
        with self._file.open("a", encoding="utf-8") as out:
            out.write(json.dumps(run) + "\n")
        print(json.dumps({key: value for key, value in run.items() if key != "counts"}), file=sys.stderr, flush=True)

    def of(self, subject: str, method: str, share: float) -> Figures | None:
        key = {"subject": subject, "method": method, "share": share}
        return next((run for run in self.runs if key.items() <= run.items()), None)


def jobs(subjects: Sequence[Subject]) -> Iterator[tuple[Subject, str, float]]:
    """Yield all runs to make, beginning with those that the targets refer to."""
    for subject in subjects:
        yield subject, "original", 0.0
    for first in (True, False):
        for method in ("calibrated", "in sequence", "plain", "vanilla"):
            for subject in subjects:
                chosen = subject.sequence if method == "in sequence" else subject.shares
                yield from ((subject, method, share) for share in chosen if (share in subject.first) is first)


def shown(run: Figures | None) -> str:
    if run is None:
        return ""
    if run["metric"] == "perplexity":
        return f"{run['quality']:,.1f}"
    if run["metric"] == "word error rate":
        return f"{run['quality']:.1%} ({run['nats']:.2f})".replace("%", " %")
    return f"{run['quality']:.3f}"


def table(results: Results, subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield the table in Markdown; the parameters are those of vanilla and plain; calibrated ones never have more."""
    yield f"| model | pruned | parameters | calibrated | {' | '.join(METHODS)} |"
    yield "|---" * (4 + len(METHODS)) + "|"
    for subject in subjects:
        if original := results.of(subject.title, "original", 0.0):
            size = f"{original['parameters']:,}"
            yield f"| {' | '.join([subject.title, '0 %', size, size, *[shown(original)] * 3, ''])} |"
        for share in subject.shares:
            found = {method: results.of(subject.title, method, share) for method in METHODS}
            sizes = [f"{run['parameters']:,}" if (run := found[name]) else "" for name in ("plain", "calibrated")]
            cells = [
                subject.title,
                f"{share:.0%}".replace("%", " %"),
                *sizes,
                *(shown(found[method]) for method in METHODS),
            ]
            yield f"| {' | '.join(cells)} |"


def worse(run: Figures, original: Figures) -> float:
    """Return the loss of one model against another, in the unit of TARGETS."""
    if run["metric"] == "perplexity":
        return float(run["quality"] / original["quality"] - 1)
    difference = float(run["quality"] - original["quality"])
    return difference if run["metric"] == "word error rate" else -difference


def verdicts(results: Results, subjects: Sequence[Subject]) -> Iterator[str]:
    """Yield lines on which targets are met, and where calibration is worse or keeps more parameters."""
    for title, share, method, most in TARGETS:
        run, original = results.of(title, method, share), results.of(title, "original", 0.0)
        if run is not None and original is not None:
            found = worse(run, original)
            yield f"{title}, {share:.0%}, {method}: {found:+.4f}, target {most}: {'met' if found <= most else 'MISSED'}"
    for subject in subjects:
        for share in subject.shares:
            plain = results.of(subject.title, "plain", share)
            for method in ("calibrated", "in sequence"):
                run = results.of(subject.title, method, share)
                if run is None or plain is None:
                    continue
                if run["parameters"] > plain["parameters"]:
                    yield f"{subject.title}, {share:.0%}, {method}: MORE parameters than plain"
                if worse(run, plain) > 0 or run.get("nats", 0) > plain.get("nats", 0):
                    yield f"{subject.title}, {share:.0%}, {method}: WORSE than plain, {shown(run)} and {shown(plain)}"


def costs(results: Results) -> Iterator[str]:
    for run in results.runs:
        if "calibration" in run:
            yield f"calibrating {run['calibration']}: {run['seconds']:.0f} s, {run['peak'] / 1e6:,.0f} MB at the peak"


def plot(results: Results, subjects: Sequence[Subject], file: Path) -> None:
    """Plot quality against the share of attention that is pruned."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(subjects), 4), layout="constrained")
    for axes, subject in zip(figure.subplots(1, len(subjects), squeeze=False)[0], subjects, strict=True):
        original = results.of(subject.title, "original", 0.0)
        for method in METHODS:
            runs = [run for share in subject.shares if (run := results.of(subject.title, method, share))]
            if runs and original is not None:
                points = [original, *runs] if method != "in sequence" else runs
                x, y = ([run[name] for run in points] for name in ("attention", "quality"))
                axes.plot(x, y, marker="o", linestyle="none" if method == "in sequence" else "-", label=method)
                axes.set(title=subject.title, xlabel="share of attention pruned", ylabel=original["metric"])
        if original is not None and original["metric"] == "perplexity":
            axes.set_yscale("log")
        axes.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="a folder with speech/clips.jsonl, text/wikitext2-valid.txt and more")
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument(
        "--only", nargs="+", choices=[subject.title for subject in SUBJECTS], help="run only these subjects"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="only show the existing results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    subjects = [subject for subject in SUBJECTS if not args.only or subject.title in args.only]
    results = Results(args.data, args.out, args.threads)
    if not args.show:
        with quiet_transformers():
            for job in jobs(subjects):
                results.make(*job)
    lines = [*table(results, subjects), "", *verdicts(results, subjects), "", *costs(results)]
    (args.out / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))
    plot(results, subjects, args.out / "results.png")


if __name__ == "__main__":
    main()
