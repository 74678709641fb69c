"""Options that several commands have, and what they say together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pessa_cli.cli.console import progress

if TYPE_CHECKING:
    from pessa_cli.surgery.run import Run


MODEL = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder, a .pt or GGUF file, or a name: owner/name, tiny.en.")
]
REVISION = Annotated[
    str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of a MODEL that comes from a hub.")
]
ALLOW_PICKLE = Annotated[
    bool, typer.Option("--allow-pickle", help="Convert pickled weights too: tensors are taken, code is refused.")
]
OUT = Annotated[Path, typer.Option("-o", "--out", help="What to write; must not exist.")]
FORCE = Annotated[bool, typer.Option("--force", help="Replace the output if it exists.")]
JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
AS = Annotated[
    str | None,
    typer.Option("--as", metavar="TYPE", help="Treat the model as this architecture, whatever its config says."),
]
RESUME = Annotated[bool, typer.Option("--resume", help="Go on with the finished shards of a killed run.")]
DRY_RUN = Annotated[bool, typer.Option("--dry-run", help="Only say what would be written: ranks, sizes, shards.")]
JOBS = Annotated[int, typer.Option(help="Blocks worked on at a time; 0 for one a core. Changes no byte.")]
DEVICE = Annotated[str, typer.Option(help="Where the algebra runs, as cuda.")]
SHARD_SIZE = Annotated[str, typer.Option(metavar="SIZE", help="Largest file of weights, as 5GB or 500MB.")]
CALIBRATE = Annotated[
    list[Path] | None,
    typer.Option(metavar="DATA", help="Go by what this makes of the weights: audio, text, folders, JSONL; repeatable."),
]
STATISTICS = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Where --calibrate keeps what it finds; alone, what to use; repeatable."),
]
SEQUENTIAL = Annotated[
    bool, typer.Option("--sequential", help="Calibrate later blocks on what the pruned earlier ones produce; slower.")
]


def run_of(
    model: str,
    force: bool = False,
    resume: bool = False,
    dry_run: bool = False,
    jobs: int = 0,
    device: str = "cpu",
    max_shard_size: str = "5GB",
) -> Run:
    """How a command is to be carried out."""
    from pessa_cli.ranks.rule import size_of
    from pessa_cli.surgery.run import Run

    shard_bytes = size_of(max_shard_size, "--max-shard-size")

    path = Path(model)
    name = path.resolve().name if path.exists() else model  # where it lies on this machine is nobody's business
    return Run(name, force, resume, dry_run, jobs, device, shard_bytes, progress)
