"""The original numbers of the channels of MLPs that pessa has reordered, as pessa.json holds them.

A reordered MLP is the same function. The numbers tell which channel of the original each of its channels is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.files import read_json
from pessa_cli.checkpoint.manifest import MANIFEST_FILE
from pessa_cli.common.errors import PessaError

CHANNELS = "channels"  # the key of pessa.json


def load_channels(folder: Path, sites: Sequence[Site]) -> dict[str, tuple[int, ...]]:
    """Return the original numbers of the channels of reordered MLPs, by site name, as the folder's pessa.json has them.

    The numbers are those of the stored channels, in the order of the file. Raises PessaError if they do not fit the
    sites.
    """
    path = folder / MANIFEST_FILE
    if not path.is_file():
        return {}
    try:
        content = read_json(path)
    except PessaError:
        return {}  # a foreign file of this name; whoever needs it reports what is wrong with it
    texts = content.get(CHANNELS)
    if texts is None:
        return {}
    by_name = {site.name: site for site in sites if isinstance(site, MlpSite)}
    found: dict[str, tuple[int, ...]] = {}
    for name, text in texts.items() if isinstance(texts, Mapping) else [("", "")]:
        site = by_name.get(name)
        numbers = _numbers(text)
        if site is None or numbers is None or not _fit(site, numbers):
            raise PessaError(
                f"{path} is damaged: its numbers of channels do not fit {name or 'the MLPs'}",
                "prune the original again",
            )
        found[name] = numbers
    return found


def _numbers(text: Any) -> tuple[int, ...] | None:
    if not isinstance(text, str):
        return None
    try:
        return tuple(int(number) for number in text.split(" "))
    except ValueError:
        return None


def _fit(site: MlpSite, numbers: tuple[int, ...]) -> bool:
    return (
        len(set(numbers)) == len(numbers)
        and min(numbers) >= 0
        and max(numbers) < site.width
        and (site.kept == len(numbers) or (site.kept == site.width and len(numbers) <= site.width))
    )


def all_channels(numbers: Sequence[int] | None, width: int) -> list[int]:
    """Return the original number of every channel at full width: the stored ones, then those that were cut."""
    first = list(range(width)) if numbers is None else list(numbers)
    known = set(first)
    return first + [number for number in range(width) if number not in known]
