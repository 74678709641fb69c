"""Comparing two models, or the files of one model with the hashes in its pessa.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.limits import VerifyOptions
from pessa_cli.evaluation.report import Report
from pessa_cli.evaluation.verify import verify_folder, verify_models
from pessa_cli.workflow.steps import opened


@dataclass(frozen=True)
class Verification:
    """The comparison of two models. reference and candidate: as the user called them."""

    reference: str
    candidate: str
    report: Report

    @property
    def same(self) -> bool:
        """Whether all differences are within the limits."""
        return self.report.same

    @property
    def failures(self) -> list[str]:
        """A line for each level that failed: its worst place, and how many checks failed."""
        return self.report.failures

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {"reference": self.reference, "candidate": self.candidate, **self.report.to_dict()}


@dataclass(frozen=True)
class FileCheck:
    """The comparison of a folder with the hashes in its pessa.json. failures: a line for each file that differs."""

    folder: Path
    failures: list[str]

    @property
    def same(self) -> bool:
        """Whether all files are unchanged since they were written."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        return {"folder": str(self.folder), "same": self.same, "failures": self.failures}


def verify(
    reference: str | Path,
    candidate: str | Path,
    options: VerifyOptions = VerifyOptions(),
    *,
    audio: Sequence[str | Path] = (),
    text: Sequence[str | Path] = (),
    progress: Progress = quietly,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
) -> Verification:
    """Compare the heads, blocks, other tensors and outputs of two models.

    reference: the original, a folder, a file, or a name on a hub. candidate: the model made from it. options: how much
    is compared, and the largest differences that are allowed. audio, text: files on which the outputs are also
    compared; audio files are for speech models. progress: reports the work that was done. architecture: treat both
    models as this `model_type`. revision: branch, tag or commit of a reference from a hub. allow_pickle: also convert
    pickled weights. follow_links: also read files outside of the model's folder that links in it lead to.

    Returns all differences; its `same` is True if they are within the limits. Raises UsageError for options that do not
    fit the models, and PessaError when a model cannot be read, or when the two do not have the same blocks.
    """
    with (
        opened(reference, architecture, revision, allow_pickle, follow_links) as ours,
        opened(candidate, architecture, None, allow_pickle, follow_links) as theirs,
    ):
        clips, texts = ([Path(file) for file in files] for files in (audio, text))
        report = verify_models(
            ours,
            theirs,
            audio=clips,
            text=texts,
            architecture=architecture,
            progress=progress,
            **vars(options),
        )
    return Verification(str(reference), str(candidate), report)


def verify_files(folder: str | Path) -> FileCheck:
    """Compare the files of a folder that pessa wrote with the SHA-256 hashes in its pessa.json.

    Returns the files that are missing, changed or new. Raises PessaError for a folder without such a pessa.json.
    """
    return FileCheck(Path(folder), verify_folder(Path(folder)))
