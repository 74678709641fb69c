"""Where the statistics of blocks are between the passes: in memory or, if they do not all fit, in a temporary file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from pessa_cli.blocks.site import Site
from pessa_cli.calibration.memory import sums_of
from pessa_cli.statistics.sums import BlockStatistics, statistics_of
from pessa_cli.surgery.scratch import Scratch


class StatisticsOnDisk(MutableMapping[str, BlockStatistics]):
    """Statistics by site name in an unnamed temporary file; those of a block are read on request.

    resources: removes the file when it is closed.
    """

    def __init__(self, sites: Sequence[Site], resources: ExitStack) -> None:
        self._kinds = {site.name: statistics_of(site) for site in sites}
        self._file = resources.enter_context(Scratch(Path(tempfile.gettempdir())))
        self._there: dict[str, None] = {}

    def __getitem__(self, name: str) -> BlockStatistics:
        if name not in self._there:
            raise KeyError(name)
        return self._kinds[name].of(self._file.take(name))

    def __setitem__(self, name: str, found: BlockStatistics) -> None:
        self._file.put(name, {each: getattr(found, each) for each in found.names()})
        self._there[name] = None

    def __delitem__(self, name: str) -> None:
        del self._there[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._there)

    def __len__(self) -> int:
        return len(self._there)


class WithTrials(Mapping[str, BlockStatistics]):
    """Statistics by site name, with the results of the trial cuts in place of those that they have."""

    def __init__(self, found: Mapping[str, BlockStatistics], trials: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._found, self._trials = found, trials

    def __getitem__(self, name: str) -> BlockStatistics:
        return self._found[name].with_trials(self._trials[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def in_groups(sites: Sequence[Site], most_bytes: int) -> list[list[Site]]:
    """Divide blocks into groups, in order, whose sums have at most `most_bytes` together, but at least one block."""
    groups: list[list[Site]] = [[]]
    held = 0
    for site in sites:
        held += sums_of(site)
        if groups[-1] and held > most_bytes:
            groups.append([])
            held = sums_of(site)
        groups[-1].append(site)
    return groups
