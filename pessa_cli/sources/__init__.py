"""Model sources: every supported format, local or on the hub, becomes a Hugging Face folder."""

from __future__ import annotations

from pessa_cli.sources.open import open_source
from pessa_cli.sources.openai import SUFFIXES, tensor_names
from pessa_cli.sources.pickled import load_pickle

__all__ = [
    "SUFFIXES",
    "load_pickle",
    "open_source",
    "tensor_names",
]
