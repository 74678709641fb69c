"""Inspecting a model: its attention blocks and MLPs, their spectra, and what a rule would prune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pessa_cli.blocks.mlp_discover import mlp_specs_of, routed_experts
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.ranks.budget import Point, predicted, ranks_for, trade_off
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Spectra
from pessa_cli.ranks.work import work_of
from pessa_cli.surgery.decomposition import measure
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.totals import totals
from pessa_cli.workflow.recipe import Recipe
from pessa_cli.workflow.steps import Notify, Overview, calibrated, calibration_data, chosen, ignore, named, opened

Rows = list[list[float]]


@dataclass(frozen=True)
class InspectedSeam:
    """One hidden width of a block: its spectrum and what the rule keeps of it.

    width: the original number of directions or channels of each group. spectrum: groups x directions, descending, of
    the directions and channels that can be cut one by one; None if there are none. pairs: if RoPE rotates whole heads,
    the contributions of the frequency pairs (groups x width / 2, squared, in the order of the file); otherwise None.
    ranks: how many of each group are kept. The groups of attention are its key/value heads, an MLP is one group.
    """

    width: int
    spectrum: Rows | None
    pairs: Rows | None
    ranks: list[int]


@dataclass(frozen=True)
class InspectedBlock:
    """One block with its hidden widths, by the name of the seam: "qk" and "vo" of attention, "mlp" of an MLP.

    heads, kv_heads: the numbers of query heads and of key/value heads; None for an MLP.
    """

    kind: str
    layer: int
    heads: int | None
    kv_heads: int | None
    seams: dict[str, InspectedSeam]

    @staticmethod
    def of(site: Site, spectra: Spectra, plan: RankPlan) -> InspectedBlock:
        """Return the row of one site."""
        heads = (site.heads, site.kv_heads) if isinstance(site, AttentionSite) else (None, None)
        return InspectedBlock(
            kind=site.kind,
            layer=site.layer,
            heads=heads[0],
            kv_heads=heads[1],
            seams={
                seam.name: InspectedSeam(
                    width=seam.width,
                    spectrum=spectra.seams[seam.name].tolist() if seam.name in spectra.seams else None,
                    pairs=spectra.pairs.tolist() if spectra.pairs is not None and seam.symmetry == "pairs" else None,
                    ranks=list(plan.ranks[site.name][seam.name]),
                )
                for seam in site.seams
            },
        )


@dataclass(frozen=True)
class Inspection:
    """The blocks of a model, and what a rule would prune of them.

    model: as the user called it. method: "svd" or "calibrated". rule: in words. totals: blocks, parameters and bytes
    before and after, and the pruned shares, from 0 to 1. sites: the blocks. spectra: by site name. norms: the products
    of the L2 norms of the original dimensions, by site name; empty unless requested. curve: budgets with the expected
    errors; empty unless requested. warnings: a line for each block that has too little calibration data, and one if
    more data would help. compared: the plans that were compared, as in `Comparison`, if there were several. work: the
    floating-point operations of the blocks before and after, for a budget of work.
    """

    model: str
    model_type: str
    method: str
    rule: str
    blocks: list[InspectedBlock]
    totals: Mapping[str, Any]
    sites: Sequence[Site]
    spectra: Mapping[str, Spectra]
    norms: Mapping[str, Spectra] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    compared: Mapping[str, Any] | None = None
    work: Mapping[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`."""
        about = {"model": self.model, "method": self.method, "rule": self.rule}
        found = {"blocks": [asdict(block) for block in self.blocks], "totals": dict(self.totals)}
        more = {"compared": self.compared, "work": self.work}
        found |= {name: dict(value) for name, value in more.items() if value is not None}
        return about | found | ({"curve": [asdict(point) for point in self.curve]} if self.curve else {})


def inspect(
    model: str | Path,
    recipe: Rule | Recipe = Rule(),
    run: Run = Run(),
    *,
    curve: bool = False,
    norms: bool = False,
    architecture: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
    notify: Notify = ignore,
) -> Inspection:
    """Compute the spectra of a model's blocks, and what a rule would prune; nothing is written.

    model: a folder, a file, or a name on a hub. recipe: a rule, or a Recipe, of which the fields `rule`, `sites`,
    `layers`, `calibrate` and `statistics` are used. run: its fields `jobs`, `device` and `progress` are used. curve:
    also predict the errors of budgets, from all of the chosen blocks to none. norms: also compute the products of the
    L2 norms of the original dimensions. architecture: treat the model as this `model_type`. revision: branch, tag or
    commit of a model from a hub. allow_pickle: also convert pickled weights. follow_links: also read files
    outside of the model's folder that links in it lead to. notify: is called with an Overview before
    the work, and with the blocks that have too little data before the spectra are computed.

    Returns the blocks with their spectra and ranks, and the totals. Raises UsageError for options that do not fit the
    model, and PessaError when the model cannot be read, or when the rule would prune everything.
    """
    if isinstance(recipe, Rule):
        recipe = Recipe(recipe)
    run, rule = named(run, model), recipe.rule
    with opened(model, architecture, revision, allow_pickle, follow_links) as found:
        sites, model_type = chosen(found, recipe), str(found.reader.config.get("model_type"))
        as_it_is = totals(found.reader.header, found.sites, sites, RankPlan.stored(sites))
        experts = routed_experts(mlp_specs_of(found.reader.config, architecture), found.reader.header)
        notify(Overview(str(model), model_type, sites, as_it_is, experts))
        with calibrated(found, sites, recipe, run, calibration_data(recipe), notify=notify) as known:
            if known.decomposition is not None:
                spectra: Mapping[str, Spectra] = known.decomposition.spectra
            else:
                spectra = measure(found, sites, run=run, statistics=known.statistics, blocks=known.blocks)
        compared = known.comparison or predicted(sites, spectra, rule, found.size)
        plan = ranks_for(sites, spectra, rule, found.size) if compared is None else compared.plan
        return Inspection(
            model=str(model),
            model_type=model_type,
            method="calibrated" if any(each.calibrated for each in spectra.values()) else "svd",
            rule=str(rule),
            blocks=[InspectedBlock.of(site, spectra[site.name], plan) for site in sites],
            totals=totals(found.reader.header, found.sites, sites, plan),
            sites=sites,
            spectra=spectra,
            norms=measure(found, sites, "vanilla", run) if norms else {},
            curve=trade_off(sites, spectra, rule, found.size) if curve else [],
            warnings=known.warnings,
            compared=None if compared is None else compared.to_dict(),
            work=work_of(sites, plan, rule, found.size),
        )
