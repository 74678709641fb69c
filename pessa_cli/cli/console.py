"""The only module that prints: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import shlex
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from threading import Timer
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pessa_cli.checkpoint.contents import left_out_text
from pessa_cli.cli.plain_console import PlainConsole, styled
from pessa_cli.cli.quantities import PERCENT, quantity, size, step_row
from pessa_cli.cli.score_table import captions, score_table
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import json_text, listed, visible

if TYPE_CHECKING:
    from pessa_cli.evaluation.bench import Bench
    from pessa_cli.evaluation.evaluate import Scores
    from pessa_cli.evaluation.search import SearchResult
    from pessa_cli.ranks.budget import Point
    from pessa_cli.ranks.plan import Comparison
    from pessa_cli.tuning.train import TrainingStep
    from pessa_cli.workflow.inspect import InspectedBlock, Inspection
    from pessa_cli.workflow.steps import Overview, TooLittleData
    from pessa_cli.workflow.verify import Verification
    from pessa_cli.workflow.written import WrittenModel


OUT, ERR = PlainConsole(), PlainConsole(stderr=True)
PATIENCE = 10.0  # seconds of work without a word, where there is no terminal to show a progress bar
MOST_IGNORED = 4
MOST_STEPS = 12  # rows of the table during training
MOST_LINE = 4000  # characters of a line of an error, which may hold two paths


def show_error(error: PessaError) -> None:
    """Print an error and its hint to stderr."""
    for label, style, text in (("error:", "bold red", error.message), ("hint:", "bold", error.hint)):
        if text:
            lines = "\n".join(line if len(line) <= MOST_LINE else f"{line[:MOST_LINE]}..." for line in text.split("\n"))
            ERR.print(styled((label, style), " ", lines))


def show_traceback(error: BaseException) -> None:
    """Print the traceback of an error to stderr, with those of the errors that it was raised from."""
    ERR.print("".join(traceback.format_exception(error)).rstrip())


def note(text: str) -> None:
    """Print a message to stderr."""
    ERR.print(text)


def note_left_out(left_out: Mapping[str, str]) -> None:
    """Print which files are not in an output, besides hidden ones."""
    if others := left_out_text(left_out):
        note(f"not copied\n{others}")


def show_text(text: str) -> None:
    """Print text to stdout, unchanged and not wrapped."""
    print(text)


def show_json(value: Any) -> None:
    """Print one JSON document to stdout."""
    print(json_text(value))


@contextmanager
def progress(what: str, nbytes: int, steps: int) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr with what is done and the remaining time; it disappears at the end.

    Where stderr is no terminal, a stage that takes longer than PATIENCE is named once.
    """
    what = visible(what)
    long, unit, done = Timer(PATIENCE, note, [f"{what} ..."]), " blocks" if nbytes else "", 0
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), *([DownloadColumn()] if nbytes else []))
    more = (TextColumn("{task.fields[steps]}", markup=False), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *more, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(what, total=nbytes or steps, steps="")

        def tick(bytes_more: int, steps_more: int) -> None:
            nonlocal done
            done += steps_more
            bar.update(task, advance=bytes_more if nbytes else steps_more, steps=f"{done}/{steps}{unit}" * bool(steps))

        tick(0, 0)
        if not ERR.is_terminal:
            long.daemon = True
            long.start()
        try:
            yield tick
        finally:
            long.cancel()


def show_architectures(rows: list[dict[str, Any]]) -> None:
    """Print the table of `architectures`."""
    table = Table(box=None, pad_edge=False)
    for heading in ("model_type", "blocks", "merges", "MLPs", "layouts", "since", "checked on"):
        table.add_column(heading, no_wrap=heading in ("model_type", "blocks"))
    for row in rows:
        mlps = "; ".join(f"{kind.removesuffix('.mlp')}: {form}" for kind, form in row["mlps"].items())
        cells = [mlps, ", ".join(row["layouts"]), row["since"], ", ".join(row["checked"])]
        name = row["model_type"]
        for kind, merges in row["merges"].items():
            table.add_row(name, kind, merges, *cells)
            name, cells = "", []
    OUT.print(table)


def notices(json: bool) -> Callable[[Overview | TooLittleData | Comparison | SearchResult], None]:
    """Return a function that prints what is known before a command is done; with --json only warnings, to stderr."""

    def show(notice: Overview | TooLittleData | Comparison | SearchResult) -> None:
        from pessa_cli.ranks.plan import Comparison
        from pessa_cli.workflow import steps

        if isinstance(notice, steps.TooLittleData):
            note(
                f"Too little calibration data for {len(notice.lines)} blocks: "
                f"their weights partly decide what they keep.\n{listed(notice.lines, 3)}"
            )
        elif isinstance(notice, Comparison):
            if not json:
                _show_compared(notice.to_dict(), tried=True)
            if notice.warning is not None:
                note(notice.warning)
        elif json:
            return
        elif isinstance(notice, steps.Overview):
            _show_model(notice)
        else:
            show_search(notice)

    return show


def _show_compared(compared: Mapping[str, Any] | None, tried: bool) -> None:
    """Print the harm of each plan that was compared, and which was taken.

    tried: whether to print it if the plans were tried, which is printed as soon as it is known, or if they were not.
    """
    from pessa_cli.ranks.plan import PREDICTED

    if compared is None or tried == (compared["unit"] == PREDICTED):
        return
    inputs = "held-out inputs" if compared.get("held_out", True) else "the calibration data"
    how = f"plans tried on {inputs}, harm in {compared['unit']}" if tried else f"{PREDICTED} of each plan"
    harms, taken = compared["harms"], compared["taken"]
    plans = [f"{harm:.3g}  {name}{' (taken)' * (name == taken)}" for name, harm in harms.items()]
    note(f"{how}:\n{listed(plans, len(plans))}")


def _show_work(work: Mapping[str, float] | None) -> None:
    """Print the share of the work that is left, and the inputs that it is counted for."""
    if work is None:
        return
    windows = f"{work['windows']:g} x " if work["windows"] > 1 else ""
    inputs = f"{work['tokens']:.4g} tokens"
    if work["frames"] != work["tokens"]:
        inputs = f"{work['frames']:.4g} positions of the encoder and {inputs} of the decoder"
    OUT.print(
        f"{work['flops'] / 1e9:,.4g} -> {work['flops_after'] / 1e9:,.4g} billion floating-point operations "
        f"({work['share']:.1%}) in these blocks, for {windows}{inputs}"
    )


def show_inspection(found: Inspection) -> None:
    """Print the output of `inspect` after its header: the blocks or the curve, and what the rule would prune."""
    if found.curve:
        show_curve(found.curve, found.method)
    else:
        show_blocks(found.blocks)
    show_totals(found.totals, _with_data(found.rule, found.method))
    _show_if_by_weights(found.totals, found.method)
    _show_work(found.work)
    _show_compared(found.compared, tried=False)


def _show_model(found: Overview) -> None:
    """Print the header of `inspect`: the size of the model and its kinds of blocks."""
    from pessa_cli.surgery.totals import BLOCKS, chosen_kinds  # here, so that they cost no start-up time

    totals, sites = found.totals, found.sites
    these = "these" if totals["blocks_chosen"] < totals["blocks"] else "the"
    shown = [
        f"{totals[f'{kind}_parameters'] / totals['parameters']:.1%} of them in {these} {BLOCKS[kind]}"
        for kind in chosen_kinds(totals)
    ]
    OUT.print(styled((found.model, "bold"), f"  {found.model_type}, {totals['blocks']} blocks"))
    OUT.print(f"{totals['parameters']:,} parameters in {size(totals['bytes'])}, {' and '.join(shown)}")
    from pessa_cli.cli.inspect_tables import block_tables

    for table in block_tables(sites):
        OUT.print(table)
    for line in found.copied:
        OUT.print(line)


def show_blocks(blocks: list[InspectedBlock]) -> None:
    """Print the table of `inspect`: for each block and seam, the spectra of all groups together."""
    from pessa_cli.cli.inspect_tables import spectra_table

    OUT.print(spectra_table(blocks, OUT.encoding))


def show_curve(points: list[Point], method: str) -> None:
    """Print the curve of `inspect`: budgets with the parameters that they keep and the expected errors."""
    whole = points[0]
    calibrated = method == "calibrated"
    error = "worst block, relative error" if calibrated else "worst product, relative error"
    headings = "chosen blocks", "parameters", error, *(["harm to the output"] if calibrated else [])
    table = Table(*headings, box=None, pad_edge=False)
    for point in points:
        harm = [f"{point.harm:.2e}"] if calibrated else []
        table.add_row(f"{point.chosen / whole.chosen:.0%}", f"{point.parameters:,}", f"{point.error:.3f}", *harm)
    OUT.print(table)
    if calibrated:
        OUT.print("harm: the KL divergence of the logits in nats, or the relative squared error of hidden states")


def show_search(found: SearchResult) -> None:
    """Print the budgets that a search has tried."""
    percent = 100 if found.metric in PERCENT else 1
    table = Table("chosen blocks", found.metric, "", box=None, pad_edge=False)
    table.add_row("100%", f"{percent * found.original:.3f}", "the original")
    for share, value in found.tried:
        within = "" if value <= found.limit else f"above {percent * found.limit:.3f}"
        table.add_row(f"{share:.1%}", f"{percent * value:.3f}", within)
    OUT.print(table)


def _with_data(rule: str, method: str) -> str:
    """Return a rule in words, with a note if it was applied to calibrated spectra."""
    return f"{rule}, calibrated" if method == "calibrated" else rule


def show_totals(totals: Mapping[str, Any], rule: str) -> None:
    """Print the shares that the ranks remove, counted as in the paper (PESSA/CLOVER, arXiv 2411.17426)."""
    from pessa_cli.surgery.totals import pruned_parts

    parts = ", and ".join(pruned_parts(totals, "= {} of this attention"))
    OUT.print(styled((rule, "bold"), f" prunes {parts} = {totals['model_pruned']:.2%} of the model"))
    OUT.print(
        f"{totals['parameters']:,} -> {totals['parameters_after']:,} parameters, "
        f"{size(totals['bytes'])} -> {size(totals['bytes_after'])} as compact weights"
    )


def _show_if_by_weights(totals: Mapping[str, Any], method: str) -> None:
    """Print a warning if channels of MLPs are cut without calibration, after which most models are of no use."""
    if method != "calibrated" and totals.get("mlp_pruned"):
        note("warning: these MLPs are cut by their weights alone, which most models do not survive")
        note("hint: give --calibrate DATA, and compare the result with the original by `pessa eval`")


def show_written(written: WrittenModel, check: bool = True) -> None:
    """Print what was written, and with `check` the command that verifies it."""
    rule = _show_pruned(written)
    limits = " --tolerance 1 --min-agreement 0" if written.totals["model_pruned"] else ""
    command = f"pessa verify {shlex.quote(str(written.source))} {shlex.quote(str(written.out))}{limits}"
    how = f"; compare it with the original: {command}" if check else ""
    note_left_out(written.left_out)
    note(f"{written.out} written, {rule}, {written.layout}{how}")


def show_plan(written: WrittenModel) -> None:
    """Print what a run would write: the ranks of each block, and the files."""
    rule = _show_pruned(written)
    headings = {"qk": "ranks of Q-K", "vo": "ranks of V-O", "mlp": "channels"}
    shown = [seam for seam in headings if any(seam in ranks for ranks in written.ranks.values())]
    table = Table("block", *(headings[seam] for seam in shown), box=None, pad_edge=False)
    for name, ranks in written.ranks.items():
        table.add_row(name, *(ranks.get(seam, "") for seam in shown))
    OUT.print(table)
    for file, nbytes in written.shards.items():
        OUT.print(f"{file}  {size(nbytes)}")
    for line in written.other_files.splitlines():
        OUT.print(line)
    if written.out.exists():
        note(f"{written.out} exists: a run needs --force, which replaces only what pessa wrote, or another -o")
    note(f"dry run: {written.out} would be written, {rule}, {written.layout}; nothing was written")


def _show_pruned(written: WrittenModel) -> str:
    """Print the totals of a pruned model; return the rule in words."""
    rule = _with_data(written.rule, written.method)
    if written.command == "prune":
        show_totals(written.totals, rule)
        _show_if_by_weights(written.totals, written.method)
        _show_work(written.manifest.get("work"))
        _show_compared(written.manifest.get("compared"), tried=False)
    for line in written.notes:
        note(line)
    return rule


def show_report(found: Verification) -> None:
    """Print the report of `verify`: the largest difference on each level, the texts, and the verdict."""
    report, names = found.report, (found.reference, found.candidate)
    width = max(map(len, names))
    for name, parameters, nbytes in zip(names, report.parameters, report.nbytes, strict=True):
        OUT.print(f"{name.ljust(width)}  {parameters:,} parameters, {size(nbytes)}")
    table = Table("level", "measure", "worst", "limit", "where", box=None, pad_edge=False)
    for row in report.rows:
        table.add_row(*row)
    OUT.print(table)
    for text in report.texts:
        verdict = ("the same text", "") if text.same else ("different texts", "red")
        OUT.print()
        OUT.print(styled((text.name, "bold"), ": ", verdict))
        for name, output in zip(names, (text.reference, text.candidate), strict=True):
            on_one_line = output.replace("\n", "\\n")
            OUT.print(f"  {name.ljust(width)}  {on_one_line}")
    OUT.print()
    if report.outputs is not None and report.outputs.agreement is not None:
        OUT.print("agreement: the share of positions at which both predict the same token after the same tokens")
    if ignored := [*report.settings.ignored, *report.ignored]:
        OUT.print(f"ignored, since they change nothing that the model does:\n{listed(ignored, MOST_IGNORED)}")
    if report.same:
        OUT.print(styled(("same model", "bold green"), " within these limits"))
        return
    OUT.print(styled(("not the same model", "bold red")))
    for failure in report.failures:
        OUT.print(f"  {failure}")
    if report.hint is not None:
        note(f"a pruned model differs by what was cut; these limits would accept it: {report.hint}")


@contextmanager
def training() -> Iterator[Callable[[TrainingStep], None]]:
    """Show the last steps of training as a live table on stderr, or in files and pipes as one line for each step."""
    shown: deque[TrainingStep] = deque(maxlen=MOST_STEPS)
    with Live(console=ERR, auto_refresh=False) as live:

        def watch(step: TrainingStep) -> None:
            if ERR.is_terminal:
                shown.append(step)
                live.update(_steps_table(shown), refresh=True)
            else:
                ERR.print("  ".join(filter(None, (f"{h} {v}" if v else "" for h, v in step_row(step).items()))))

        yield watch


def _steps_table(steps: Iterable[TrainingStep]) -> Table:
    table = Table(box=None, pad_edge=False)
    rows = [step_row(step) for step in steps]
    for heading in rows[0]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row.values())
    return table


def show_tuned(record: dict[str, Any]) -> None:
    """Print the result of a training run."""
    share = record["trainable_parameters"] / record["parameters"]
    OUT.print(
        styled(
            (record["options"]["adapter"]["method"], "bold"),
            f" trained {record['trainable_parameters']:,} of {record['parameters']:,} parameters ({share:.2%}) for "
            f"{record['steps']} steps in {record['seconds']:.0f} s",
        )
    )
    held_out = "" if record["eval_loss"] is None else f", {record['eval_loss']:.4f} on {record['eval_data']['file']}"
    OUT.print(f"mean loss {record['loss']:.4f}{held_out}")


def show_scores(scores: list[Scores]) -> None:
    """Print the table of `eval`, below captions with metrics, data and their amounts."""
    for caption in captions(scores):
        OUT.print(caption)
    OUT.print_whole(score_table(scores))


def show_bench(bench: Bench, names: tuple[str, str]) -> None:
    """Print the table of `bench`: the reference, the candidate, and their ratio."""
    settings = bench.settings
    rounds = f"medians of {settings.rounds} alternating runs"
    how = f"{settings.device}, {settings.dtype}, {bench.threads} threads, batch {settings.batch}, {rounds}"
    OUT.print(f"{how} ({bench.processor})")
    table = Table("", box=None, pad_edge=False)
    for name in (*names, "ratio"):
        table.add_column(name, justify="right")
    for measure in bench.measures:
        what = f"generate {settings.tokens} tokens" if measure.name == "generate" else measure.name
        values = (quantity(value, measure.unit) for value in (measure.reference, measure.candidate))
        table.add_row(what, *values, "" if measure.ratio is None else f"{measure.ratio:.3f}")
    OUT.print(table)
