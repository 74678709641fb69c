"""The result of the commands that write a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.surgery.rewrite import Rewrite
from pessa_cli.surgery.totals import totals

if TYPE_CHECKING:
    from pessa_cli.evaluation.search import SearchResult


@dataclass(frozen=True)
class WrittenModel:
    """A model that was written, or that a dry run would have written.

    source: the model it was made from, as the user called it. manifest: the content of its pessa.json without hashes.
    totals: blocks, parameters and bytes before and after, and the pruned shares, from 0 to 1. shards: the bytes of
    weights in each file. copied: the other files that are taken over from the source. left_out: those that are not,
    with the reason; a folder is one entry. search: the budgets that were tried, if the recipe limits an increase.
    warnings: a line for each block that has too little calibration data, and one if more data would help.
    """

    source: str
    out: Path
    manifest: Mapping[str, Any]
    totals: Mapping[str, Any]
    shards: Mapping[str, int]
    copied: list[str] = field(default_factory=list)
    left_out: Mapping[str, str] = field(default_factory=dict)
    search: SearchResult | None = None
    warnings: list[str] = field(default_factory=list)

    @staticmethod
    def of(
        rewrite: Rewrite,
        source: str | Path,
        out: Path,
        search: SearchResult | None = None,
        warnings: list[str] | None = None,
    ) -> WrittenModel:
        """Return the result for an output, from its description."""
        header, sites = rewrite.model.reader.header, rewrite.model.sites
        counted = totals(header, sites, rewrite.sites, rewrite.ranks)
        shards = {file: sum(info.nbytes for info in part.values()) for file, part in rewrite.shards.items()}
        copied, left_out = rewrite.contents.copied, rewrite.contents.left_out
        return WrittenModel(
            str(source), out, rewrite.summary, counted, shards, copied, left_out, search, warnings or []
        )

    @property
    def command(self) -> str:
        """The command that wrote the model: prune, decompose or export."""
        return str(self.manifest["command"])

    @property
    def rule(self) -> str:
        """How the ranks were chosen, in words."""
        return str(self.manifest["rule"])

    @property
    def method(self) -> str:
        """How directions were ranked: svd, vanilla or calibrated."""
        return str(self.manifest["method"])

    @property
    def notes(self) -> list[str]:
        """A sentence for each file whose content the output changes, because it does not fit the model."""
        return list(self.manifest.get("notes", ()))

    @property
    def layout(self) -> str:
        """How the weights are stored: compact or dense."""
        return str(self.manifest["layout"])

    @property
    def ranks(self) -> Mapping[str, Mapping[str, str]]:
        """For each block the ranks of its key/value heads, as in pessa.json: {"qk": "8 7 8 8", "vo": "6 8 8 5"}."""
        found: Mapping[str, Mapping[str, str]] = self.manifest["ranks"]
        return found

    @property
    def other_files(self) -> str:
        """A line for each file beside the weights, with what becomes of it."""
        copied = dict.fromkeys(self.copied, "copied")
        return "\n".join(f"{name}  {what}" for name, what in (copied | dict(self.left_out)).items())

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        searched = {} if self.search is None else {"search": self.search.to_dict()}
        about = {"source": self.source, "out": str(self.out), "totals": dict(self.totals), "shards": dict(self.shards)}
        files = {"copied": list(self.copied), "left_out": dict(self.left_out)}
        return {**self.manifest, **about, **files, **searched}
