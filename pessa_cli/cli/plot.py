"""Plots of spectra against norms, as in figure 2 of the paper, and of the errors of budgets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pessa_cli.blocks.seam import TITLES
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import check_writable, whole_file
from pessa_cli.ranks.budget import Point
from pessa_cli.ranks.spectra import Spectra, Spectrum

MOST_COLUMNS = 4


def plot_spectra(
    path: Path, sites: Sequence[Site], spectra: Mapping[str, Spectra], norms: Mapping[str, Spectra]
) -> None:
    """Draw each block's sorted singular values against its sorted products of L2 norms, to a PNG, SVG or PDF.

    One row for each kind of block and seam, one column for each layer, at most four of them, evenly spaced.
    Thin lines are heads, thick lines their geometric mean. Source: PESSA/CLOVER, arXiv 2411.17426, figure 2.
    """
    check_plot(path)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    kinds = list(dict.fromkeys(site.kind for site in sites))
    rows = [
        (kind, seam)
        for kind in kinds
        for seam in TITLES
        if any(seam in spectra[site.name].seams for site in sites if site.kind == kind)
    ]
    layers = _spread(sorted({site.layer for site in sites}))
    figure, axes = plt.subplots(
        len(rows),
        len(layers),
        figsize=(3.2 * len(layers), 2.6 * len(rows)),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    by_place = {(site.kind, site.layer): site.name for site in sites}
    for row, (kind, seam) in zip(axes, rows, strict=True):
        for axis, layer in zip(row, layers, strict=True):
            name = by_place.get((kind, layer))
            if name is None:
                axis.set_axis_off()
                continue
            for source, colour, label in ((norms, "tab:orange", "product of L2 norms"), (spectra, "tab:blue", "SVD")):
                values = source[name].seams.get(seam)
                if values is not None:
                    _draw(axis, values, colour, label)
            axis.set_title(f"{kind} {layer}, {TITLES[seam]}", fontsize=9)
            axis.set_yscale("log")
            axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    heads, mlps = (any((seam == "mlp") == mlp for _, seam in rows) for mlp in (False, True))
    of = " or ".join(["direction of the head"] * heads + ["channel of the MLP"] * mlps)
    figure.supxlabel(f"{of}, sorted", fontsize=9)
    figure.supylabel("importance", fontsize=9)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot as plt

    try:
        with whole_file(path, "--plot") as file:
            figure.savefig(file, dpi=150, format=path.suffix[1:].lower())
    finally:
        plt.close(figure)


def plot_curve(path: Path, points: list[Point]) -> None:
    """Draw the predicted errors against the share of the chosen blocks that is kept, to a PNG, SVG or PDF."""
    check_plot(path)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(5.5, 3.6), layout="constrained")
    kept = [point.chosen / points[0].chosen for point in points[1:]]
    axis.plot(kept, [point.error for point in points[1:]], label="worst block, relative error")
    axis.plot(kept, [point.harm for point in points[1:]], label="harm to the output")
    axis.set(xlabel="share of the parameters of the chosen blocks that is kept", yscale="log")
    axis.invert_xaxis()
    axis.legend(fontsize=8)
    _save(figure, path)


def check_plot(path: Path) -> None:
    """Raise UsageError or PessaError if the plot cannot be written, before any long work."""
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(
            f"--plot {path}: {path.suffix or 'no suffix'} is not an image format", "give a .png, .svg or .pdf file"
        )
    check_writable(path, "--plot")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise PessaError("--plot needs matplotlib", "pip install 'pessa[plot]'") from error


def _draw(axis: object, values: Spectrum, colour: str, label: str) -> None:
    import numpy as np

    seen = values.clip(values.max() * 1e-9 or 1e-300, None)  # zero has no logarithm
    axis.plot(seen.T, color=colour, linewidth=0.4, alpha=0.4)  # type: ignore[attr-defined]
    axis.plot(np.exp(np.log(seen).mean(0)), color=colour, linewidth=1.8, label=label)  # type: ignore[attr-defined]


def _spread(layers: list[int]) -> list[int]:
    if len(layers) <= MOST_COLUMNS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
