"""Measuring which of two models is faster and smaller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.bench import Bench, BenchSettings, bench_models
from pessa_cli.workflow.steps import opened


@dataclass(frozen=True)
class BenchResult:
    """The measurements of two models. reference and candidate: as the user called them."""

    reference: str
    candidate: str
    bench: Bench

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {"reference": self.reference, "candidate": self.candidate, **self.bench.to_dict()}


def bench(
    reference: str | Path,
    candidate: str | Path,
    settings: BenchSettings = BenchSettings(),
    *,
    progress: Progress = quietly,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> BenchResult:
    """Run two models in turn, each in a process of its own, and measure time (seconds), memory and size (bytes).

    reference: the original, a folder, a file, or a name on a hub. candidate: the model made from it. settings: device,
    dtype, threads and sizes of the runs. progress: reports the work that was done. revision: branch, tag or commit of a
    reference from a hub. allow_pickle: also convert pickled weights. follow_links: also read
    files outside of the model's folder that links in it lead to. The processes are spawned, so that a script needs
    the guard `if __name__ == "__main__"`.

    Returns the measurements of both models. Raises PessaError when a model cannot be read or run, and when the two
    models are of different types.
    """
    with (
        opened(reference, None, revision, allow_pickle, follow_links) as ours,
        opened(candidate, allow_pickle=allow_pickle, follow_links=follow_links) as theirs,
    ):
        return BenchResult(str(reference), str(candidate), bench_models(ours, theirs, settings, progress))
