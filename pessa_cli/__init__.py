"""pessa: absorb, decompose, prune and verify the attention of transformer checkpoints.

Importing this package once lets transformers' `from_pretrained` load compact models, and PEFT our fine-tuning
methods. It costs nothing until transformers loads its quantizers, or PEFT is imported: registration waits for that, so
the command line need not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import wrapt

from pessa_cli.buckets import get_backend, set_backend
from pessa_cli.errors import PessaError, UsageError
from pessa_cli.peft_plugin import TUNERS

if TYPE_CHECKING:
    from whisper.model import Whisper

__version__ = "0.1.0"
__all__ = ["PessaError", "UsageError", "__version__", "get_backend", "load_whisper", "set_backend"]


def load_whisper(model: str | Path, device: str | None = None) -> Whisper:
    """A Whisper folder, compact or dense, as a model of openai-whisper; see `pessa_cli.whisper_model.load_whisper`."""
    from pessa_cli.whisper_model import load_whisper as load

    return load(model, device)


@wrapt.when_imported("transformers.quantizers.auto")  # type: ignore[untyped-decorator,unused-ignore]
def _register(_module: object) -> None:
    from pessa_cli.loading import register

    register()


def _register_tuners(_module: object) -> None:
    from pessa_cli.peft_plugin import register_all

    register_all()


for _name in ("peft", *(f"pessa_cli.{tuner}" for tuner in ("tuner_base", *TUNERS))):
    wrapt.register_post_import_hook(_register_tuners, _name)
