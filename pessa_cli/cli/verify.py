"""The commands that compare two models: verify and bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pessa_cli.cli import console
from pessa_cli.cli.expand import Only, with_options
from pessa_cli.cli.junit import check_junit, write_junit
from pessa_cli.cli.options import JSON, REFERENCE, SourceOptions
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed
from pessa_cli.evaluation.limits import VerifyOptions


@with_options
def verify(
    reference: REFERENCE,
    options: VerifyOptions,
    source: SourceOptions,
    candidate: Annotated[
        str | None,
        typer.Argument(
            metavar="[CANDIDATE]",
            help="The model made from it. Without it, the files of REFERENCE are compared with its pessa.json.",
        ),
    ] = None,
    audio: Annotated[
        list[Path] | None, typer.Option(help="Audio file that both models transcribe; may be repeated.")
    ] = None,
    text: Annotated[list[Path] | None, typer.Option(help="Text file to run both models on; may be repeated.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Also write the result to this JUnit XML file.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Also write the differences into the candidate's README.md.")
    ] = False,
    json: JSON = False,
) -> None:
    """Compare two models, and report where and by how much they differ; the exit code is 1 if they are not the same.

    Example: `pessa verify whisper-tiny.en out/ --audio speech.wav`
    """
    if candidate is None:
        if card:
            raise UsageError("--card needs a CANDIDATE to compare with", "give both models")
        _verify_files(Path(reference), json)
        return
    from pessa_cli.surgery.card import check_card, write_figures

    if card:
        check_card(Path(candidate))
    if junit is not None:
        check_junit(junit)
    from pessa_cli.workflow.verify import verify as verify_models

    found = verify_models(
        *(reference, candidate, options),
        audio=audio or (),
        text=text or (),
        progress=console.progress,
        **source.opening,
    )
    report = found.report
    if junit is not None:
        write_junit(junit, report)
    if card:
        write_figures(Path(candidate), Path(reference).name, report.rows, report.verdict)
    if json:
        console.show_json(found.to_dict())
    else:
        console.show_report(found)
    if not found.same:
        raise typer.Exit(1)


def _verify_files(folder: Path, json: bool) -> None:
    from pessa_cli.workflow.verify import verify_files

    found = verify_files(folder)
    if json:
        console.show_json(found.to_dict())
    elif found.same:
        console.note(f"{folder} is as it was written")
    if not found.same:
        raise PessaError(
            f"{len(found.failures)} files of {folder} are not as they were written\n{listed(found.failures)}",
            "prune the original again, or compare the models: pessa verify ORIGINAL FOLDER",
        )


@with_options
def bench(
    reference: REFERENCE,
    candidate: Annotated[str, typer.Argument(metavar="CANDIDATE", help="The model made from it.")],
    source: Annotated[SourceOptions, Only("revision", "allow_pickle", "follow_links")],
    device: Annotated[str, typer.Option(help="Device to run both on, e.g. cuda.")] = "cpu",
    dtype: Annotated[Literal["float32", "float16", "bfloat16"], typer.Option(help="Dtype to run both in.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="CPU threads of each; by default as many as torch uses.")] = None,
    batch: Annotated[int, typer.Option(help="Inputs in a batch.")] = 1,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    rounds: Annotated[int, typer.Option(help="Timed runs of each kind for each model.")] = 5,
    json: JSON = False,
) -> None:
    """Measure which of two models is faster and smaller: time, memory, cache, parameters, bytes, and their ratios.

    Example: `pessa bench whisper-tiny.en out/ --threads 2`
    """
    from pessa_cli.evaluation.bench import BenchSettings
    from pessa_cli.workflow.bench import bench as bench_models

    settings = BenchSettings(device, dtype, threads, batch, tokens, rounds)
    found = bench_models(
        *(reference, candidate, settings),
        progress=console.progress,
        revision=source.revision,
        allow_pickle=source.allow_pickle,
        follow_links=source.follow_links,
    )
    if json:
        console.show_json(found.to_dict())
    else:
        console.show_bench(found.bench, (reference, candidate))
