"""The commands that write models: decompose, prune, export and run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pessa_cli.cli import console
from pessa_cli.cli.expand import Only, with_options
from pessa_cli.cli.options import JSON, MODEL, OUT, RunOptions, SourceOptions
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.workflow.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pessa_cli.workflow.written import WrittenModel

TO = Annotated[
    Literal["transformers", "openai-whisper", "onnx"],
    typer.Option(
        help="transformers: a folder of Hugging Face. openai-whisper: a .pt file for whisper.load_model. onnx: a "
        "folder of ONNX graphs."
    ),
]
# `export` does not use the option of recipes, because its default is the dense layout.
LAYOUT = Annotated[Literal["compact", "dense"], typer.Option(help="The layout to write, with --to transformers.")]


@with_options
def decompose(
    model: MODEL,
    out: OUT,
    recipe: Annotated[Recipe, Only("sites", "layers", "calibrate", "augment", "augment_seed", "statistics")],
    options: RunOptions,
    source: SourceOptions,
    json: JSON = False,
) -> None:
    """Write the model in decomposed form, at full rank, with its spectra; pruning it then needs no further SVD.

    Example: `pessa decompose whisper-tiny.en -o decomposed/`
    """
    run = options.run()
    from pessa_cli.workflow.decompose import decompose as decompose_model

    _show(
        decompose_model(model, out, recipe, run, notify=console.notices(json), **source.opening), options.dry_run, json
    )


@with_options
def prune(
    model: MODEL,
    out: OUT,
    recipe: Recipe,
    options: RunOptions,
    source: SourceOptions,
    json: JSON = False,
) -> None:
    """Drop the directions of heads and the channels of MLPs that a rule does not keep, and write the smaller model.

    Example: `pessa prune whisper-large-v3 --qk-thr 5e-3 --vo-thr 6e-3 -o out/`
    """
    run = options.run()
    from pessa_cli.workflow.prune import prune as prune_model

    written = prune_model(model, out, recipe, run, notify=console.notices(json), **source.opening)
    _show(written, options.dry_run, json)


@with_options
def export(
    model: MODEL,
    out: OUT,
    options: Annotated[RunOptions, Only("dry_run", "resume", "max_shard_size", "unknown_weights", "force")],
    source: SourceOptions,
    to: TO = "transformers",
    layout: LAYOUT = "dense",
    json: JSON = False,
) -> None:
    """Write a pruned model in the other layout, without changing a number, or in another program's format.

    Example: `pessa export out/ -o dense/ --layout dense`
    """
    run = options.run()
    from pessa_cli.workflow.export import export as export_model

    if to == "transformers":
        written = export_model(model, out, layout, run, **source.opening)
        _show(written, options.dry_run, json)
        return
    exported = export_model(model, out, layout, run, to=to, **source.opening)
    if json:
        console.show_json(exported.to_dict())
    else:
        console.note(f"{out} written, for {to}")


@with_options
def run(
    recipe_file: Annotated[Path, typer.Argument(metavar="RECIPE", help="A TOML file like those in configs/.")],
    model: MODEL,
    out: OUT,
    options: Annotated[RunOptions, Only("resume", "jobs", "device", "max_shard_size", "unknown_weights", "force")],
    source: SourceOptions,
    json: JSON = False,
) -> None:
    """Prune a model by a recipe, and verify the result if the recipe has a table [verify].

    Example: `pessa run configs/lossless.toml whisper-tiny.en -o out/`
    """
    recipe, how = load_recipe(recipe_file), options.run()
    from pessa_cli.workflow.prune import prune as prune_model

    written = prune_model(model, out, recipe, how, notify=console.notices(json), **source.opening)
    if recipe.verify is None:
        _show(written, False, json)
        return
    if not json:
        console.show_written(written, check=False)
    from pessa_cli.workflow.verify import verify

    found = verify(model, out, recipe.verify, progress=how.progress, **source.opening)
    if json:
        console.show_json(written.to_dict() | {"verify": found.report.to_dict()})
    else:
        console.show_report(found)
    if not found.same:
        raise PessaError(
            f"{out} was written, but is not the same model within the recipe's limits\n{listed(found.failures)}",
            "prune less, or set tolerance and min_agreement in the recipe's [verify]",
        )


def _show(written: WrittenModel, dry_run: bool, json: bool) -> None:
    if json:
        console.show_json(written.to_dict())
    elif dry_run:
        console.show_plan(written)
    else:
        console.show_written(written)
