"""Calibration statistics in memory and in files; the statistics in several files of one model can be added up.

Nearly all statistics are second moments of the outputs of projections, d x d for each head, instead of second moments
of their inputs, D x D. This is enough, because the algebra uses a second moment C of the inputs of a projection W only
as `W^T C W`, which is the second moment of the outputs. Only `mixtures` is taken over all heads together, H d x H d,
for the refit of W_O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import torch

from pessa_cli.algebra.channels import Weights
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size, write_file
from pessa_cli.common.text import listed, shortened
from pessa_cli.statistics.sums import AttentionStatistics, BlockStatistics, input_moment, shapes_of, statistics_of
from pessa_cli.statistics.weighing import independent

FORMAT = "pessa-statistics-2"


class Statistics(Protocol):
    """The calibration statistics of the blocks of one model."""

    @property
    def data(self) -> Sequence[str]:
        """The identities of the calibration data, sorted: the SHA-256 of each file.

        For a clip with a transcript or language, a colon and the SHA-256 of these follow; and for augmented data, after
        a second colon, how they were augmented.
        """

    @property
    def sequential(self) -> str | None:
        """The rule by which the blocks before each block were pruned; None if the statistics are of the whole model."""

    @overload
    def of(self, site: AttentionSite, digest: Callable[[], str] | None = None) -> AttentionStatistics: ...

    @overload
    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics: ...

    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics:
        """Return the statistics of a block.

        digest: computes the fingerprint of the block's weights; it is called only if there is a fingerprint to compare
        with. Raises PessaError if there are no statistics of this block, or if they belong to other weights.
        """


def data_sha256(statistics: Statistics) -> str:
    """Return the SHA-256 of the calibration data, which does not depend on the order of its files."""
    return hashlib.sha256("".join(statistics.data).encode()).hexdigest()


def files_of(identities: Iterable[str]) -> set[str]:
    """Return the SHA-256 of the files of calibration data, without those of transcripts."""
    return {identity.partition(":")[0] for identity in identities}


def augmented_identity(identity: str, how: str) -> str:
    """Return the identity of an item of the calibration data that is augmented; how: in words, without a colon."""
    file, _, spoken = identity.partition(":")
    return f"{file}:{spoken}:{how}"


def augmentation_of(identities: Iterable[str]) -> str | None:
    """Return how calibration data were augmented, in words; None if they were not."""
    ways = {how for identity in identities for how in identity.split(":")[2:]}
    return "; ".join(sorted(ways)) or None


@dataclass(frozen=True)
class CollectedStatistics:
    """Statistics in memory by site name, which were collected in this run and so belong to the weights in use."""

    blocks: Mapping[str, BlockStatistics]
    data: Sequence[str]
    sequential: str | None = None

    @overload
    def of(self, site: AttentionSite, digest: Callable[[], str] | None = None) -> AttentionStatistics: ...

    @overload
    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics: ...

    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics:  # noqa: ARG002
        """Return the statistics of a block; `digest` is not needed."""
        return self.blocks[site.name]


class SavedStatistics:
    """The statistics in one or more files of one model, added up; the statistics of a block are read on request.

    Raises PessaError for files that hold no statistics, if two of them were collected on the same data, and if they
    were not all collected behind the same blocks, pruned or not.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self._about = [_about(path) for path in paths]
        self.data: Sequence[str] = sorted(digest for about in self._about for digest in about["data"])
        named = listed([str(path) for path in paths])
        files = [files_of(about["data"]) for about in self._about]
        if len(set().union(*files)) < sum(map(len, files)):
            raise PessaError(
                f"these statistics have calibration data in common\n{named}", "give only one file for the same data"
            )
        ways = {about["sequential"] for about in self._about}
        if len(ways) > 1:
            ruled = " and ".join(sorted(f"pruned by {way}" if way else "not pruned" for way in ways))
            raise PessaError(
                f"these statistics were collected behind blocks that were {ruled}, and so cannot be added up\n{named}",
                "give only files that were collected with the same options",
            )
        self.sequential: str | None = next(iter(ways), None)

    @overload
    def of(self, site: AttentionSite, digest: Callable[[], str] | None = None) -> AttentionStatistics: ...

    @overload
    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics: ...

    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics:
        """Return the sum of a block's statistics over all files.

        Raises PessaError if a file has none for this block, or if they belong to other weights.
        """
        from safetensors import safe_open

        total: BlockStatistics | None = None
        expected = None if digest is None else digest()
        for path, about in zip(self.paths, self._about, strict=True):
            with safe_open(path, framework="pt") as file:
                there = set(file.keys())
                names = {name: f"{site.name}.{name}" for name in shapes_of(site)}
                if not set(names.values()) <= there:
                    raise PessaError(
                        f"{path} has no statistics of {site.name}",
                        "collect them again with --calibrate, or choose the blocks that it has with --sites",
                    )
                found = statistics_of(site).of({name: file.get_tensor(stored) for name, stored in names.items()})
            if not _plausible(found, site):
                raise PessaError(
                    f"{path}: the statistics of {site.name} do not fit its {site.function}",
                    "collect them again with --calibrate",
                )
            if expected is not None and about["weights"].get(site.name) != expected:
                raise PessaError(
                    f"{path}: the statistics of {site.name} are of other weights than this model has",
                    "collect them again on this model with --calibrate",
                )
            total = found if total is None else total + found
        assert total is not None
        return total


def shortages(statistics: Statistics, sites: Sequence[Site]) -> list[str]:
    """Return a line for each block with too little data: fewer independent frames than dimensions, or no trial cuts."""
    few = []
    for site in sites:
        found = statistics.of(site)
        moment = input_moment(found)
        wide = int((moment.diagonal() > 0).sum())
        count = min(int(found.frames), independent(moment))
        if count < wide:
            few.append(f"{site.name}: {count:,} independent frames for {wide:,} dimensions")
        elif found.trials is None:
            few.append(f"{site.name}: no trial cuts, because the model did not fit into memory")
    return few


def save_statistics(
    path: Path,
    blocks: Mapping[str, BlockStatistics],
    weights: Mapping[str, str],
    data: Sequence[str],
    sequential: str | None = None,
) -> None:
    """Write the statistics of all blocks to a safetensors file.

    blocks: by site name. weights: the fingerprints of the blocks' weights, by site name. data, sequential: see
    `Statistics`. A file that is there already is left as it is. Raises PessaError when the file cannot be written.
    """
    from safetensors.torch import save

    tensors = {
        f"{place}.{name}": getattr(found, name).contiguous()
        for place, found in blocks.items()
        for name in found.names()
    }
    about = {"format": FORMAT, "weights": json.dumps(dict(weights)), "data": json.dumps(sorted(data))}
    if sequential is not None:
        about["sequential"] = sequential
    write_file(path, save(tensors, about), "--statistics", new=True)


def fingerprint(weights: Weights) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of a block's weights in the canonical form."""
    digest = hashlib.sha256()
    for name, tensor in vars(weights).items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _about(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        file_size(path)
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError(f"its format is {shortened(about.get('format'))}, not {FORMAT}")
        read = {"weights": json.loads(about["weights"]), "data": json.loads(about["data"])}
        read["sequential"] = about.get("sequential")
        if not isinstance(read["weights"], dict) or not isinstance(read["data"], list):
            raise ValueError("its metadata is damaged")
        return read
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise PessaError(f"{path} is not a statistics file: {reason}", "write one with --calibrate DATA") from error


def _plausible(found: BlockStatistics, site: Site) -> bool:
    """Return whether all tensors are float64, finite, and of the shapes of the site."""
    tensors = {name: getattr(found, name) for name in found.names()}
    return all(
        tensor.dtype == torch.float64 and tuple(tensor.shape) == shapes_of(site)[name] and bool(tensor.isfinite().all())
        for name, tensor in tensors.items()
    )
