"""Model sources: every supported format, local or on the hub, becomes a Hugging Face folder."""

from __future__ import annotations

from pessa_cli.sources.open import open_source
from pessa_cli.sources.openai import SUFFIXES, tensor_names

__all__ = [
    "SUFFIXES",
    "open_source",
    "tensor_names",
]
