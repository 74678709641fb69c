"""The public Python API: everything here may be imported from `pessa_cli` directly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.runtime.buckets import get_backend, set_backend

if TYPE_CHECKING:
    from whisper.model import Whisper

__all__ = ["PessaError", "UsageError", "get_backend", "load_whisper", "set_backend"]


def load_whisper(model: str | Path, device: str | None = None) -> Whisper:
    """A Whisper folder, compact or dense, as a model of openai-whisper; see `runtime.openai_whisper.load_whisper`."""
    from pessa_cli.runtime.openai_whisper import load_whisper as load

    return load(model, device)
