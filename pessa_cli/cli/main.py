"""The command line: parse, call, show. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pessa_cli.cli import console
from pessa_cli.cli import tuning as app_tune
from pessa_cli.cli.options import (
    ALLOW_PICKLE,
    AS,
    CALIBRATE,
    DEVICE,
    DRY_RUN,
    FORCE,
    JOBS,
    JSON,
    MODEL,
    OUT,
    RESUME,
    REVISION,
    SEQUENTIAL,
    SHARD_SIZE,
    STATISTICS,
    run_of,
)
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed
from pessa_cli.common.version import VERSION

if TYPE_CHECKING:
    from pessa_cli.blocks.site import Site
    from pessa_cli.cli.recipe import Recipe
    from pessa_cli.evaluation.verify import Report
    from pessa_cli.ranks.rule import Rule
    from pessa_cli.statistics.file import Statistics
    from pessa_cli.surgery.model import Model
    from pessa_cli.surgery.rewrite import Rewrite
    from pessa_cli.surgery.run import Run


app = typer.Typer(
    name="pessa",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
SITES = Annotated[
    str, typer.Option("--sites", metavar="KINDS", help="Only these blocks, as encoder.self,decoder.cross.")
]
LAYERS = Annotated[str | None, typer.Option("--layers", metavar="RANGE", help="Only these layers, as 0-15 or 0-3,12.")]
QK_THR = Annotated[float | None, typer.Option("--qk-thr", help="Keep the singular values of Q-K above this.")]
VO_THR = Annotated[float | None, typer.Option("--vo-thr", help="Keep the singular values of V-O above this.")]
RATIO = Annotated[float | None, typer.Option(help="Drop this share of all directions, the smallest first.")]
RANK = Annotated[int | None, typer.Option(help="Keep this many directions in every head.")]
ENERGY = Annotated[float | None, typer.Option(help="Keep this share of each head's squared spectrum.")]
LOSSLESS = Annotated[
    bool, typer.Option("--lossless", help="Drop only what the dtype's own rounding hides (the default).")
]
TARGET_PARAMS = Annotated[float | None, typer.Option(help="Keep this share of all parameters, the best for quality.")]
TARGET_ATTENTION = Annotated[float | None, typer.Option(help="Keep this share of the chosen attention's parameters.")]
TARGET_SIZE = Annotated[str | None, typer.Option(metavar="SIZE", help="Keep weights of this size, as 120MB.")]
MAX_ERROR = Annotated[
    float | None, typer.Option(help="Keep every block's output within this relative error on the calibration data.")
]
CURVE = Annotated[bool, typer.Option("--curve", help="Show what is kept against what it costs, as budgets go.")]
ROUND_TO = Annotated[int, typer.Option(help="Round ranks up to a multiple of this.")]
MIN_RANK = Annotated[int, typer.Option(help="Keep at least this many directions in every head.")]
ROPE_RATIO = Annotated[
    float | None, typer.Option(help="Under RoPE, also drop this share of each head's frequency pairs of Q-K.")
]
MAX_WER = Annotated[
    float | None, typer.Option("--max-wer-increase", help="Prune as far as the word error rate rises by these points.")
]
MAX_PPL = Annotated[
    str | None, typer.Option("--max-ppl-increase", metavar="RISE", help="Prune as far as perplexity rises so, as 1%.")
]
EVALUATE = Annotated[
    Path | None, typer.Option(metavar="DATA", help="What that is measured on: JSONL of clips with texts, or text.")
]
METHOD = Annotated[
    Literal["svd", "vanilla"], typer.Option(help="vanilla: rank the original dimensions by their norms, to compare.")
]
LAYOUT = Annotated[
    Literal["compact", "dense"], typer.Option(help="compact: smaller shapes. dense: original shapes, zeros inside.")
]
TO = Annotated[
    Literal["transformers", "openai-whisper", "onnx"],
    typer.Option(help="What for: a folder, a .pt file that whisper.load_model reads, or a folder of ONNX graphs."),
]
LEVEL = Annotated[
    Literal["weights", "blocks", "outputs"], typer.Option(help="How deep to look; each level includes those before.")
]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> None:
    """Model surgery on attention: see every head's true dimensions, cut the empty ones, prove the result."""
    if version:
        console.note(f"pessa {VERSION}")
        raise typer.Exit


@app.command()
def inspect(
    model: MODEL,
    qk_thr: QK_THR = None,
    vo_thr: VO_THR = None,
    ratio: RATIO = None,
    rank: RANK = None,
    energy: ENERGY = None,
    target_params: TARGET_PARAMS = None,
    target_attention: TARGET_ATTENTION = None,
    target_size: TARGET_SIZE = None,
    max_error: MAX_ERROR = None,
    lossless: LOSSLESS = False,
    round_to: ROUND_TO = 1,
    min_rank: MIN_RANK = 0,
    rope_ratio: ROPE_RATIO = None,
    sites: SITES = "",
    layers: LAYERS = None,
    calibrate: CALIBRATE = None,
    statistics: STATISTICS = None,
    curve: CURVE = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra, or the curve, to this PNG or SVG file.")] = None,
    jobs: JOBS = 0,
    device: DEVICE = "cpu",
    json: JSON = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Show a model's attention blocks, the spectra of their heads, and what a rule would prune.

    Example: `pessa inspect whisper-tiny.en --qk-thr 5e-3 --vo-thr 6e-3 --plot spectra.png`
    """
    from pessa_cli.ranks.rule import Rule

    recipe = _recipe(
        *(sites, layers, lossless, target_size),
        Rule(
            *(qk_thr, vo_thr, ratio, rank, energy, target_params, target_attention, None, max_error),
            *(round_to, min_rank, rope_ratio),
        ),
    )
    run = run_of(model, jobs=jobs, device=device)
    from pessa_cli.cli.plot import check_plot, plot_curve, plot_spectra

    if plot is not None:
        check_plot(plot)
    from pessa_cli.cli import report
    from pessa_cli.ranks.budget import ranks_for, trade_off
    from pessa_cli.ranks.plan import RankPlan
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model
    from pessa_cli.surgery.passes import measure
    from pessa_cli.surgery.totals import totals as totals_of

    with open_source(model, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        chosen = _chosen(opened, recipe)
        as_is = RankPlan.stored(chosen)
        if not json:
            before = totals_of(opened.reader.header, opened.sites, chosen, as_is)
            console.show_model(model, opened.reader.config, chosen, before)
        with _calibrated(opened, chosen, calibrate, statistics, run) as found:
            spectra = measure(opened, chosen, run=run, statistics=found)
        plan = ranks_for(chosen, spectra, recipe.rule, opened.size)
        blocks = [report.block(site, spectra[site.name], plan) for site in chosen]
        totals = totals_of(opened.reader.header, opened.sites, chosen, plan)
        points = trade_off(chosen, spectra, recipe.rule, opened.size) if curve else []
        if plot is not None and curve:
            plot_curve(plot, points)
        elif plot is not None:
            plot_spectra(plot, chosen, spectra, measure(opened, chosen, "vanilla", run))
    method = "calibrated" if any(known.calibrated for known in spectra.values()) else "svd"
    if json:
        document = {"model": model, "method": method, "rule": str(recipe.rule), "blocks": blocks, "totals": totals}
        console.show_json(document | ({"curve": [asdict(point) for point in points]} if curve else {}))
        return
    if curve:
        console.show_curve(points, method)
    else:
        console.show_blocks(blocks)
    console.show_totals(totals, f"{recipe.rule}{', calibrated' if method == 'calibrated' else ''}")
    if plot is not None:
        console.note(f"plot written to {plot}")


@app.command()
def architectures(
    markdown: Annotated[bool, typer.Option("--markdown", help="As the table of the README.")] = False,
    json: JSON = False,
) -> None:
    """List the kinds of models that can be pruned: their blocks, what merges, since when, and how that was checked.

    Example: `pessa architectures`
    """
    from pessa_cli.cli import report

    if json:
        console.show_json(report.architectures())
    elif markdown:
        console.show_text(report.architectures_table())
    else:
        console.show_architectures(report.architectures())


@app.command()
def decompose(
    model: MODEL,
    out: OUT,
    sites: SITES = "",
    layers: LAYERS = None,
    calibrate: CALIBRATE = None,
    statistics: STATISTICS = None,
    dry_run: DRY_RUN = False,
    resume: RESUME = False,
    jobs: JOBS = 0,
    device: DEVICE = "cpu",
    max_shard_size: SHARD_SIZE = "5GB",
    json: JSON = False,
    force: FORCE = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Write the model in decomposed form, at full rank, with its spectra: pruning that is then a mere slice.

    Example: `pessa decompose whisper-tiny.en -o decomposed/`
    """
    recipe = _recipe(sites, layers)
    run = run_of(model, force, resume, dry_run, jobs, device, max_shard_size)
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model
    from pessa_cli.surgery.passes import decompose_model

    with open_source(model, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        chosen = _chosen(opened, recipe)
        with _calibrated(opened, chosen, calibrate, statistics, run) as found:
            written = decompose_model(opened, out, chosen, run, found)
        document = _document(written, model, out)
    console.show_json(document) if json else _show_written(document, dry_run)


@app.command()
def prune(
    model: MODEL,
    out: OUT,
    qk_thr: QK_THR = None,
    vo_thr: VO_THR = None,
    ratio: RATIO = None,
    rank: RANK = None,
    energy: ENERGY = None,
    target_params: TARGET_PARAMS = None,
    target_attention: TARGET_ATTENTION = None,
    target_size: TARGET_SIZE = None,
    max_error: MAX_ERROR = None,
    max_wer_increase: MAX_WER = None,
    max_ppl_increase: MAX_PPL = None,
    evaluate: EVALUATE = None,
    lossless: LOSSLESS = False,
    round_to: ROUND_TO = 1,
    min_rank: MIN_RANK = 0,
    rope_ratio: ROPE_RATIO = None,
    sites: SITES = "",
    layers: LAYERS = None,
    method: METHOD = "svd",
    layout: LAYOUT = "compact",
    calibrate: CALIBRATE = None,
    statistics: STATISTICS = None,
    sequential: SEQUENTIAL = False,
    dry_run: DRY_RUN = False,
    resume: RESUME = False,
    jobs: JOBS = 0,
    device: DEVICE = "cpu",
    max_shard_size: SHARD_SIZE = "5GB",
    json: JSON = False,
    force: FORCE = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Cut the directions that a rule calls small out of every head, and write the smaller model.

    Example: `pessa prune whisper-large-v3 --qk-thr 5e-3 --vo-thr 6e-3 -o out/`
    """
    from pessa_cli.ranks.rule import Rule

    recipe = replace(
        _recipe(
            *(sites, layers, lossless, target_size),
            Rule(
                *(qk_thr, vo_thr, ratio, rank, energy, target_params, target_attention, None, max_error),
                *(round_to, min_rank, rope_ratio),
            ),
        ),
        method=method,
        layout=layout,
        calibrate=tuple(calibrate or ()),
        statistics=tuple(statistics or ()),
        sequential=sequential,
        evaluate=evaluate,
        max_wer_increase=max_wer_increase,
        max_ppl_increase=max_ppl_increase,
    )
    if lossless and recipe.searches:
        raise UsageError("--lossless and a search are different rules", "give one of them")
    run = run_of(model, force, resume, dry_run, jobs, device, max_shard_size)
    document = _pruned(model, recipe, out, run, json, architecture, revision, allow_pickle)
    console.show_json(document) if json else _show_written(document, dry_run)


@app.command()
def export(
    model: MODEL,
    out: OUT,
    to: TO = "transformers",
    layout: LAYOUT = "dense",
    dry_run: DRY_RUN = False,
    resume: RESUME = False,
    max_shard_size: SHARD_SIZE = "5GB",
    json: JSON = False,
    force: FORCE = False,
    architecture: AS = None,
    revision: REVISION = None,
) -> None:
    """Turn a pruned model from one layout into the other, without changing a number, or into another program's format.

    Example: `pessa export out/ -o dense/ --layout dense`
    """
    if to != "transformers":
        options = {"--layout": layout != "dense", "--dry-run": dry_run, "--resume": resume, "--as": architecture}
        options["--max-shard-size"] = max_shard_size != "5GB"
        _export_to(to, model, out, revision, force, json, [name for name, given in options.items() if given])
        return
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model
    from pessa_cli.surgery.passes import export_model

    run = run_of(model, force, resume, dry_run, max_shard_size=max_shard_size)
    with open_source(model, revision) as folder:
        opened = open_model(folder, architecture)
        written = export_model(opened, out, layout, run)
        document = _document(written, model, out)
    console.show_json(document) if json else _show_written(document, dry_run)


def _export_to(to: str, model: str, out: Path, revision: str | None, force: bool, json: bool, unfit: list[str]) -> None:
    """Write a model in another program's format; `unfit` are the options given that only a folder of ours has."""
    if unfit:
        raise UsageError(f"--to {to} has no {', '.join(unfit)}", "leave it out")
    if out.exists() and Path(model).exists() and out.samefile(model):
        raise PessaError(f"{out} is where the model is read from", "give another -o")
    from pessa_cli.sources.open import open_source

    with open_source(model, revision) as folder:
        if to == "onnx":
            from pessa_cli.exports.onnx import export_onnx

            export_onnx(folder, out, force, console.progress)
        else:
            from pessa_cli.exports.openai import export_openai

            export_openai(folder, out, force, console.progress)
    if json:
        console.show_json({"command": "export", "source": model, "to": to, "out": str(out)})
    else:
        console.note(f"{out} written, for {to}")


@app.command()
def verify(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The original model.")],
    candidate: Annotated[
        str | None,
        typer.Argument(metavar="[CANDIDATE]", help="The model made from it; without it: is REFERENCE whole?"),
    ] = None,
    level: LEVEL = "outputs",
    audio: Annotated[list[Path] | None, typer.Option(help="A clip to transcribe with both; may be repeated.")] = None,
    text: Annotated[list[Path] | None, typer.Option(help="A text file to run both on; may be repeated.")] = None,
    tolerance: Annotated[float | None, typer.Option(help="Largest relative error; default: by dtype.")] = None,
    min_agreement: Annotated[float | None, typer.Option(help="Least share of equal top-1 predictions.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the result as a JUnit XML file.")] = None,
    card: Annotated[bool, typer.Option("--card", help="Also put the figures into the candidate's README.md.")] = False,
    json: JSON = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Say whether two models are the same, and if not, where and by how much; exit 1 when they are not.

    Example: `pessa verify whisper-tiny.en out/ --audio speech.wav`
    """
    from pessa_cli.cli.junit import check_junit, write_junit
    from pessa_cli.surgery.card import check_card, write_figures

    if candidate is None:
        if card:
            raise UsageError("--card: there are no figures without a CANDIDATE", "give both models")
        _verify_folder(Path(reference), json)
        return
    if card:
        check_card(Path(candidate))
    if junit is not None:
        check_junit(junit)
    report = _verify(
        reference,
        candidate,
        architecture,
        revision,
        allow_pickle,
        level=level,
        audio=audio,
        text=text,
        tolerance=tolerance,
        min_agreement=min_agreement,
    )
    if junit is not None:
        write_junit(junit, report)
    if card:
        write_figures(Path(candidate), Path(reference).name, report.rows, report.verdict)
    if json:
        console.show_json({"reference": reference, "candidate": candidate} | report.to_dict())
    else:
        console.show_report(report, (reference, candidate))
    if not report.same:
        raise typer.Exit(1)


@app.command()
def bench(
    reference: Annotated[str, typer.Argument(metavar="REFERENCE", help="The original model.")],
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The model made from it.")],
    device: Annotated[str, typer.Option(help="Where both run, as cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="What both run in.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Threads of each; default: as many as torch takes.")] = None,
    batch: Annotated[int, typer.Option(help="Inputs at a time.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed runs of each kind and model.")] = 5,
    json: JSON = False,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Measure which of two models is faster and smaller: time, memory, cache, parameters, bytes, and their ratios.

    Example: `pessa bench whisper-tiny.en out/ --threads 2`
    """
    from pessa_cli.evaluation.bench import BenchSettings, bench_models
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model

    settings = BenchSettings(device, dtype, threads, batch, tokens, rounds)
    with (
        open_source(reference, revision, allow_pickle) as ours,
        open_source(candidate, allow_pickle=allow_pickle) as theirs,
    ):
        found = bench_models(open_model(ours), open_model(theirs), settings, console.progress)
    if json:
        console.show_json({"reference": reference, "candidate": candidate} | found.to_dict())
    else:
        console.show_bench(found, (reference, candidate))


@app.command()
def run(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file, as those in configs/.")],
    model: MODEL,
    out: OUT,
    resume: RESUME = False,
    jobs: JOBS = 0,
    device: DEVICE = "cpu",
    max_shard_size: SHARD_SIZE = "5GB",
    json: JSON = False,
    force: FORCE = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Do what a recipe says: prune, and verify the result if it asks for that.

    Example: `pessa run configs/lossless.toml whisper-tiny.en -o out/`
    """
    from pessa_cli.cli.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    how = run_of(model, force, resume, jobs=jobs, device=device, max_shard_size=max_shard_size)
    document = _pruned(model, recipe, out, how, json, architecture, revision, allow_pickle)
    if not json:
        _show_written(document, check=recipe.verify is None)
    report = (
        None
        if recipe.verify is None
        else _verify(model, str(out), architecture, revision, allow_pickle, **recipe.verify)
    )
    if json:
        console.show_json(document if report is None else document | {"verify": report.to_dict()})
    elif report is not None:
        console.show_report(report, (model, str(out)))
    if report is not None and not report.same:
        raise PessaError(
            f"{out} is written, but is not the same model within the recipe's limits\n{listed(report.failures)}",
            "prune less, or set tolerance and min_agreement in the recipe's [verify]",
        )


for command in (app_tune.tune, app_tune.merge, app_tune.evaluate):
    app.command("eval" if command is app_tune.evaluate else None)(command)


def _recipe(
    sites: str = "",
    layers: str | None = None,
    lossless: bool = False,
    target_size: str | None = None,
    rule: Rule | None = None,
) -> Recipe:
    """The options of a command as the recipe they are short for."""
    from pessa_cli.cli.recipe import Recipe
    from pessa_cli.ranks.rule import Rule, parse_layers, size_of

    rule = rule or Rule()
    if target_size is not None:
        rule = replace(rule, target_size=size_of(target_size, "--target-size"))
    if lossless and rule.given:
        raise UsageError(f"--lossless and {rule} are different rules", "give one of them")
    kinds = tuple(kind.strip() for kind in sites.split(",")) if sites else ()
    return Recipe(rule, kinds, None if layers is None else parse_layers(layers))


def _pruned(
    source: str,
    recipe: Recipe,
    out: Path,
    run: Run,
    json: bool,
    architecture: str | None,
    revision: str | None,
    allow_pickle: bool,
) -> dict[str, Any]:
    """Prune by a recipe, and say what was done, as data; a search is shown unless that is asked for."""
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model
    from pessa_cli.surgery.passes import prune_model

    with open_source(source, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        chosen, rule, searched = _chosen(opened, recipe), recipe.rule, {}
        in_sequence = rule if recipe.sequential else None
        if recipe.evaluate is not None:
            from pessa_cli.evaluation.search import QualityLimit, check_apart, read_quality_data, search
            from pessa_cli.models.data import read_data

            limit = QualityLimit.of(recipe.max_wer_increase, recipe.max_ppl_increase)
            calibration = read_data(recipe.calibrate)[1] if recipe.calibrate else []
            quality = read_quality_data(opened, limit, recipe.evaluate)
            check_apart(quality, calibration)  # before the minutes that calibration takes
        with _calibrated(opened, chosen, recipe.calibrate, recipe.statistics, run, in_sequence) as found:
            if recipe.evaluate is not None:
                result = search(opened, chosen, limit, quality, rule, found, run.progress, run.device)
                rule, searched = result.rule, {"search": result.to_dict()}
                if not json:
                    console.show_search(result)
            written = prune_model(opened, out, rule, chosen, recipe.method, recipe.layout, run, found)
        return _document(written, source, out) | searched


def _chosen(model: Model, recipe: Recipe) -> list[Site]:
    from pessa_cli.blocks.site import select

    return select(model.sites, recipe.sites, recipe.layers)


@contextmanager
def _calibrated(
    model: Model,
    sites: list[Site],
    data: Sequence[Path] | None,
    files: Sequence[Path] | None,
    run: Run,
    rule: Rule | None = None,
) -> Iterator[Statistics | None]:
    """The statistics that a command was given or has to collect; None, at no cost, where it goes by the weights."""
    if not data and not files and rule is None:
        yield None
        return
    from pessa_cli.calibration.collect import statistics_for

    with statistics_for(model, sites, data or [], files or [], rule, console.progress, run.device) as found:
        warnings = [] if found is None else found.warnings(sites)
        if warnings:
            console.note(f"few data, so the plain rule has its say in {len(warnings)} blocks\n{listed(warnings, 3)}")
        yield found


def _verify_folder(folder: Path, json: bool) -> None:
    from pessa_cli.evaluation.verify import verify_folder

    faults = verify_folder(folder)
    if json:
        console.show_json({"folder": str(folder), "same": not faults, "failures": faults})
    elif not faults:
        console.note(f"{folder} is as it was written")
    if faults:
        what = f"{len(faults)} files of {folder} are not as they were written"
        raise PessaError(
            f"{what}\n{listed(faults)}", "prune the original again, or compare: pessa verify ORIGINAL FOLDER"
        )


def _verify(
    reference: str,
    candidate: str,
    architecture: str | None,
    revision: str | None,
    allow_pickle: bool,
    **options: Any,
) -> Report:
    from pessa_cli.evaluation.verify import verify_models
    from pessa_cli.sources.open import open_source
    from pessa_cli.surgery.model import open_model

    with (
        open_source(reference, revision, allow_pickle) as ours,
        open_source(candidate, allow_pickle=allow_pickle) as theirs,
    ):
        models = open_model(ours, architecture), open_model(theirs, architecture)
        return verify_models(*models, progress=console.progress, **options)


def _document(written: Rewrite, source: str, out: Path) -> dict[str, Any]:
    """What a writing command has to say, as data."""
    from pessa_cli.surgery.totals import totals as totals_of

    model = written.model
    totals = totals_of(model.reader.header, model.sites, written.sites, written.ranks)
    shards = {file: sum(info.nbytes for info in part.values()) for file, part in written.shards.items()}
    return written.summary | {"source": source, "out": str(out), "totals": totals, "shards": shards}


def _show_written(document: dict[str, Any], dry_run: bool = False, check: bool = True) -> None:
    out, rule, layout = document["out"], document["rule"], document["layout"]
    rule += ", calibrated" if document["method"] == "calibrated" else ""
    if document["command"] == "prune":
        console.show_totals(document["totals"], rule)
    if dry_run:
        console.show_plan(document)
        console.note(f"{out} would be written, {rule}, {layout}; nothing was")
        return
    how = f"; check it with: pessa verify {document['source']} {out}" if check else ""
    console.note(f"{out} written, {rule}, {layout}{how}")


def _terminated(number: int, _frame: object) -> None:
    """Leave as Ctrl-C does, through the clean-up of whatever is being written."""
    sys.exit(128 + number)


def main() -> None:
    """The entry point of the `pessa` command: 0 done, 1 failed, 2 wrong usage."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to stop
    signal.signal(signal.SIGTERM, _terminated)
    try:
        app()
    except UsageError as error:
        console.show_error(error)
        sys.exit(2)
    except PessaError as error:
        console.show_error(error)
        sys.exit(1)
    except KeyboardInterrupt:
        console.note("interrupted; finished shards, if there are any, wait for --resume")
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
