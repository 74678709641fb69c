"""The entry point of the `pessa` command: its commands, its signals and its exit codes.

Heavy libraries such as torch are imported inside the commands that need them, so that `pessa --help` is fast.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from pessa_cli.cli import console
from pessa_cli.cli.evaluate import evaluate
from pessa_cli.cli.inspect import architectures, inspect
from pessa_cli.cli.prune import decompose, export, prune, run
from pessa_cli.cli.tune import merge, tune
from pessa_cli.cli.verify import bench, verify
from pessa_cli.common.errors import PessaError, PessaWarning, UsageError
from pessa_cli.common.memory import raise_if_out_of_memory
from pessa_cli.common.version import VERSION

BUG = 70  # the exit code of an error that pessa did not expect, as in sysexits.h
INTERRUPTED = (130, 128 + signal.SIGTERM)  # the exit codes after Ctrl-C and SIGTERM
TRACEBACK = "PESSA_TRACEBACK"  # the environment variable that shows the causes of errors

app = typer.Typer(
    name="pessa",
    no_args_is_help=True,
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
for command in (inspect, architectures, decompose, prune, export, verify, bench, run, tune, merge):
    app.command()(command)
app.command("eval")(evaluate)


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    """Prune the attention and the MLPs of transformer models, and verify the result."""
    if version:
        console.note(f"pessa {VERSION}")
        raise typer.Exit


def _terminated(number: int, _frame: object) -> None:
    """Exit by an exception, as after Ctrl-C, so that files that are being written are cleaned up."""
    sys.exit(128 + number)


@contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show each PessaWarning once, by the console; other warnings are shown as usual."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: Any) -> None:
            if issubclass(category, PessaWarning):
                console.note(f"warning: {message}")
            else:
                usual(message, category, *place)

        warnings.simplefilter("once", PessaWarning)
        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _run() -> None:
    try:
        app()
    except (MemoryError, OSError, RuntimeError) as error:
        raise_if_out_of_memory(error)
        raise


def main() -> None:
    """Run the command line.

    Exit codes: 0 for success, 1 for a failure, 2 for wrong usage, 70 for a bug in pessa. An error is printed without
    its traceback, unless PESSA_TRACEBACK is set; a bug is printed with it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a character that the terminal cannot show is no error
    signal.signal(signal.SIGTERM, _terminated)
    try:
        with _warnings_shown():
            _run()
    except PessaError as error:
        if os.environ.get(TRACEBACK):
            console.show_traceback(error)
        console.show_error(error)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except SystemExit as done:
        if done.code in INTERRUPTED:  # typer makes an exit of Ctrl-C
            console.note("interrupted; if shards were finished, --resume continues with them")
        raise
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        console.show_traceback(error)
        console.note(
            f"error: pessa {VERSION} did not expect this error, {type(error).__name__}: this is a bug in pessa"
        )
        console.note("hint: report it with the command line and the lines above")
        sys.exit(BUG)
