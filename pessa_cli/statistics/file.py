"""What calibration data makes of each attention block: sums over its frames, in a file that others can be added to.

All of it is second moments of what comes out of projections, d x d for each head, and not of what goes into them,
D x D: for a projection W and inputs of second moment C, `W^T C W` is the second moment of its outputs, and the algebra
needs nothing else of C. Only the mixtures are taken jointly for all heads, (H d x H d), for the refit of W_O.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import Site
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.statistics.sums import NAMES, BlockStatistics, shapes_of
from pessa_cli.statistics.weighing import independent

FORMAT = "pessa-statistics-2"


class Statistics(Protocol):
    """The calibration statistics of the blocks of one model.

    `data` holds the SHA-256 of each file of calibration data, sorted.
    """

    @property
    def data(self) -> Sequence[str]:
        """The SHA-256 of each file of calibration data, sorted."""

    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics:
        """The sums of a block.

        `digest` computes the fingerprint of the block's weights; it is called only if there is something to compare it
        with. Raises PessaError if there are no sums of this block, or if they are of other weights.
        """


def data_sha256(statistics: Statistics) -> str:
    """The SHA-256 of the calibration data: the same for the same files in any order."""
    return hashlib.sha256("".join(statistics.data).encode()).hexdigest()


@dataclass(frozen=True)
class CollectedStatistics:
    """Statistics that were collected in this run, in memory, by site name; they are of the weights in use."""

    blocks: Mapping[str, BlockStatistics]
    data: Sequence[str]

    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics:  # noqa: ARG002
        """The sums of a block; there is nothing to compare its weights with."""
        return self.blocks[site.name]


class SavedStatistics:
    """The statistics in one or more files of one model, added up; a block is read when it is asked for.

    Raises PessaError for files that hold no statistics, and for files that have calibration data in common.
    """

    def __init__(self, *paths: Path) -> None:
        self.paths = paths
        self._about = [_about(path) for path in paths]
        self.data: Sequence[str] = sorted(digest for about in self._about for digest in about["data"])
        if len(set(self.data)) < len(self.data):
            named = listed([str(path) for path in paths])
            raise PessaError(f"these have data in common\n{named}", "give each part of the data once")

    def of(self, site: Site, digest: Callable[[], str] | None = None) -> BlockStatistics:
        """The sums of a block. Raises PessaError if there are none, or if they are of other weights."""
        from safetensors import safe_open

        total: BlockStatistics | None = None
        expected = None if digest is None else digest()
        for path, about in zip(self.paths, self._about, strict=True):
            with safe_open(path, framework="pt") as file:
                there = set(file.keys())
                if not {f"{site.name}.{name}" for name in NAMES} <= there:
                    raise PessaError(f"{path} has no statistics of {site.name}", "collect them anew with --calibrate")
                found = BlockStatistics(*(file.get_tensor(f"{site.name}.{name}") for name in NAMES))
            if not _plausible(found, site):
                raise PessaError(f"{path} does not fit {site.name}", "collect it anew with --calibrate")
            if expected is not None and about["weights"].get(site.name) != expected:
                raise PessaError(
                    f"{path} is of other weights than {site.name} has", "collect it anew on this model: --calibrate"
                )
            total = found if total is None else total + found
        assert total is not None
        return total


def shortages(statistics: Statistics, sites: Sequence[Site]) -> list[str]:
    """A line for each block with too little data: fewer independent frames than dimensions, or no trials."""
    few = []
    for site in sites:
        found = statistics.of(site)
        wide = int((found.mixtures.diagonal() > 0).sum())
        count = min(int(found.frames), independent(found.mixtures))
        if count < wide:
            few.append(f"{site.name}: {count:,} independent frames for {wide:,} dimensions")
        elif found.trials is None:
            few.append(f"{site.name}: no trials, since the model did not fit into memory")
    return few


def save_statistics(
    path: Path, blocks: Mapping[str, BlockStatistics], weights: Mapping[str, str], data: Sequence[str]
) -> None:
    """Write the sums of all blocks, by site name, with the fingerprints of their weights and the hashes of the data."""
    from safetensors.torch import save

    tensors = {f"{s}.{name}": getattr(found, name).contiguous() for s, found in blocks.items() for name in NAMES}
    about = {"format": FORMAT, "weights": json.dumps(dict(weights)), "data": json.dumps(sorted(data))}
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_bytes(save(tensors, about))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise PessaError(f"cannot write {path}: {error}", "give --statistics a file in a folder that exists") from error


def fingerprint(weights: HeadWeights) -> str:
    """A hash of a block's weights, of their bytes in the canonical form."""
    digest = hashlib.sha256()
    for name, tensor in vars(weights).items():
        if tensor is not None:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _about(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            about = file.metadata() or {}
        if about.get("format") != FORMAT:
            raise ValueError("it has another format")
        read = {"weights": json.loads(about["weights"]), "data": json.loads(about["data"])}
        if not isinstance(read["weights"], dict) or not isinstance(read["data"], list):
            raise ValueError("its metadata is damaged")
        return read
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise PessaError(f"{path} is not a file of statistics: {reason}", "write one with --calibrate DATA") from None


def _plausible(found: BlockStatistics, site: Site) -> bool:
    """Float64, of the site's shapes, and finite."""
    tensors = [getattr(found, name) for name in NAMES]
    return all(
        tensor.dtype == torch.float64 and tuple(tensor.shape) == shape and bool(tensor.isfinite().all())
        for tensor, shape in zip(tensors, shapes_of(site), strict=True)
    )
