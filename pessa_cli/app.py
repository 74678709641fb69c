"""The command line: parse, call, show. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import io
import re
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from pessa_cli import __version__, console
from pessa_cli.errors import PessaError, UsageError, listed

if TYPE_CHECKING:
    from pessa_cli.model import Model
    from pessa_cli.output import Rewrite
    from pessa_cli.pipeline import Run
    from pessa_cli.recipe import Recipe
    from pessa_cli.sites import Site
    from pessa_cli.verify import Report

app = typer.Typer(
    name="pessa",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

MODEL = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .pt or GGUF file, or a name: owner/name, tiny.en.")
]
REVISION = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a MODEL that comes from a hub.")
]
ALLOW_PICKLE = Annotated[
    bool, typer.Option("--allow-pickle", help="Convert pickled weights too: tensors are taken, code is refused.")
]
OUT = Annotated[Path, typer.Option("-o", "--out", help="Folder to write; must not exist.")]
FORCE = Annotated[bool, typer.Option("--force", help="Replace the output folder if it exists.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
AS = Annotated[
    str | None,
    typer.Option("--as", metavar="TYPE", help="Treat the model as this architecture, whatever its config says."),
]
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
ROUND_TO = Annotated[int, typer.Option(help="Round ranks up to a multiple of this.")]
MIN_RANK = Annotated[int, typer.Option(help="Keep at least this many directions in every head.")]
METHOD = Annotated[
    Literal["svd", "vanilla"], typer.Option(help="vanilla: rank the original dimensions by their norms, to compare.")
]
LAYOUT = Annotated[
    Literal["compact", "dense"], typer.Option(help="compact: smaller shapes. dense: original shapes, zeros inside.")
]
RESUME = Annotated[bool, typer.Option("--resume", help="Go on with the finished shards of a killed run.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Only say what would be written: ranks, sizes, shards.")]
JOBS = Annotated[int, typer.Option(help="Blocks worked on at a time; 0 for one a core. Changes no byte.")]
DEVICE = Annotated[str, typer.Option(help="Where the algebra runs, as cuda.")]
SHARD_SIZE = Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights, as 5GB or 500MB.")]
LEVEL = Annotated[
    Literal["weights", "blocks", "outputs"], typer.Option(help="How deep to look; each level includes those before.")
]


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and leave.", is_eager=True)] = False,
) -> None:
    """Model surgery on attention: see every head's true dimensions, cut the empty ones, prove the result."""
    if version:
        console.note(f"pessa {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: MODEL,
    qk_thr: QK_THR = None,
    vo_thr: VO_THR = None,
    ratio: RATIO = None,
    rank: RANK = None,
    energy: ENERGY = None,
    lossless: LOSSLESS = False,
    round_to: ROUND_TO = 1,
    min_rank: MIN_RANK = 0,
    sites: SITES = "",
    layers: LAYERS = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the spectra to this PNG or SVG file.")] = None,
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
    recipe = _recipe(qk_thr, vo_thr, ratio, rank, energy, lossless, round_to, min_rank, sites, layers)
    run = _run(model, jobs=jobs, device=device)
    from pessa_cli.plot import check_plot, plot_spectra

    if plot is not None:
        check_plot(plot)
    from pessa_cli import report
    from pessa_cli.model import open_model
    from pessa_cli.pipeline import measure
    from pessa_cli.ranks import RankPlan, plan_ranks
    from pessa_cli.sources import open_source

    with open_source(model, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        chosen = _chosen(opened, recipe)
        as_is = RankPlan({s.name: s.qk_ranks for s in chosen}, {s.name: s.vo_ranks for s in chosen})
        if not json:
            before = report.totals(opened.reader.header, opened.sites, chosen, as_is)
            console.show_model(model, opened.reader.config, chosen, before)
        spectra = measure(opened, chosen, run=run)
        plan = plan_ranks(chosen, spectra, recipe.rule)
        blocks = [report.block(site, spectra[site.name], plan) for site in chosen]
        totals = report.totals(opened.reader.header, opened.sites, chosen, plan)
        if plot is not None:
            plot_spectra(plot, chosen, spectra, measure(opened, chosen, "vanilla", run))
    if json:
        console.show_json({"model": model, "rule": str(recipe.rule), "blocks": blocks, "totals": totals})
        return
    console.show_blocks(blocks)
    console.show_totals(totals, str(recipe.rule))
    if plot is not None:
        console.note(f"plot written to {plot}")


@app.command()
def decompose(
    model: MODEL,
    out: OUT,
    sites: SITES = "",
    layers: LAYERS = None,
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
    recipe = _recipe(sites=sites, layers=layers)
    run = _run(model, force, resume, dry_run, jobs, device, max_shard_size)
    from pessa_cli.model import open_model
    from pessa_cli.pipeline import decompose_model
    from pessa_cli.sources import open_source

    with open_source(model, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        written = decompose_model(opened, out, _chosen(opened, recipe), run)
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
    lossless: LOSSLESS = False,
    round_to: ROUND_TO = 1,
    min_rank: MIN_RANK = 0,
    sites: SITES = "",
    layers: LAYERS = None,
    method: METHOD = "svd",
    layout: LAYOUT = "compact",
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
    recipe = _recipe(qk_thr, vo_thr, ratio, rank, energy, lossless, round_to, min_rank, sites, layers)
    run = _run(model, force, resume, dry_run, jobs, device, max_shard_size)
    from pessa_cli.model import open_model
    from pessa_cli.pipeline import prune_model
    from pessa_cli.sources import open_source

    with open_source(model, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        chosen = _chosen(opened, recipe)
        written = prune_model(opened, out, recipe.rule, chosen, method, layout, run)
        document = _document(written, model, out)
    console.show_json(document) if json else _show_written(document, dry_run)


@app.command()
def export(
    model: MODEL,
    out: OUT,
    layout: LAYOUT = "dense",
    dry_run: DRY_RUN = False,
    resume: RESUME = False,
    max_shard_size: SHARD_SIZE = "5GB",
    json: JSON = False,
    force: FORCE = False,
    architecture: AS = None,
    revision: REVISION = None,
) -> None:
    """Turn a pruned model from one layout into the other, without changing a number.

    Example: `pessa export out/ -o dense/ --layout dense`
    """
    from pessa_cli.model import open_model
    from pessa_cli.pipeline import export_model
    from pessa_cli.sources import open_source

    run = _run(model, force, resume, dry_run, max_shard_size=max_shard_size)
    with open_source(model, revision) as folder:
        opened = open_model(folder, architecture)
        written = export_model(opened, out, layout, run)
        document = _document(written, model, out)
    console.show_json(document) if json else _show_written(document, dry_run)


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
    json: JSON = False,
    architecture: AS = None,
    revision: REVISION = None,
    allow_pickle: ALLOW_PICKLE = False,
) -> None:
    """Say whether two models are the same, and if not, where and by how much; exit 1 when they are not.

    Example: `pessa verify whisper-tiny.en out/ --audio speech.wav`
    """
    from pessa_cli.junit import check_junit, write_junit

    if candidate is None:
        _verify_folder(Path(reference), json)
        return
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
    if json:
        console.show_json({"reference": reference, "candidate": candidate} | report.to_dict())
    else:
        console.show_report(report, (reference, candidate))
    if not report.same:
        raise typer.Exit(1)


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
    from pessa_cli.recipe import load_recipe

    recipe = load_recipe(recipe_file)
    how = _run(model, force, resume, jobs=jobs, device=device, max_shard_size=max_shard_size)
    from pessa_cli.model import open_model
    from pessa_cli.pipeline import prune_model
    from pessa_cli.sources import open_source

    with open_source(model, revision, allow_pickle) as folder:
        opened = open_model(folder, architecture)
        chosen = _chosen(opened, recipe)
        written = prune_model(opened, out, recipe.rule, chosen, run=how, **recipe.options)
        document = _document(written, model, out)
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


def _recipe(
    qk_thr: float | None = None,
    vo_thr: float | None = None,
    ratio: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    lossless: bool = False,
    round_to: int = 1,
    min_rank: int = 0,
    sites: str = "",
    layers: str | None = None,
) -> Recipe:
    """The options of a command as the recipe they are short for."""
    from pessa_cli.ranks import Rule
    from pessa_cli.recipe import Recipe, parse_layers

    rule = Rule(qk_thr, vo_thr, ratio, rank, energy, round_to, min_rank)
    if lossless and any(value is not None for value in (qk_thr, vo_thr, ratio, rank, energy)):
        raise UsageError(f"--lossless and {rule} are different rules", "give one of them")
    kinds = tuple(kind.strip() for kind in sites.split(",")) if sites else ()
    return Recipe(rule, kinds, None if layers is None else parse_layers(layers))


def _chosen(model: Model, recipe: Recipe) -> list[Site]:
    from pessa_cli.sites import select

    return select(model.sites, recipe.sites, recipe.layers)


def _verify_folder(folder: Path, json: bool) -> None:
    from pessa_cli.verify import verify_folder

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
    from pessa_cli.model import open_model
    from pessa_cli.sources import open_source
    from pessa_cli.verify import verify_models

    with (
        open_source(reference, revision, allow_pickle) as ours,
        open_source(candidate, allow_pickle=allow_pickle) as theirs,
    ):
        models = open_model(ours, architecture), open_model(theirs, architecture)
        return verify_models(*models, progress=console.progress, **options)


def _run(
    model: str,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    jobs: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
) -> Run:
    """How a command is to be carried out."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?(kB|KB|MB|GB|TB)", max_shard_size)
    if match is None:
        raise UsageError(f"--max-shard-size {max_shard_size!r} is no size", "write it as 5GB or 500MB")
    unit = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}[match[2][0].upper()]
    from pessa_cli.pipeline import Run

    path = Path(model)
    name = path.resolve().name if path.exists() else model  # where it lies on this machine is nobody's business
    return Run(name, force, resume, dry_run, jobs, device, int(float(match[1]) * unit), console.progress)


def _document(written: Rewrite, source: str, out: Path) -> dict[str, Any]:
    """What a writing command has to say, as data."""
    from pessa_cli import report

    model = written.model
    totals = report.totals(model.reader.header, model.sites, written.sites, written.ranks)
    shards = {file: sum(info.nbytes for info in part.values()) for file, part in written.shards.items()}
    return written.summary | {"source": source, "out": str(out), "totals": totals, "shards": shards}


def _show_written(document: dict[str, Any], dry_run: bool = False, check: bool = True) -> None:
    out, rule, layout = document["out"], document["rule"], document["layout"]
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
