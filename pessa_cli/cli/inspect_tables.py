"""The tables of `inspect`: the kinds of blocks of a model, and the spectra of each block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

from rich.table import Table

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.seam import TITLES
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.cli.sparkline import sparkline

if TYPE_CHECKING:
    from pessa_cli.workflow.inspect import InspectedBlock


def block_tables(sites: Sequence[Site]) -> Iterator[Table]:
    """Yield a table of the kinds of attention blocks and one of the kinds of MLPs, if there are any."""
    attention = [site for site in sites if isinstance(site, AttentionSite)]
    table = Table(
        "blocks", "layers", "heads", "head_dim", "width", "biases", "dtype", "merges", box=None, pad_edge=False
    )
    for kind in dict.fromkeys(site.kind for site in attention):
        of_kind = [site for site in attention if site.kind == kind]
        first = of_kind[0]
        table.add_row(
            kind,
            str(len(of_kind)),
            str(first.heads) if first.group == 1 else f"{first.heads} ({first.kv_heads} kv)",
            str(first.head_dim),
            str(first.query_width),
            " ".join(side for side in "qkvo" if side in first.biases) or "none",
            first.dtype,
            " | ".join(dict.fromkeys(site.merges for site in of_kind)),
        )
    if attention:
        yield table
    mlps = [site for site in sites if isinstance(site, MlpSite)]
    table = Table("MLPs", "layers", "channels", "gated", "width", "biases", "dtype", box=None, pad_edge=False)
    for kind in dict.fromkeys(site.kind for site in mlps):
        own = [site for site in mlps if site.kind == kind]
        channels = " | ".join(dict.fromkeys(f"{site.width:,}" for site in own))
        gated, biases = "yes" if own[0].gated else "no", "yes" if own[0].biases else "none"
        table.add_row(kind, str(len(own)), channels, gated, str(own[0].input_width), biases, own[0].dtype)
    if mlps:
        yield table


def spectra_table(blocks: Sequence[InspectedBlock], encoding: str) -> Table:
    """Return a row for each block and seam with the spectra of all groups together; encoding: of the terminal."""
    table = Table(box=None, pad_edge=False)
    for heading in ("block", "", "largest", "median", "smallest", "kept", "spectrum, log"):
        table.add_column(
            heading, justify="left" if heading in ("block", "") or heading.startswith("spectrum") else "right"
        )
    for block in blocks:
        name = f"{block.kind}.{block.layer}"
        for seam, found in block.seams.items():
            label, spectrum, kept = TITLES[seam], found.spectrum, sum(found.ranks)
            if spectrum is None and found.pairs is None:  # for example with norms between W_Q and W_K
                continue
            if spectrum is None:  # RoPE: pairs of directions, in the units of singular values and sorted like them
                label, kept = f"{label} pairs", kept // 2
                spectrum = [sorted((pair**0.5 for pair in head), reverse=True) for head in found.pairs or []]
            values = sorted(value for head in spectrum for value in head)
            numbers = (f"{value:.3g}" for value in (values[-1], median(values), values[0]))
            table.add_row(name, label, *numbers, f"{kept}/{len(values)}", sparkline(spectrum, encoding))
            name = ""
    return table
