"""Converting a pruned model between the compact layout and the dense layout, without changing a number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from pessa_cli.algebra.channels import Weights
from pessa_cli.blocks.compact_format import PairRuns, Ranks, last_pair, pair_ranks, parse_pairs
from pessa_cli.blocks.site import Site
from pessa_cli.checkpoint.files import read_json
from pessa_cli.checkpoint.manifest import MANIFEST_FILE
from pessa_cli.checkpoint.staging import Staging
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.surgery.attention_block import ORDERS
from pessa_cli.surgery.block_io import StorageLayout, read_site, write_site
from pessa_cli.surgery.model import Model
from pessa_cli.surgery.rewrite import Ranking, Rewrite
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.writing import carry_out, new_output, new_rewrite


def export_model(model: Model, out: Path | Staging, layout: StorageLayout, run: Run | None = None) -> Rewrite:
    """Write a pruned model in the given layout: "compact", or "dense" with zeros in the cut directions.

    out: the folder to write, or a staging folder that the caller puts in place.
    The ranks are read from its pessa.json, or for a compact model without that file from its tensor shapes. Raises
    PessaError for a dense model without a pessa.json, whose ranks are not known, and for ranks that would remove
    weights that are not zero.
    """
    run = run or Run()
    plan, method, rule = _known_ranks(model)
    sites = [site for site in model.sites if site.name in plan.ranks]
    rewrite = new_rewrite("export", model, sites, plan, {}, rule, method, layout, run)
    if run.dry:
        return rewrite

    def tensors_of(site: Site) -> dict[str, Tensor]:
        weights, kept = read_site(model.reader, site), plan.kept(site)
        _check_nothing_lost(model, weights, kept)
        return write_site(weights, kept, model.reader.header, layout)

    with new_output(model, out, run) as staging:
        carry_out(rewrite, staging, tensors_of, run)
    return rewrite


def _known_ranks(model: Model) -> tuple[RankPlan, Ranking, str]:
    """Return the ranks of the blocks that pessa rewrote, with the method and the rule in the manifest."""
    path = model.reader.folder / MANIFEST_FILE
    compact = [site for site in model.sites if site != site.in_full()]
    if not path.exists():
        if compact:  # for example saved again by transformers
            return RankPlan.stored(compact), "svd", "as stored"
        raise PessaError(
            f"{model.reader.folder} has no {MANIFEST_FILE}: it is not a model that pessa wrote",
            "prune it first; `pessa prune` without a rule removes only directions that have no effect",
        )
    manifest = read_json(path)
    try:
        seams = {name: dict(each) for name, each in manifest["ranks"].items()}
        pairs = {name: parse_pairs(each.pop("pairs")) for name, each in seams.items() if "pairs" in each}
        ranks = {name: {seam: _ranks(text) for seam, text in each.items()} for name, each in seams.items()}
        method, rule = manifest["method"], manifest["rule"]
    except (KeyError, TypeError, ValueError, AttributeError):
        ranks, pairs, method, rule = {}, {}, "", ""
    if not ranks or not isinstance(method, str) or method not in ORDERS or not isinstance(rule, str):
        raise PessaError(f"{path} is damaged: it has no valid ranks, method and rule", "prune the original again")
    by_name = {site.name: site for site in model.sites}
    wrong = [
        name
        for name, kept in ranks.items()
        if name not in by_name or not _fit(by_name[name], kept, pairs.get(name, ()))
    ]
    if wrong:
        raise PessaError(f"{path} gives {wrong[0]} ranks that do not fit the weights", "prune the original again")
    known = RankPlan(ranks, {name: each for name, each in pairs.items() if each})
    return known, cast(Ranking, method), rule


def _fit(site: Site, ranks: Mapping[str, Ranks], pairs: tuple[PairRuns, ...] | None) -> bool:
    """Return whether a file could store this block with these ranks and frequency pairs.

    pairs: () for all pairs, None for pairs that could not be parsed.
    """
    if pairs is None or ranks.keys() != site.ranks.keys():
        return False
    for seam in site.seams:
        kept = ranks[seam.name]
        if len(kept) != len(seam.ranks) or not all(0 <= rank <= seam.width for rank in kept):
            return False
        if seam.symmetry == "pairs" and pairs:
            if pair_ranks(pairs) != kept or 2 * last_pair(pairs) >= seam.width:
                return False
        elif min(kept) < (seam.width if seam.symmetry in ("fixed", "pairs") else seam.always_kept):
            return False
    return not pairs or any(seam.symmetry == "pairs" for seam in site.seams)


def _ranks(text: str) -> Ranks:
    return tuple(int(rank) for rank in text.split())


def _check_nothing_lost(model: Model, weights: Weights, site: Site) -> None:
    """Raise PessaError unless all weights that the other layout leaves out are zero.

    site: the block with the ranks of the other layout.
    """
    reader = model.reader
    whole = write_site(weights, site.in_full(), reader.header, "dense")
    kept = write_site(weights, site, reader.header, "dense")
    lost = [name for name, tensor in whole.items() if not torch.equal(tensor, kept[name])]
    if lost:
        raise PessaError(
            f"{reader.folder / MANIFEST_FILE} gives {site.name} ranks that would remove weights that are not zero\n"
            f"{listed(lost)}",
            "the weights were changed after pruning; prune this folder instead",
        )
