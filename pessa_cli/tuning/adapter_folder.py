"""The files of a trained adapter: its weights and config, the record of the training, and the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.files import ADAPTER_FILE, read_json, sha256_of, write_json
from pessa_cli.checkpoint.links import visible_files
from pessa_cli.checkpoint.manifest import write_manifest

RECORD_FILE = "pessa-tune.json"
HISTORY_FILE = "history.jsonl"


def finish(folder: Path, record: Mapping[str, Any], history: Iterable[Mapping[str, Any]]) -> None:
    """Write the record, the history and pessa.json beside the adapter, and delete what only the training needed."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    for name in ("training_args.bin", "README.md"):  # a pickle, and a model card without content
        (folder / name).unlink(missing_ok=True)
    # PEFT needed the path of the base for its config. The published adapter must not contain a local path.
    config = read_json(folder / ADAPTER_FILE)
    write_json(folder / ADAPTER_FILE, config | {"base_model_name_or_path": record["source"]})
    write_json(folder / RECORD_FILE, record)
    lines = [json.dumps({k: v for k, v in step.items() if v is not None}) for step in history]
    (folder / HISTORY_FILE).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    for path in folder.glob("*.safetensors"):  # safetensors creates files that only their owner can read
        path.chmod((folder / RECORD_FILE).stat().st_mode)
    about = {name: record[name] for name in ("pessa", "command", "source")}
    write_manifest(folder, about, {name: sha256_of(path) for name, path in visible_files(folder).items()})
