"""Checks that the tensors of a file are what its blocks, attention or MLPs, are said to store."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from pessa_cli.blocks.site import Site, count
from pessa_cli.checkpoint.dtypes import FLOATS
from pessa_cli.checkpoint.reader import Header
from pessa_cli.common.errors import PessaError


def check_floats(names: Iterable[str], header: Header) -> None:
    """Raise PessaError unless tensors whose names end in ".weight" are matrices of floats, and all others vectors."""
    for name in names:
        info, size = header[name], 2 if name.endswith(".weight") else 1
        if len(info.shape) != size or info.dtype not in FLOATS:
            what = "a matrix" if size == 2 else "a vector"
            raise PessaError(f"{name}: expected {what} of floats, found {info.dtype} {info.shape}")


def check_shapes(site: Site, header: Header, most: int, needs: str) -> None:
    """Raise PessaError if a tensor of a block has another shape, or if the block is too large at full size.

    most: the largest allowed number of entries at full size. needs: says in words what the shapes follow from.
    """
    size = count(site.in_full().tensors)
    if size > most:
        raise PessaError(
            f"{site.module(site.last)}: at full size the block would have {size:,} entries, more than {most:,}"
        )
    for name, shape in site.tensors.items():
        if header[name].shape != shape:
            raise PessaError(f"{name}: the file has shape {header[name].shape}, but {needs} need {shape}")


def found_twice(sites: Iterable[Site]) -> list[str]:
    """Return a fault for each name that several blocks have."""
    named: dict[str, list[str]] = defaultdict(list)
    for site in sites:
        named[site.name].append(site.module(site.last))
    return [
        f"{name} was found twice or more: {' and '.join(modules[:8])}"
        for name, modules in named.items()
        if len(modules) > 1
    ]
