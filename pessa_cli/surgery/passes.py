"""The passes over a checkpoint: measure the spectra, then rewrite it block by block.

Only the blocks in work are in memory. Ranks are known before the first byte is written, because a safetensors
header needs every shape; what is not attention is copied byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from pessa_cli.algebra.absorb import Absorbed, Pair, absorb, recompose
from pessa_cli.algebra.decompose import (
    Transforms,
    norm_products,
    norm_transforms,
    singular_values,
    svd_transforms,
    transformed,
)
from pessa_cli.algebra.heads import HeadWeights, joined
from pessa_cli.algebra.rope import compensated, contributions
from pessa_cli.algebra.weighted import refitted, weighted_transforms
from pessa_cli.blocks.compact_format import PairRuns, Ranks, last_pair, pair_ranks, parse_pairs
from pessa_cli.blocks.site import Site, in_full
from pessa_cli.checkpoint.files import read_json
from pessa_cli.checkpoint.staging import new_folder
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.jobs import in_order, one_thread
from pessa_cli.common.text import listed
from pessa_cli.ranks.budget import ranks_for
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra, Spectrum
from pessa_cli.statistics.file import Statistics
from pessa_cli.statistics.sums import BlockStatistics
from pessa_cli.statistics.weighing import Weighed, kept_directions, refit_moment, weigh
from pessa_cli.surgery.block_io import NotFiniteError, StorageLayout, read_site, write_site
from pessa_cli.surgery.model import MANIFEST_FILE, Model
from pessa_cli.surgery.output import write_output
from pessa_cli.surgery.rewrite import Ranking, Rewrite
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.scratch import Spool
from pessa_cli.surgery.spectra_file import check_spectra

TRANSFORMS = tuple(field.name for field in fields(Transforms))
Sides = list[NDArray[np.float64]]  # of a block's products, one after the other: each with its TRANSFORMS


class Decomposition(NamedTuple):
    """One way to order a head's directions: what each is worth, and that with how to get there."""

    spectrum: Callable[[Pair], torch.Tensor]
    transforms: Callable[[Pair], Transforms]


DECOMPOSITIONS: dict[Ranking, Decomposition] = {
    "svd": Decomposition(singular_values, svd_transforms),
    "vanilla": Decomposition(norm_products, norm_transforms),
    "calibrated": Decomposition(
        singular_values, svd_transforms
    ),  # where there are no statistics any more: the plain way
}


def measure(
    model: Model,
    sites: list[Site],
    method: Ranking = "svd",
    run: Run | None = None,
    spool: Spool | None = None,
    statistics: Statistics | None = None,
) -> dict[str, Spectra]:
    """The spectra of the given sites: those on file, or computed from the weights block by block.

    With `statistics` the spectra are what real inputs make of them, whatever is on file.
    `spool` is for a pass that rewrites the blocks afterwards: their transforms go there, and spectra on file are not
    held against the weights yet, since the rewriting reads them anyway. Raises PessaError with every tensor that is
    not finite, after having looked at all of them, and when weights have changed since their spectra were written.
    """
    run = run or Run()
    way = DECOMPOSITIONS[method]

    def measured(site: Site) -> tuple[Spectra, Sides] | NotFiniteError:
        known = model.spectra.get(site.name) if method == "svd" and statistics is None else None
        if known is not None and spool is not None and not site.by_pairs:
            return known, []
        try:
            weights = read_site(model.reader, site).to(run.device)
        except NotFiniteError as error:
            return error
        if known is not None:
            check_spectra(model.reader.folder, known, site, weights)
            return replace(known, pairs=_contributions(weights, site)), []
        heard = None if statistics is None else statistics.of(site, weights)
        weighed = None if heard is None else _weighed(heard, site, weights, run.device)
        of_pairs = _contributions(weights, site, weighed)
        pairs = (_pairs(absorb(part, site)) for part in weights.parts())
        if weighed is not None:
            sides = _sides(_weighted(pairs, weighed))
        elif spool is not None:
            sides = _sides([way.transforms(pair) for pair in part] for part in pairs)
        else:
            spectra = zip(*([way.spectrum(pair) for pair in part] for part in pairs), strict=True)
            return replace(_spectra([_concatenated(side) for side in spectra]), pairs=of_pairs), []
        known_as = _spectra(sides[len(TRANSFORMS) - 1 :: len(TRANSFORMS)])
        trials = None if heard is None else heard.trials
        return replace(known_as, calibrated=heard is not None, trials=trials, pairs=of_pairs), sides

    spectra: dict[str, Spectra] = {}
    faults: list[str] = []
    nbytes = {site.name: sum(model.reader.header[name].nbytes for name in site.tensors) for site in sites}
    jobs = run.jobs_for(sites)
    with (
        one_thread(),
        run.progress("measuring", sum(nbytes.values()), len(sites)) as tick,
        closing(in_order(measured, sites, jobs)) as results,
    ):
        for site, found in zip(sites, results, strict=True):
            if isinstance(found, NotFiniteError):
                faults += found.faults
            else:
                spectra[site.name], transforms = found
                if spool is not None:
                    spool.put(site.name, transforms)
            tick(nbytes[site.name], 1)
    if faults:
        raise NotFiniteError(model.reader, faults)
    return spectra


def _contributions(weights: HeadWeights, site: Site, weighed: Weighed | None = None) -> Spectrum | None:
    """Those of the frequency pairs, where there are any."""
    if not site.by_pairs:
        return None
    return contributions(weights, None if weighed is None else weighed.pairs).cpu().numpy()


def _sides(parts: Iterable[list[Transforms]]) -> Sides:
    """The transforms of a block from those of its parts."""
    found = zip(*parts, strict=True)
    return [_concatenated(getattr(t, name) for t in side) for side in found for name in TRANSFORMS]


def _weighed(found: BlockStatistics, site: Site, weights: HeadWeights, device: str) -> Weighed:
    v_bias = None if weights.v_bias is None else weights.v_bias.to(device)
    return weigh(found.to(device), site, v_bias)


def _weighted(parts: Iterable[list[Pair]], weighed: Weighed) -> Iterator[list[Transforms]]:
    """The transforms of each part of a block, whose heads follow one another."""
    start = 0
    for pairs in parts:
        cut = slice(start, start := start + len(pairs[-1].left))
        sides = (weighed.qk, weighed.vo)[-len(pairs) :]
        yield [weighted_transforms(pair, side.of_heads(cut)) for pair, side in zip(pairs, sides, strict=True)]


def _pairs(absorbed: Absorbed) -> list[Pair]:
    """The products of a block that are decomposed: Q-K, if it can be merged, and V-O."""
    return [absorbed.vo] if absorbed.qk is None else [absorbed.qk, absorbed.vo]


def _spectra(sides: list[Spectrum]) -> Spectra:
    return Spectra(sides[0] if len(sides) == 2 else None, sides[-1])


def _concatenated(parts: Iterable[torch.Tensor]) -> NDArray[np.float64]:
    return np.concatenate([part.cpu().numpy() for part in parts])


def decompose_model(
    model: Model,
    out: Path,
    sites: list[Site] | None = None,
    run: Run | None = None,
    statistics: Statistics | None = None,
) -> Rewrite:
    """Write the model with every block as balanced factors at full rank, and its spectra: same names and shapes."""
    run, sites = run or Run(), model.sites if sites is None else sites
    full = {site.name: site.full for site in sites}

    def plan(spool: Spool | None) -> Rewrite:
        spectra = measure(model, sites, run=run, spool=spool, statistics=statistics)
        rewrite = _rewrite("decompose", model, sites, RankPlan(full, full), spectra, "full rank", "svd", "dense", run)
        return rewrite if statistics is None else replace(rewrite, method="calibrated", data=statistics.sha256)

    return _written(plan, model, out, run, statistics=statistics)


def prune_model(
    model: Model,
    out: Path,
    rule: Rule,
    sites: list[Site] | None = None,
    method: Ranking = "svd",
    layout: StorageLayout = "compact",
    run: Run | None = None,
    statistics: Statistics | None = None,
) -> Rewrite:
    """Write the model with only the directions that the rule keeps, and return what was written.

    With `statistics` directions are ordered and cut by what real inputs make of them, and the output projection is
    fitted anew to those that are kept; without, by the weights alone.
    Blocks that are stored as balanced factors already (from `decompose` or an earlier `prune`) are sliced; the
    others are decomposed first, with the same bytes as a result.
    """
    run, sites = run or Run(), model.sites if sites is None else sites
    if method == "vanilla" and statistics is not None:
        raise UsageError("--method vanilla goes by the weights alone", "leave out the data, or the method")
    if method == "vanilla" and any(site.name in model.spectra for site in sites):
        raise UsageError(
            f"{model.reader.folder} is decomposed: its original dimensions are gone",
            "give --method vanilla the original model",
        )

    def plan(spool: Spool | None) -> Rewrite:
        spectra = measure(model, sites, method, run, spool, statistics)
        ranks = ranks_for(sites, spectra, rule, model.size)
        known = any(found.calibrated for found in spectra.values())
        rewrite = _rewrite(
            *("prune", model, sites, ranks, spectra, str(rule)), "calibrated" if known else method, layout, run
        )
        return rewrite if statistics is None else replace(rewrite, method="calibrated", data=statistics.sha256)

    return _written(plan, model, out, run, statistics=statistics)


def export_model(model: Model, out: Path, layout: StorageLayout, run: Run | None = None) -> Rewrite:
    """Rewrite a model that pessa made in the other layout: the same numbers, padded with zeros or without them.

    The ranks are those of its pessa.json, or those it is stored with. Raises PessaError for a dense model that
    pessa did not write, since its ranks are not known.
    """
    run = run or Run()
    plan, method, rule = _known_ranks(model)
    sites = [site for site in model.sites if site.name in plan.vo]
    rewrite = _rewrite("export", model, sites, plan, {}, rule, method, layout, run)
    return _written(lambda _: rewrite, model, out, run, as_stored=True)


def _rewrite(
    command: str,
    model: Model,
    sites: list[Site],
    ranks: RankPlan,
    spectra: Mapping[str, Spectra],
    rule: str,
    method: Ranking,
    layout: StorageLayout,
    run: Run,
) -> Rewrite:
    if layout == "compact" and not all(site.spec.compact for site in sites):
        raise UsageError(
            f"{model.reader.folder}: the attention of this model reads its weights directly, and needs them whole",
            "give --layout dense",
        )
    source = model.reader.folder.name if run.source is None else run.source
    return Rewrite(command, source, model, sites, ranks, spectra, rule, method, layout, run.shard_bytes)


def _written(
    plan: Callable[[Spool | None], Rewrite],
    model: Model,
    out: Path,
    run: Run,
    as_stored: bool = False,
    statistics: Statistics | None = None,
) -> Rewrite:
    """Plan and carry out; the place of the output is made sure of before any work.

    `as_stored`: the blocks are in factored form already, whatever is known of their spectra.
    """
    if run.dry:
        return plan(None)
    reader = model.reader
    with new_folder(out, reader.folder, run.force, run.resume) as staging, Spool(staging.folder) as spool:
        rewrite = plan(spool)

        def tensors_of(site: Site) -> dict[str, torch.Tensor]:
            kept = rewrite.ranks.kept(site)
            if as_stored:
                weights = read_site(reader, site)
                _check_nothing_lost(model, weights, kept)
            else:
                weights = _decomposed(model, site, kept, spool, statistics, run.device)
            return write_site(weights, kept, reader.header, rewrite.layout)

        total = sum(info.nbytes for info in rewrite.header.values())
        jobs = run.jobs_for(rewrite.sites or model.sites)
        with one_thread(), run.progress("writing", total, len(rewrite.sites)) as tick:
            write_output(rewrite, staging, tensors_of, jobs, tick)
    return rewrite


@dataclass(frozen=True)
class Cuts:
    """Blocks that are decomposed once, by `measure` with the same spool, and cut again and again."""

    model: Model
    spool: Spool
    statistics: Statistics | None = None

    def tensors(self, site: Site, kept: Site) -> dict[str, torch.Tensor]:
        """The tensors of one block as `prune_model` would write what is kept of it, in the dense layout."""
        weights = _decomposed(self.model, site, kept, self.spool, self.statistics)
        return write_site(weights, kept, self.model.reader.header, "dense")


def _decomposed(
    model: Model, site: Site, kept: Site, spool: Spool, statistics: Statistics | None, device: str = "cpu"
) -> HeadWeights:
    """A block in factored form, ready to be cut: by the transforms that were put aside for it, or as it is stored."""
    weights = read_site(model.reader, site)
    transforms = spool.take(site.name)
    if not transforms:
        check_spectra(model.reader.folder, model.spectra[site.name], site, weights)
        return weights
    weighed = None if statistics is None else _weighed(statistics.of(site, weights), site, weights, device)
    weights = weights.to(device)
    return _factorised(weights, kept, transforms, weighed).to("cpu")


def _factorised(weights: HeadWeights, site: Site, found: Sides, weighed: Weighed | None) -> HeadWeights:
    """The block in factored form, at full rank; a calibrated one ready to be cut to what `site` keeps."""
    parts: list[HeadWeights] = []
    o_bias, start, device = weights.o_bias, 0, weights.v.device
    sides = [found[at : at + len(TRANSFORMS)] for at in range(0, len(found), len(TRANSFORMS))]
    for part in weights.parts():
        part = replace(part, o_bias=o_bias)  # which each part adds its value biases to
        cut = slice(start, start := start + len(part.v))
        transforms = [Transforms(*(torch.from_numpy(array[cut]).to(device) for array in side)) for side in sides]
        absorbed = absorb(part, site, _precision(part, transforms))
        factors = [transformed(pair, known) for pair, known in zip(_pairs(absorbed), transforms, strict=True)]
        mean = None
        if weighed is not None and weighed.center is not None:
            mean = (weighed.center[cut].unsqueeze(1) @ transforms[-1].left).squeeze(1)
        rewritten = recompose(part, absorbed, factors[0] if len(factors) == 2 else None, factors[-1], site, mean)
        o_bias = rewritten.o_bias
        parts.append(joined([rewritten], weights))
    whole = joined(parts, weights)
    if weighed is not None and weighed.pairs is not None and site.pairs is not None:
        whole = compensated(whole, site.pairs, weighed.pairs)
    if weighed is None or site.vo_ranks == site.full:
        return whole
    return _refitted(whole, site, found, weighed)


def _refitted(weights: HeadWeights, site: Site, found: Sides, weighed: Weighed) -> HeadWeights:
    """The factored block with its output projection fitted anew to the directions of V-O that are kept."""
    transform = torch.from_numpy(found[-len(TRANSFORMS)]).to(weights.o.device)
    moment, kept = refit_moment(weighed, transform, site), kept_directions(site, site.vo_ranks).to(weights.o.device)
    o = refitted(weights.o.double().reshape(site.output_width, -1), moment, kept, weighed.ridge)
    return replace(weights, o=o.reshape(weights.o.shape).to(weights.o.dtype))


def _precision(weights: HeadWeights, transforms: list[Transforms]) -> torch.dtype:
    """What the transforms are applied in: float32 where its errors stay below an eighth of what the dtype rounds off.

    That is half of the work, and 16-bit numbers are exact in it. The transforms come from float64.
    """
    dtypes = {tensor.dtype for tensor in (weights.q, weights.k, weights.v, weights.o)}
    if not dtypes <= {torch.float16, torch.bfloat16}:
        return torch.float64
    finest = min(torch.finfo(dtype).eps for dtype in dtypes)
    growth = max(float(t.growth.where(t.growth.isfinite(), 0.0).max()) for t in transforms)
    return torch.float32 if 8 * growth * torch.finfo(torch.float32).eps <= finest else torch.float64


def _known_ranks(model: Model) -> tuple[RankPlan, Ranking, str]:
    """What each block that pessa has rewritten keeps, with the method and the rule."""
    path = model.reader.folder / MANIFEST_FILE
    compact = [site for site in model.sites if site != in_full(site)]
    if not path.exists():
        if compact:  # saved again by transformers, say
            return RankPlan.stored(compact), "svd", "as stored"
        raise PessaError(
            f"{model.reader.folder} has no {MANIFEST_FILE}: it is not a model that pessa wrote",
            "prune it first; `pessa prune` without a rule removes only what is zero",
        )
    manifest = read_json(path)
    try:
        ranks = {name: (_ranks(sides["qk"]), _ranks(sides["vo"])) for name, sides in manifest["ranks"].items()}
        pairs = {name: parse_pairs(sides["pairs"]) for name, sides in manifest["ranks"].items() if "pairs" in sides}
        method, rule = manifest["method"], manifest["rule"]
    except (KeyError, TypeError, ValueError, AttributeError):
        ranks, pairs, method, rule = {}, {}, "", ""
    if not ranks or not isinstance(method, str) or method not in DECOMPOSITIONS or not isinstance(rule, str):
        raise PessaError(f"{path} is damaged", "prune the original again")
    by_name = {site.name: site for site in model.sites}
    wrong = [
        name
        for name, both in ranks.items()
        if name not in by_name or not _fit(by_name[name], *both, pairs.get(name, ()))
    ]
    if wrong:
        raise PessaError(f"{path} and the weights disagree about {wrong[0]}", "prune the original again")
    known = RankPlan(
        {name: qk for name, (qk, _) in ranks.items()},
        {name: vo for name, (_, vo) in ranks.items()},
        {name: each for name, each in pairs.items() if each},
    )
    return known, method, rule


def _fit(site: Site, qk_ranks: Ranks, vo_ranks: Ranks, pairs: tuple[PairRuns, ...] | None) -> bool:
    """Whether a file of this block could have such ranks, and such pairs; () stands for all, None for nonsense."""
    counted = all(
        len(ranks) == site.kv_heads and all(0 <= rank <= site.head_dim for rank in ranks)
        for ranks in (qk_ranks, vo_ranks)
    )
    if pairs is None or not counted:
        return False
    if not pairs:
        return min(qk_ranks) >= site.unmerged
    return site.by_pairs and pair_ranks(pairs) == qk_ranks and 2 * last_pair(pairs) < site.head_dim


def _ranks(text: str) -> Ranks:
    return tuple(int(rank) for rank in text.split())


def _check_nothing_lost(model: Model, weights: HeadWeights, site: Site) -> None:
    """What another layout, which stores what `site` does, leaves out must be zero in this one."""
    reader = model.reader
    whole = write_site(weights, in_full(site), reader.header, "dense")
    kept = write_site(weights, site, reader.header, "dense")
    lost = [name for name, tensor in whole.items() if not torch.equal(tensor, kept[name])]
    if lost:
        raise PessaError(
            f"{reader.folder / MANIFEST_FILE} gives {site.name} ranks that would cut weights off\n{listed(lost)}",
            "the weights were changed after pruning; prune this folder instead",
        )
