"""Loading a model with projections of full width, also if its checkpoint is compact."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint.reader import CheckpointReader
from pessa_cli.models.load import load
from pessa_cli.surgery.export import export_model
from pessa_cli.surgery.model import Model


@contextmanager
def dense_model(model: Model, **placing: Any) -> Iterator[Any]:
    """Load a model with zeros for the directions that a compact checkpoint does not store.

    The blocks of the result can be cut again and again, since every direction has its place. A compact checkpoint is
    exported to a temporary folder, which is deleted after the `with` block. placing: see `load`, also for what raises.
    """
    if all(site == site.in_full() for site in model.sites):
        yield load(model, **placing)
        return
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        export_model(model, dense, "dense")
        yield load(replace(model, reader=CheckpointReader(dense)), **placing)


def text_part(model: Any) -> Any:
    """Return the part of a model that reads text on its own: the text model of CLIP and SigLIP, else the model."""
    return model.text_model if hasattr(model, "get_text_features") and hasattr(model, "text_model") else model
