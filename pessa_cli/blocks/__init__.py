"""The attention blocks of a checkpoint: the architecture table, their discovery, and the compact format."""

from __future__ import annotations

from pessa_cli.blocks.alignment import alignment_heads, usual_heads
from pessa_cli.blocks.compact_format import (
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
from pessa_cli.blocks.names import module_names
from pessa_cli.blocks.site import Site, count, in_full, ragged_site, select, with_ranks
from pessa_cli.blocks.spec import AttentionSpec
from pessa_cli.blocks.table import ARCHITECTURES, FIRST_RELEASE, PUBLISHED, SINCE, TOWERS

__all__ = [
    "ARCHITECTURES",
    "FIRST_RELEASE",
    "LOAD_HINT",
    "PUBLISHED",
    "QUANT_METHOD",
    "SINCE",
    "TOWERS",
    "AttentionSpec",
    "ModuleNames",
    "PairRuns",
    "Ragged",
    "Ranks",
    "Site",
    "alignment_heads",
    "count",
    "find_sites",
    "in_full",
    "last_pair",
    "match_module",
    "module_names",
    "pair_ranks",
    "pairs_text",
    "parse_pairs",
    "ragged_modules",
    "ragged_site",
    "select",
    "specs_of",
    "usual_heads",
    "with_ranks",
]
