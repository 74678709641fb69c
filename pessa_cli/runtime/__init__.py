"""Running compact models: linear layers, bucketed attention, and loaders for transformers and openai-whisper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.runtime.buckets import get_backend as get_backend
    from pessa_cli.runtime.buckets import set_backend as set_backend
    from pessa_cli.runtime.compact_linear import RaggedConvIn as RaggedConvIn
    from pessa_cli.runtime.compact_linear import RaggedConvOut as RaggedConvOut
    from pessa_cli.runtime.compact_linear import RaggedIn as RaggedIn
    from pessa_cli.runtime.compact_linear import RaggedOut as RaggedOut
    from pessa_cli.runtime.openai_form import alignment_mask as alignment_mask
    from pessa_cli.runtime.openai_whisper import load_whisper as load_whisper
    from pessa_cli.runtime.transformers_loader import PessaConfig as PessaConfig
    from pessa_cli.runtime.transformers_loader import PessaQuantizer as PessaQuantizer
    from pessa_cli.runtime.transformers_loader import register as register
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "buckets": ["get_backend", "set_backend"],
            "compact_linear": ["RaggedConvIn", "RaggedConvOut", "RaggedIn", "RaggedOut"],
            "openai_form": ["alignment_mask"],
            "openai_whisper": ["load_whisper"],
            "transformers_loader": ["PessaConfig", "PessaQuantizer", "register"],
        },
    )
