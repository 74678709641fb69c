"""Reading and writing of checkpoint folders: safetensors, JSON, hashes, and outputs that appear only when complete."""

from __future__ import annotations

from pessa_cli.checkpoint.dtypes import FLOATS, ITEM_BYTES, TORCH_DTYPES, UNDERFLOW, UNIT_ROUNDOFF
from pessa_cli.checkpoint.files import (
    ADAPTER_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    read_json,
    sha256_of,
    source_name,
    visible_files,
    write_json,
)
from pessa_cli.checkpoint.manifest import CARD_FILE, MANIFEST_FILE, UNHASHED, not_ours, write_manifest
from pessa_cli.checkpoint.places import check_apart, check_free, partial_folder, partial_output
from pessa_cli.checkpoint.reader import CheckpointReader, Header, TensorInfo
from pessa_cli.checkpoint.shards import CheckpointWriter, ShardWriter, write_index
from pessa_cli.checkpoint.staging import Staging, new_file, new_folder, run_identity

__all__ = [
    "ADAPTER_FILE",
    "CARD_FILE",
    "CONFIG_FILE",
    "FLOATS",
    "INDEX_FILE",
    "ITEM_BYTES",
    "MANIFEST_FILE",
    "PICKLE_SUFFIXES",
    "SINGLE_FILE",
    "TORCH_DTYPES",
    "UNDERFLOW",
    "UNHASHED",
    "UNIT_ROUNDOFF",
    "CheckpointReader",
    "CheckpointWriter",
    "Header",
    "ShardWriter",
    "Staging",
    "TensorInfo",
    "check_apart",
    "check_free",
    "new_file",
    "new_folder",
    "not_ours",
    "partial_folder",
    "partial_output",
    "read_json",
    "run_identity",
    "sha256_of",
    "source_name",
    "visible_files",
    "write_index",
    "write_json",
    "write_manifest",
]
