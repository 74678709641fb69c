"""The passes over a checkpoint: decompose blocks, cut them to a rank plan, and write the output with its manifest."""

from __future__ import annotations

from pessa_cli.surgery.block_io import NotFiniteError, read_site, split_fused, write_site
from pessa_cli.surgery.block_reader import BlockReader
from pessa_cli.surgery.card import check_card, write_figures
from pessa_cli.surgery.channel_numbers import all_channels
from pessa_cli.surgery.decomposition import Decomposition, decomposition_of, measure
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.generation import (
    GENERATION_FILE,
    generation_notes,
    mended_generation_config,
    write_generation_config,
)
from pessa_cli.surgery.model import Model, open_model
from pessa_cli.surgery.output import hashes_of, write_shards
from pessa_cli.surgery.prune import decompose_model, prune_model
from pessa_cli.surgery.rewrite import SHARD_BYTES, Rewrite, cut_into_files
from pessa_cli.surgery.run import Run
from pessa_cli.surgery.scratch import Scratch
from pessa_cli.surgery.side_files import UnknownWeights, copy_side_files, output_contents
from pessa_cli.surgery.spectra_file import SPECTRA_FILE
from pessa_cli.surgery.totals import BLOCKS, chosen_kinds, pruned_parts

__all__ = [
    "BLOCKS",
    "GENERATION_FILE",
    "SHARD_BYTES",
    "SPECTRA_FILE",
    "BlockReader",
    "Decomposition",
    "Model",
    "NotFiniteError",
    "Rewrite",
    "Run",
    "Scratch",
    "UnknownWeights",
    "all_channels",
    "check_card",
    "chosen_kinds",
    "copy_side_files",
    "cut_into_files",
    "decompose_model",
    "decomposition_of",
    "export_model",
    "generation_notes",
    "hashes_of",
    "measure",
    "mended_generation_config",
    "open_model",
    "output_contents",
    "prune_model",
    "pruned_parts",
    "read_site",
    "split_fused",
    "write_figures",
    "write_generation_config",
    "write_shards",
    "write_site",
]
