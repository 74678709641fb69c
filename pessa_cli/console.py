"""The only module that prints: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import log10
from statistics import geometric_mean, median
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pessa_cli.errors import PessaError, badness

if TYPE_CHECKING:
    from pessa_cli.sites import Site
    from pessa_cli.verify import Report

# Lines wrap where the terminal does it, so that a pipe gets them whole.
OUT = Console(highlight=False, soft_wrap=True)
ERR = Console(stderr=True, highlight=False, soft_wrap=True)
BARS = "▁▂▃▄▅▆▇█" if "utf" in OUT.encoding.lower() else "_.-:=+*#"


def show_error(error: PessaError) -> None:
    ERR.print(f"[bold red]error:[/] {_plain(error.message)}")
    if error.hint:
        ERR.print(f"[bold]hint:[/] {_plain(error.hint)}")


def _plain(text: str) -> str:
    """Text from files and names, without anything that a terminal or the printing library would obey."""
    return escape("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text))


def note(text: str) -> None:
    ERR.print(_plain(text))


def show_json(value: Any) -> None:
    """One JSON document on stdout, with nothing around it."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=True))


@contextmanager
def progress(what: str, nbytes: int, blocks: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr with bytes, blocks and the time left, gone when done."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TextColumn("{task.fields[blocks]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(what, total=nbytes, blocks=f"0/{blocks} blocks")
        done = 0

        def tick(more: int, blocks_more: int) -> None:
            nonlocal done
            done += blocks_more
            bar.update(task, advance=more, blocks=f"{done}/{blocks} blocks")

        yield tick


def show_model(folder: str, config: dict[str, Any], sites: list[Site], totals: dict[str, Any]) -> None:
    """The header of `inspect`: what kinds of blocks there are, from the names and shapes alone."""
    attention = totals["attention_parameters"] / totals["parameters"]
    OUT.print(
        f"[bold]{escape(folder)}[/]  {escape(str(config.get('model_type')))}, {totals['blocks']} attention blocks"
    )
    OUT.print(
        f"{totals['parameters']:,} parameters in {size(totals['bytes'])}, {attention:.1%} of them in "
        f"{'these' if totals['blocks_chosen'] < totals['blocks'] else 'the'} attention blocks"
    )
    table = Table(
        "blocks", "layers", "heads", "head_dim", "width", "biases", "dtype", "merges", box=None, pad_edge=False
    )
    for kind in dict.fromkeys(site.spec.kind for site in sites):
        of_kind = [site for site in sites if site.spec.kind == kind]
        first = of_kind[0]
        heads = str(first.heads) if first.group == 1 else f"{first.heads} ({first.kv_heads} kv)"
        biases = " ".join(side for side in "qkvo" if side in first.biases) or "none"
        table.add_row(
            kind,
            str(len(of_kind)),
            heads,
            str(first.head_dim),
            str(first.query_width),
            biases,
            first.dtype,
            first.spec.merges,
        )
    OUT.print(table)


def show_blocks(blocks: list[dict[str, Any]]) -> None:
    """The table of `inspect`: for each block the spectra of all its heads together, Q-K and V-O."""
    table = Table(box=None, pad_edge=False)
    for heading in ("block", "", "largest", "median", "smallest", "kept", "spectrum, log"):
        table.add_column(
            heading, justify="left" if heading in ("block", "") or heading.startswith("spectrum") else "right"
        )
    for block in blocks:
        name = f"{block['kind']}.{block['layer']}"
        for label, side in (("Q-K", "qk"), ("V-O", "vo")):
            spectrum = block[f"{side}_spectrum"]
            kept = sum(block[f"{side}_ranks"])
            if spectrum is None:
                table.add_row(name, label, "", "", "", "all", "kept: RoPE")
            else:
                values = sorted(value for head in spectrum for value in head)
                numbers = (f"{value:.3g}" for value in (values[-1], median(values), values[0]))
                table.add_row(name, label, *numbers, f"{kept}/{len(values)}", sparkline(spectrum))
            name = ""
    OUT.print(table)


def show_totals(totals: dict[str, Any], rule: str) -> None:
    """What the ranks remove, counted as the paper does."""
    qk = "no Q-K" if totals["qk_pruned"] is None else f"{totals['qk_pruned']:.2%} of Q-K"
    OUT.print(
        f"[bold]{escape(rule)}[/] prunes {qk} and {totals['vo_pruned']:.2%} of V-O "
        f"= {totals['attention_pruned']:.2%} of this attention = {totals['model_pruned']:.2%} of the model"
    )
    OUT.print(
        f"{totals['parameters']:,} -> {totals['parameters_after']:,} parameters, "
        f"{size(totals['bytes'])} -> {size(totals['bytes_after'])} as compact weights"
    )


def show_plan(document: dict[str, Any]) -> None:
    """What a dry run has found: the ranks of each block and the files to come."""
    table = Table("block", "ranks of Q-K", "ranks of V-O", box=None, pad_edge=False)
    for name, ranks in document["ranks"].items():
        table.add_row(name, ranks["qk"], ranks["vo"])
    OUT.print(table)
    for file, nbytes in document["shards"].items():
        OUT.print(f"{file}  {size(nbytes)}")


def show_report(report: Report, names: tuple[str, str]) -> None:
    """What `verify` found, level by level, the worst places first, and the verdict last."""
    limits = report.limits
    width = max(map(len, names))
    for name, parameters, nbytes in zip(names, report.parameters, report.nbytes, strict=True):
        OUT.print(f"{escape(name.ljust(width))}  {parameters:,} parameters, {size(nbytes)}")
    table = Table("level", "measure", "worst", "limit", "where", box=None, pad_edge=False)
    for side in ("Q-K", "V-O", "Q", "K", "output bias"):
        found = [d for d in report.weights if d.where.endswith(" " + side)]
        if found:
            worst = max(found, key=lambda d: badness(d.error))
            where = worst.where.removesuffix(" " + side)
            table.add_row("weights", f"{side}, relative error", f"{worst.error:.2e}", f"{limits.weights:.1e}", where)
    equal = f"{len(report.unequal)} differ" if report.unequal else "equal"
    table.add_row("weights", "all other tensors, bytes", equal, "equal", ", ".join(report.unequal[:2]))
    if report.blocks:
        worst = max(report.blocks, key=lambda d: badness(d.error))
        table.add_row("blocks", "output, relative error", f"{worst.error:.2e}", f"{limits.outputs:.1e}", worst.where)
    out = report.outputs
    if out is not None:
        table.add_row("outputs", f"{out.what}, relative error", f"{out.error:.2e}", f"{limits.outputs:.1e}", "")
        table.add_row("outputs", f"{out.what}, largest difference", f"{out.max_difference:.2e}", "", "")
        table.add_row("outputs", f"{out.what}, mean difference", f"{out.mean_difference:.2e}", "", "")
        if out.kl is not None and out.agreement is not None:
            table.add_row("outputs", "KL divergence, nats", f"{out.kl:.2e}", "", "")
            table.add_row("outputs", "top-1 agreement", f"{out.agreement:.2%}", f"{limits.agreement:.2%}", "")
    OUT.print(table)
    for text in report.texts:
        verdict = "the same text" if text.reference == text.candidate else "[red]different texts[/]"
        OUT.print(f"\n[bold]{escape(text.name)}[/]: {verdict}")
        for name, said in zip(names, (text.reference, text.candidate), strict=True):
            on_one_line = said.replace("\n", "\\n")
            OUT.print(f"  {escape(name.ljust(width))}  {escape(on_one_line)}")
    OUT.print()
    if report.same:
        OUT.print("[bold green]same model[/] within these limits")
        return
    OUT.print("[bold red]not the same model[/]")
    for failure in report.failures:
        OUT.print(f"  {escape(failure)}")


def sparkline(spectrum: list[list[float]], width: int = 20) -> str:
    """The heads' geometric mean along the sorted directions, log scale, from the largest value down by 1e-4."""
    top = max(max(head) for head in spectrum)
    if top == 0:
        return BARS[0] * width
    means = [geometric_mean([max(value, top * 1e-9) for value in column]) for column in zip(*spectrum, strict=True)]
    bars = []
    for i in range(min(width, len(means))):
        value = means[i * len(means) // min(width, len(means))]
        level = 1 + log10(value / top) / 4  # 1 at the top, 0 at a ten-thousandth
        bars.append(BARS[min(len(BARS) - 1, max(0, int(level * len(BARS))))])
    return "".join(bars)


def size(count: float) -> str:
    """Bytes in the decimal units of file managers and hubs."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
