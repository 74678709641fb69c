"""Draw the picture of the README: the spectra of Whisper tiny.en, from `pessa inspect --json`.

python scripts/draw_readme.py [-o docs/images/spectra.svg]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

os.environ["SOURCE_DATE_EPOCH"] = "0"  # the same picture each time
import matplotlib as mpl
import numpy as np
from fetch_models import fetch
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
THRESHOLDS = {"qk": 5e-3, "vo": 6e-3}
TITLES = {"encoder.self": "encoder, self", "decoder.self": "decoder, self", "decoder.cross": "decoder, cross"}
COLOURS = {"qk": "#3b5bdb", "vo": "#e8590c"}
NAMES = {"qk": "$W_Q W_K^T$", "vo": "$W_V W_O$"}


def inspected(model: Path) -> dict[str, Any]:
    """What `pessa inspect --json` says with the thresholds of the paper."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, _, function = project["scripts"]["pessa"].partition(":")
    code = f"from {module} import {function}; {function}()"
    thresholds = [f"--{side}-thr={value}" for side, value in THRESHOLDS.items()]
    command = [sys.executable, "-c", code, "inspect", str(model), *thresholds, "--json"]
    document: dict[str, Any] = json.loads(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("-o", "--out", type=Path, default=ROOT / "docs" / "images" / "spectra.svg")
    out = parser.parse_args().out
    blocks = inspected(fetch("whisper-tiny.en"))["blocks"]
    mpl.rcParams |= {"svg.hashsalt": "pessa", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(1, len(TITLES), figsize=(8.4, 2.5), sharey=True, layout="constrained")
    for axis, (kind, title) in zip(axes, TITLES.items(), strict=True):
        for side, threshold in THRESHOLDS.items():
            heads = np.concatenate([block["seams"][side]["spectrum"] for block in blocks if block["kind"] == kind])
            directions = np.arange(1, heads.shape[1] + 1)
            low, middle, high = np.percentile(heads, [0, 50, 100], axis=0)
            axis.fill_between(directions, low, high, color=COLOURS[side], alpha=0.18, linewidth=0)
            axis.plot(directions, middle, color=COLOURS[side], label=NAMES[side])
            axis.axhline(threshold, color=COLOURS[side], linestyle=":", linewidth=0.8)
        axis.set(title=title, xlabel="direction", yscale="log", ylim=(1e-6, 40), xlim=(1, heads.shape[1]))
    axes[0].set_ylabel("singular value")
    axes[0].legend(frameon=False, loc="lower left")
    figure.savefig(out, metadata={"Date": None}, transparent=False)
    print(out)


if __name__ == "__main__":
    main()
