"""The decomposition of a model's blocks: each block is decomposed once, and can then be cut to any ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import TypeVar

from torch import Tensor

from pessa_cli.algebra.channels import Weights
from pessa_cli.algebra.heads import HeadWeights
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.common.jobs import in_order, one_thread
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.statistics.file import Statistics, fingerprint
from pessa_cli.surgery.attention_block import pair_contributions
from pessa_cli.surgery.block_io import NotFiniteError, StorageLayout, write_site
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.decomposed_block import (
    DecomposedBlock,
    Form,
    cut,
    decompose_block,
    factored,
    form_of,
    spectra_of,
)
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.rewrite import Ranking
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.scratch import Scratch
from pessa_cli.surgery.spectra_file import check_spectra

Found = TypeVar("Found")


class Decomposition:
    """The decomposed blocks of a model: their spectra by site name, for planning ranks, and the cutting to ranks.

    The transforms from weights to factors are stored in a temporary file. `cut` takes the weights from the reader a
    second time; with `reuse` it keeps the factors in memory, for blocks that are cut again and again.
    """

    def __init__(self, model: Model, blocks: BlockReader, scratch: Scratch, run: Run, reuse: bool) -> None:
        self.spectra: dict[str, Spectra] = {}
        self._model, self._blocks, self._scratch, self._run = model, blocks, scratch, run
        self._reuse = reuse
        self._sites = {site.name: site for site in model.sites}  # as the source stores them
        self._factors: dict[str, Weights] = {}
        self._stored: set[str] = set()  # names of the blocks that the checkpoint already stores as factors

    def decompose(self, sites: Sequence[Site], statistics: Statistics | None = None, ranking: Ranking = "svd") -> None:
        """Decompose the given blocks by their weights alone, or weighted by calibration statistics.

        Without statistics, a block that is stored as factors keeps its stored spectra: it is not read here, unless the
        contributions of its frequency pairs are needed, and `cut` compares the spectra with the weights. Raises
        NotFiniteError, which lists the tensors of all blocks that are not finite.
        """
        blocks, device = self._blocks, self._run.device

        def decompose(site: Site) -> DecomposedBlock:
            known = self._model.spectra.get(site.name) if ranking == "svd" and statistics is None else None
            if known is not None and not _by_pairs(site):
                return DecomposedBlock(known, None)
            weights = blocks.weights(site)
            if known is not None:
                return DecomposedBlock(_with_pairs(known, weights.to(device), site), None)
            found = None if statistics is None else statistics.of(site, lambda: fingerprint(weights))
            return decompose_block(weights.to(device), site, ranking, found)

        _over_blocks(self._model, sites, decompose, self._run, self._add)

    def _add(self, site: Site, block: DecomposedBlock) -> None:
        self.spectra[site.name] = block.spectra
        if block.form is None:
            self._stored.add(site.name)
        else:
            self._scratch.put(site.name, block.form.tensors())

    def cut(self, kept: Site, layout: StorageLayout) -> dict[str, Tensor]:
        """Return the tensors of one block, cut to the directions that `kept` keeps; may be called from any thread.

        Raises PessaError when the stored spectra do not belong to the stored weights.
        """
        header = self._model.reader.header
        if kept.name in self._stored:
            return write_site(self._checked(kept), kept, header, layout)
        form = form_of(kept, self._scratch.take(kept.name))
        weights = cut(self._factored(kept, form), kept, form)
        return write_site(weights.to("cpu"), kept, header, layout)

    def _factored(self, kept: Site, form: Form) -> Weights:
        """Return the block in its form at full width."""
        if kept.name in self._factors:
            return self._factors[kept.name]
        weights = self._blocks.weights(self._sites[kept.name]).to(self._run.device)
        found = factored(weights, kept, form)
        if self._reuse:
            self._factors[kept.name] = found
        return found

    def _checked(self, kept: Site) -> Weights:
        """Read a block that is stored as factors, and compare it with its stored spectra."""
        site = self._sites[kept.name]
        weights = self._blocks.weights(site)
        check_spectra(self._model.reader.folder, self._model.spectra[site.name], site, weights)
        return weights


@contextmanager
def decomposition_of(
    model: Model,
    run: Run,
    blocks: BlockReader | None = None,
    scratch: Path | None = None,
    *,
    reuse: bool = False,
) -> Iterator[Decomposition]:
    """Create a decomposition without blocks, whose temporary file is deleted at the end of the `with` block.

    blocks: a reader that may hold the weights already. scratch: the folder of the temporary file, by default that of
    the system. reuse: keep the factors of the blocks in memory once they are cut.
    """
    with Scratch(scratch or Path(gettempdir())) as place:
        yield Decomposition(model, blocks or BlockReader(model.reader), place, run, reuse)


def measure(
    model: Model,
    sites: Sequence[Site],
    ranking: Ranking = "svd",
    run: Run | None = None,
    statistics: Statistics | None = None,
    *,
    blocks: BlockReader | None = None,
) -> dict[str, Spectra]:
    """Compute only the spectra of the given blocks, for `inspect` and dry runs.

    As in `Decomposition.decompose`, but stored spectra are compared with the weights immediately. Raises
    NotFiniteError, which lists the tensors of all blocks that are not finite, and PessaError when weights have changed
    since their spectra were stored.
    """
    run = run or Run()
    blocks = blocks or BlockReader(model.reader)
    found: dict[str, Spectra] = {}

    def spectra(site: Site) -> Spectra:
        weights = blocks.weights(site).to(run.device)
        known = model.spectra.get(site.name) if ranking == "svd" and statistics is None else None
        if known is not None:
            check_spectra(model.reader.folder, known, site, weights)
            return _with_pairs(known, weights, site)
        if statistics is None:
            return spectra_of(weights, site, ranking)
        sums = statistics.of(site, lambda: fingerprint(weights))
        return decompose_block(weights, site, ranking, sums).spectra

    _over_blocks(model, sites, spectra, run, lambda site, block: found.update({site.name: block}))
    return found


def _by_pairs(site: Site) -> bool:
    return any(seam.symmetry == "pairs" for seam in site.seams)


def _with_pairs(known: Spectra, weights: Weights, site: Site) -> Spectra:
    """Return stored spectra with the contributions of frequency pairs, which are not stored."""
    if not isinstance(site, AttentionSite) or not isinstance(weights, HeadWeights):
        return known
    return replace(known, pairs=pair_contributions(weights, site))


def _over_blocks(
    model: Model,
    sites: Sequence[Site],
    work: Callable[[Site], Found],
    run: Run,
    take: Callable[[Site, Found], None],
) -> None:
    """Apply `work` to all blocks in up to `run.jobs` threads, and `take` to the results in the order of the blocks.

    Raises NotFiniteError, which lists the tensors of all blocks that are not finite.
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
