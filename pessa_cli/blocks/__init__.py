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
from pessa_cli.blocks.mlp_discover import find_mlps, mlp_specs_of
from pessa_cli.blocks.mlp_site import MlpSite, ragged_mlp
from pessa_cli.blocks.mlp_spec import MlpSpec
from pessa_cli.blocks.mlp_table import MLPS, TOWER_MLPS
from pessa_cli.blocks.names import module_names
from pessa_cli.blocks.site import Site, count, in_full, ragged_site, select, with_ranks
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
    "TOWERS",
    "TOWER_MLPS",
    "AttentionSpec",
    "BlockSpec",
    "MlpSite",
    "MlpSpec",
    "ModuleNames",
    "PairRuns",
    "Ragged",
    "Ranks",
    "Row",
    "Site",
    "alignment_heads",
    "count",
    "find_mlps",
    "find_sites",
    "in_full",
    "last_pair",
    "match_module",
    "mlp_specs_of",
    "module_names",
    "pair_ranks",
    "pairs_text",
    "parse_pairs",
    "ragged_mlp",
    "ragged_modules",
    "ragged_site",
    "select",
    "specs_of",
    "usual_heads",
    "with_ranks",
]
