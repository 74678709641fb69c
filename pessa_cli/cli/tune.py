"""The commands that train adapters and merge them: tune and merge."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pessa_cli.cli import console
from pessa_cli.cli.expand import Given, Only, with_options
from pessa_cli.cli.options import JSON, MODEL, OUT, RunOptions, SourceOptions
from pessa_cli.common.packages import need
from pessa_cli.tuning.options import Tuning, load_tuning


@with_options
def tune(
    model: MODEL,
    data: Annotated[
        Path,
        typer.Option(help="Training data, JSON or JSON lines: instructions, completions, conversations or audio."),
    ],
    out: OUT,
    given: Annotated[dict[str, Any], Given(Tuning)],
    options: Annotated[RunOptions, Only("resume", "force")],
    source: SourceOptions,
    recipe: Annotated[
        Path | None, typer.Option(help="A TOML file like configs/tune-*.toml; options given here override it.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option(help="Evaluation data in the same format, for the loss during training.")
    ] = None,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard logs.")] = None,
    json: JSON = False,
) -> None:
    """Train an adapter: the model is not changed, and what is learned goes into a small folder that PEFT loads.

    Example: `pessa tune smollm2-135m --method pessa --data train.jsonl -o adapter/`
    """
    tuning = (Tuning() if recipe is None else load_tuning(recipe)).changed(**given)
    need("peft", "accelerate")
    from pessa_cli.tuning.train import Job
    from pessa_cli.tuning.train import tune as train
    from pessa_cli.workflow.steps import check_output, named, opened

    run = options.run()
    name = named(run, model).source or model
    check_output(model, out, run)
    with opened(model, **source.opening) as found, console.training() as watch:
        job = Job(found, data, out, tuning, name, eval_data, options.force, options.resume, tensorboard, watch)
        record = train(job)
    if record is None:  # the first process shows the result
        return
    if json:
        console.show_json(record | {"out": str(out)})
        return
    console.show_tuned(record)
    console.note(f"{out} written; merge it with: pessa merge {model} {out} -o merged/")


@with_options
def merge(
    model: MODEL,
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="The folder of an adapter of any PEFT method.")],
    out: OUT,
    options: Annotated[RunOptions, Only("resume", "max_shard_size", "unknown_weights", "force")],
    source: Annotated[SourceOptions, Only("revision", "allow_pickle", "follow_links")],
    json: JSON = False,
) -> None:
    """Merge an adapter into the weights and write the model: same names and shapes, and as fast as the original.

    Example: `pessa merge smollm2-135m adapter/ -o merged/`
    """
    need("peft")
    run = options.run()
    from pessa_cli.tuning.merge import merge_adapter
    from pessa_cli.workflow.steps import check_output, named, opened

    check_output(model, out, run)
    with opened(model, **source.opening) as found:
        written = merge_adapter(found, adapter, out, named(run, model))
    if json:
        console.show_json(written | {"out": str(out)})
        return
    for line in written.get("notes", ()):
        console.note(line)
    console.note_left_out(written["left_out"])
    console.note(
        f"{out} written, {written['changed']} tensors rewritten; check it with: pessa eval {out}, pessa verify {out}"
    )
