"""Reading and writing of checkpoint folders: safetensors, JSON, hashes, and outputs that appear only when complete."""

from __future__ import annotations

from pessa_cli.checkpoint.contents import (
    CARRIED,
    CHOSEN,
    HIDDEN,
    MODULES_FILE,
    WEIGHT_SUFFIXES,
    Contents,
    contents_of,
    left_out_text,
    matched,
    why_left_out,
)
from pessa_cli.checkpoint.dtypes import FLOATS, ITEM_BYTES, TORCH_DTYPES, UNDERFLOW, UNIT_ROUNDOFF, loaded_dtype
from pessa_cli.checkpoint.files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    MOST_JSON,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    read_json,
    read_json_value,
    sha256_of,
    source_name,
    write_json,
)
from pessa_cli.checkpoint.links import check_links, hidden_files, visible_files
from pessa_cli.checkpoint.manifest import CARD_FILE, MANIFEST_FILE, UNHASHED, not_ours, write_manifest
from pessa_cli.checkpoint.places import check_apart, check_free, check_outside, partial_folder, partial_output
from pessa_cli.checkpoint.reader import CheckpointReader, Header, TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter, ShardWriter, write_index
from pessa_cli.checkpoint.staging import Staging, new_file, new_folder, run_identity

__all__ = [
    "ADAPTER_FILE",
    "CARD_FILE",
    "CARRIED",
    "CHOSEN",
    "CONFIG_FILE",
    "FLOATS",
    "HIDDEN",
    "INDEX_FILE",
    "ITEM_BYTES",
    "MANIFEST_FILE",
    "MODULES_FILE",
    "MOST_JSON",
    "PICKLE_SUFFIXES",
    "SINGLE_FILE",
    "TORCH_DTYPES",
    "UNDERFLOW",
    "UNHASHED",
    "UNIT_ROUNDOFF",
    "WEIGHT_SUFFIXES",
    "CheckpointReader",
    "CheckpointWriter",
    "Contents",
    "Header",
    "ShardWriter",
    "Staging",
    "TensorInfo",
    "check_apart",
    "check_free",
    "check_links",
    "check_outside",
    "contents_of",
    "hidden_files",
    "left_out_text",
    "loaded_dtype",
    "matched",
    "new_file",
    "new_folder",
    "not_ours",
    "partial_folder",
    "partial_output",
    "read_json",
    "read_json_value",
    "run_identity",
    "sha256_of",
    "source_name",
    "visible_files",
    "why_left_out",
    "write_index",
    "write_json",
    "write_manifest",
]
