"""The decomposition of a model's blocks: each is read, weighed and decomposed once, and may then be cut many times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

from torch import Tensor

from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import Site
from pessa_cli.common.jobs import in_order, one_thread
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.statistics.file import Statistics
from pessa_cli.surgery.block_io import NotFiniteError, StorageLayout, write_site
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposed_block import (
    BlockTransforms,
    DecomposedBlock,
    cut,
    decompose_block,
    factored,
    pair_contributions,
    spectra_of,
)
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.rewrite import Ranking
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.scratch import Scratch
from pessa_cli.surgery.spectra_file import check_spectra

Found = TypeVar("Found")


class Decomposition:
    """Blocks in decomposed form, by site name: `spectra` to plan ranks by, and `cut` to write what is kept of them.

    The transforms are in a file without a name. Where the reader keeps weights in memory, the factors stay there, too;
    elsewhere `cut` reads the weights a second time.
    """

    def __init__(self, model: Model, blocks: BlockReader, scratch: Scratch, run: Run) -> None:
        self.spectra: dict[str, Spectra] = {}
        self._model, self._blocks, self._scratch, self._run = model, blocks, scratch, run
        self._sites = {site.name: site for site in model.sites}  # as the source stores them
        self._factors: dict[str, HeadWeights] = {}
        self._stored: set[str] = set()  # blocks that the file stores as factors already

    def decompose(self, sites: Sequence[Site], statistics: Statistics | None = None, ranking: Ranking = "svd") -> None:
        """Decompose blocks: by the spectra on file, by their weights, or by `statistics` of real inputs.

        With `statistics` the blocks are decomposed anew, whatever is on file. Blocks whose spectra are on file are not
        read, unless frequency pairs have to be weighed; they are compared with these spectra when they are cut. Raises
        NotFiniteError with every tensor that is not finite, after having looked at all of them.
        """
        blocks, device = self._blocks, self._run.device

        def decompose(site: Site) -> DecomposedBlock:
            known = self._model.spectra.get(site.name) if ranking == "svd" and statistics is None else None
            if known is not None and not site.by_pairs:
                return DecomposedBlock(known, None)
            weights = blocks.weights(site)
            if known is not None:
                return DecomposedBlock(replace(known, pairs=pair_contributions(weights.to(device), site)), None)
            found = None if statistics is None else statistics.of(site, lambda: blocks.fingerprint(site, weights))
            return decompose_block(weights.to(device), site, ranking, found)

        _over_blocks(self._model, sites, decompose, self._run, self._add)

    def _add(self, site: Site, block: DecomposedBlock) -> None:
        self.spectra[site.name] = block.spectra
        if block.transforms is None:
            self._stored.add(site.name)
        else:
            self._scratch.put(site.name, block.transforms.tensors())

    def cut(self, kept: Site, layout: StorageLayout) -> dict[str, Tensor]:
        """The tensors of one block with the directions that `kept` keeps of it; from any number of threads.

        Raises PessaError when the file's spectra are not those of its weights.
        """
        header = self._model.reader.header
        if kept.name in self._stored:
            return write_site(self._checked(kept), kept, header, layout)
        transforms = BlockTransforms.of(self._scratch.take(kept.name))
        weights = cut(self._factored(kept, transforms), kept, transforms)
        return write_site(weights.to("cpu"), kept, header, layout)

    def _factored(self, kept: Site, transforms: BlockTransforms) -> HeadWeights:
        """The block in factored form at full rank."""
        if kept.name in self._factors:
            return self._factors[kept.name]
        weights = self._blocks.weights(self._sites[kept.name]).to(self._run.device)
        found = factored(weights, kept, transforms)
        if self._blocks.keeps:
            self._factors[kept.name] = found
        return found

    def _checked(self, kept: Site) -> HeadWeights:
        """A block that is stored as factors, after comparing it with its spectra."""
        site = self._sites[kept.name]
        weights = self._blocks.weights(site)
        check_spectra(self._model.reader.folder, self._model.spectra[site.name], site, weights)
        return weights


@contextmanager
def decomposition_of(
    model: Model, run: Run, blocks: BlockReader | None = None, scratch: Path | None = None
) -> Iterator[Decomposition]:
    """A decomposition that holds no blocks yet.

    blocks: a reader that may know the weights already. scratch: the folder for what memory need not hold, by default
    the temporary one of the system.
    """
    with Scratch(scratch or Path(gettempdir())) as place:
        yield Decomposition(model, blocks or BlockReader(model.reader), place, run)


def measure(
    model: Model,
    sites: Sequence[Site],
    ranking: Ranking = "svd",
    run: Run | None = None,
    statistics: Statistics | None = None,
    *,
    blocks: BlockReader | None = None,
) -> dict[str, Spectra]:
    """The spectra of the given blocks alone, for a look at them, or a plan that is not carried out.

    As in `decomposed`, but spectra on file are compared with the weights at once. Raises NotFiniteError with every
    tensor that is not finite, and PessaError when weights have changed since their spectra were written.
    """
    run = run or Run()
    blocks = blocks or BlockReader(model.reader)
    found: dict[str, Spectra] = {}

    def spectra(site: Site) -> Spectra:
        weights = blocks.weights(site).to(run.device)
        known = model.spectra.get(site.name) if ranking == "svd" and statistics is None else None
        if known is not None:
            check_spectra(model.reader.folder, known, site, weights)
            return replace(known, pairs=pair_contributions(weights, site))
        if statistics is None:
            return spectra_of(weights, site, ranking)
        sums = statistics.of(site, lambda: blocks.fingerprint(site, weights))
        return decompose_block(weights, site, ranking, sums).spectra

    _over_blocks(model, sites, spectra, run, lambda site, block: found.update({site.name: block}))
    return found


def _over_blocks(
    model: Model,
    sites: Sequence[Site],
    work: Callable[[Site], Found],
    run: Run,
    take: Callable[[Site, Found], None],
) -> None:
    """Work on all blocks in up to `run.jobs` threads, and take the results in the order of the blocks.

    Raises NotFiniteError with the tensors of all blocks that are not finite.
    """

    def attempt(site: Site) -> Found | NotFiniteError:
        try:
            return work(site)
        except NotFiniteError as error:
            return error

    faults: list[str] = []
    nbytes: Mapping[str, int] = {
        site.name: sum(model.reader.header[name].nbytes for name in site.tensors) for site in sites
    }
    with (
        one_thread(),
        run.progress("measuring", sum(nbytes.values()), len(sites)) as tick,
        closing(in_order(attempt, sites, run.jobs_for(sites))) as results,
    ):
        for site, found in zip(sites, results, strict=True):
            if isinstance(found, NotFiniteError):
                faults += found.faults
            else:
                take(site, found)
            tick(nbytes[site.name], 1)
    if faults:
        raise NotFiniteError(model.reader, faults)
