"""Writing a pruned model in the other layout, or in the format of another program."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, overload

from pessa_cli.checkpoint.places import check_apart
from pessa_cli.common.errors import UsageError
from pessa_cli.common.text import shortened
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.run import Run
from pessa_cli.workflow.steps import named, rewriting
from pessa_cli.workflow.written import WrittenModel

Layout = Literal["compact", "dense"]
OtherFormat = Literal["openai-whisper", "onnx"]


@dataclass(frozen=True)
class ExportedModel:
    """A model in another program's format. source: the model it was made from, as the user called it."""

    source: str
    to: str
    out: Path

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {"command": "export", "source": self.source, "to": self.to, "out": str(self.out)}


@overload
def export(
    model: str | Path,
    out: str | Path,
    layout: Layout = ...,
    run: Run = ...,
    *,
    to: Literal["transformers"] = ...,
    architecture: str | None = ...,
    revision: str | None = ...,
    allow_pickle: bool = ...,
    follow_links: bool = ...,
) -> WrittenModel: ...


@overload
def export(
    model: str | Path,
    out: str | Path,
    layout: Layout = ...,
    run: Run = ...,
    *,
    to: OtherFormat,
    architecture: str | None = ...,
    revision: str | None = ...,
    allow_pickle: bool = ...,
    follow_links: bool = ...,
) -> ExportedModel: ...


def export(
    model: str | Path,
    out: str | Path,
    layout: Layout = "dense",
    run: Run = Run(),
    *,
    to: Literal["transformers"] | OtherFormat = "transformers",
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> WrittenModel | ExportedModel:
    """Write a pruned model in the other layout, without changing a number, or in another program's format.

    model: a folder, a file, or a name on a hub. out: the folder, or the .pt file, to write. layout: "compact" for
    smaller matrices, "dense" for the original shapes with zeros in them. run: how the work is done, and whether an
    existing `out` is replaced. to: "transformers" for a folder of Hugging Face, "openai-whisper" for a .pt file, "onnx"
    for a folder of ONNX graphs; the last two have no layout, and use only `force`, `progress` and `unknown_weights` of
    `run`. architecture: treat the model as this `model_type`. revision: branch, tag or commit of a model from a hub.
    allow_pickle: also convert pickled weights. follow_links: also read files outside of the model's folder that links
    in it lead to.

    Returns the description of the output. Raises UsageError for options that the format does not have, and PessaError
    for a dense model that pessa did not write, and when `out` exists or cannot be written.
    """
    out = Path(out)
    if layout not in get_args(Layout):
        raise UsageError(f"--layout {shortened(layout)} is not known", f"give one of {', '.join(get_args(Layout))}")
    if to == "transformers":
        with rewriting(model, out, run, architecture, revision, allow_pickle, follow_links) as (found, place):
            return WrittenModel.of(export_model(found, place, layout, named(run, model)), model, out)
    if to not in ("openai-whisper", "onnx"):
        raise UsageError(f"--to {shortened(to)} is not known", "give transformers, openai-whisper or onnx")
    options = {"--layout": layout != "dense", "--dry-run": run.dry, "--resume": run.resume, "--as": architecture}
    options["--max-shard-size"] = run.shard_bytes != Run().shard_bytes
    if unfit := [name for name, given in options.items() if given]:
        raise UsageError(f"--to {to} has no {', '.join(unfit)}", "leave it out")
    check_apart(out, [path for path in [Path(model)] if path.exists()])
    with open_source(str(model), revision, allow_pickle, follow_links) as folder:
        _export_to(to, folder, out, run)
    return ExportedModel(str(model), to, out)


def _export_to(to: OtherFormat, folder: Path, out: Path, run: Run) -> None:
    """Write another program's format; the modules are imported here because each needs an optional library."""
    if to == "onnx":
        from pessa_cli.exports.onnx import export_onnx

        export_onnx(folder, out, run.force, run.progress, run.unknown_weights)
    else:
        from pessa_cli.exports.openai import export_openai

        export_openai(folder, out, run.force, run.progress)
