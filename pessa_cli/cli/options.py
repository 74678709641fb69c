"""Arguments and options that several commands share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, TypedDict

import typer

from pessa_cli.cli.console import progress
from pessa_cli.common.options import option
from pessa_cli.common.values import size_of

if TYPE_CHECKING:
    from pessa_cli.surgery.run import Run

MODEL = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a .pt or GGUF file, or a name such as owner/name or tiny.en."),
]
REFERENCE = Annotated[str, typer.Argument(metavar="REFERENCE", help="The original model.")]
OUT = Annotated[Path, typer.Option("-o", "--out", help="Where to write the result; it must not exist yet.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


class Opening(TypedDict):
    """How a model is opened, as keyword arguments of the functions in `workflow`."""

    architecture: str | None
    revision: str | None
    allow_pickle: bool
    follow_links: bool


@dataclass(frozen=True)
class SourceOptions:
    """How a model is opened."""

    architecture: str | None = option(
        None,
        "Treat the model as this architecture, whatever its config.json says; see `pessa architectures`.",
        flags=("--as",),
        metavar="TYPE",
    )
    revision: str | None = option(
        None, "Branch, tag or commit of a MODEL that is downloaded from a hub.", metavar="NAME"
    )
    allow_pickle: bool = option(
        False, "Also convert pickled weights: tensors are read, code in the file is never executed."
    )
    follow_links: bool = option(
        False, "Also read files outside of a MODEL's folder that links in it lead to, as in folders of DVC."
    )

    @property
    def opening(self) -> Opening:
        """The options as keyword arguments."""
        return Opening(
            architecture=self.architecture,
            revision=self.revision,
            allow_pickle=self.allow_pickle,
            follow_links=self.follow_links,
        )


@dataclass(frozen=True)
class RunOptions:
    """How a command is carried out."""

    dry_run: bool = option(False, "Write nothing: show the ranks, sizes and files that would be written.")
    resume: bool = option(False, "Continue a run that was stopped, with what it has finished.")
    jobs: int = option(0, "Blocks computed at the same time; 0 for one per core. The output does not depend on it.")
    device: str = option("cpu", "Device for the computations, e.g. cuda.")
    max_shard_size: int | None = option(
        None, "Maximum size of one file of weights, e.g. 5GB or 500MB.", metavar="SIZE", parse=size_of, shown="5GB"
    )
    unknown_weights: Literal["refuse", "copy", "leave-out"] = option(
        "refuse", "What to do with other weights in MODEL's folder that may or may not belong to it."
    )
    force: bool = option(False, "Replace the output, if pessa wrote it and nothing was added to it.")

    def run(self) -> Run:
        """Return the options as a Run, with a progress bar. Raises UsageError for values that cannot be used."""
        from pessa_cli.surgery.rewrite import SHARD_BYTES
        from pessa_cli.surgery.run import Run

        shard_bytes = SHARD_BYTES if self.max_shard_size is None else self.max_shard_size
        return Run(
            force=self.force,
            resume=self.resume,
            dry=self.dry_run,
            jobs=self.jobs,
            device=self.device,
            shard_bytes=shard_bytes,
            unknown_weights=self.unknown_weights,
            progress=progress,
        )
