"""The attention blocks and MLPs of a checkpoint: the architecture table, their discovery, and the compact format."""

from __future__ import annotations

from pessa_cli.blocks.alignment import alignment_heads, usual_heads
from pessa_cli.blocks.compact_format import (
    HINT_BEGINS,
    LOAD_HINT,
    QUANT_METHOD,
    ModuleNames,
    PairRuns,
    Ragged,
    Ranks,
    last_pair,
    match_module,
    pair_ranks,
    pairs_text,
    parse_pairs,
    ragged_modules,
)
from pessa_cli.blocks.discover import find_sites, specs_of
from pessa_cli.blocks.mlp_discover import find_mlps, mlp_specs_of, routed_experts
from pessa_cli.blocks.mlp_site import MlpSite
from pessa_cli.blocks.mlp_spec import MlpSpec
from pessa_cli.blocks.mlp_table import MLPS, TOWER_MLPS
from pessa_cli.blocks.names import module_names
from pessa_cli.blocks.seam import TITLES, Seam, Symmetry
from pessa_cli.blocks.site import AttentionSite, Site, count, select
from pessa_cli.blocks.spec import AttentionSpec, BlockSpec, Row
from pessa_cli.blocks.table import ARCHITECTURES, FIRST_RELEASE, PUBLISHED, SINCE, TOWERS

__all__ = [
    "ARCHITECTURES",
    "FIRST_RELEASE",
    "HINT_BEGINS",
    "LOAD_HINT",
    "MLPS",
    "PUBLISHED",
    "QUANT_METHOD",
    "SINCE",
    "TITLES",
    "TOWERS",
    "TOWER_MLPS",
    "AttentionSite",
    "AttentionSpec",
    "BlockSpec",
    "MlpSite",
    "MlpSpec",
    "ModuleNames",
    "PairRuns",
    "Ragged",
    "Ranks",
    "Row",
    "Seam",
    "Site",
    "Symmetry",
    "alignment_heads",
    "count",
    "find_mlps",
    "find_sites",
    "last_pair",
    "match_module",
    "mlp_specs_of",
    "module_names",
    "pair_ranks",
    "pairs_text",
    "parse_pairs",
    "ragged_modules",
    "routed_experts",
    "select",
    "specs_of",
    "usual_heads",
]
