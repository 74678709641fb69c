"""What generation_config.json says that a model cannot do, and the file that goes into an output in its place."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pessa_cli.blocks.alignment import alignment_heads
from pessa_cli.checkpoint.files import read_json, write_json

GENERATION_FILE = "generation_config.json"
KEY = "alignment_heads"


def mended_generation_config(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return generation_config.json with alignment heads that this Whisper has; None if the file is right, or missing.

    transformers ends in an index error when it computes timestamps of words with heads of a teacher's layers.
    """
    path = folder / GENERATION_FILE
    if config.get("model_type") != "whisper" or not path.is_file():
        return None
    generation = read_json(path)
    sizes = [config.get(f"decoder_{what}") for what in ("layers", "attention_heads")]
    if not generation.get(KEY) or not all(isinstance(size, int) for size in sizes):
        return None
    layers, heads = map(int, sizes)  # type: ignore[arg-type]
    found = alignment_heads(generation[KEY], layers, heads)
    if found is None or all(pair in found for pair in map(tuple, generation[KEY])):
        return None
    return generation | {KEY: [list(pair) for pair in found]}


def generation_notes(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """Return a sentence if the output gets another generation_config.json than the source, otherwise nothing."""
    if mended_generation_config(folder, config) is None:
        return []
    return [
        f"{GENERATION_FILE} lists {KEY} in layers that this model does not have, as those of its teacher; the output "
        "lists all heads of the last half of its layers, as openai-whisper takes them"
    ]


def write_generation_config(source: Path, folder: Path, config: Mapping[str, Any]) -> None:
    """Replace the copy of generation_config.json in `folder` if that of `source` is not right."""
    mended = mended_generation_config(source, config)
    if mended is not None:
        write_json(folder / GENERATION_FILE, mended)
