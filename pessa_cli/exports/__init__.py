"""Exporting checkpoints to the formats of other programs: ONNX and openai-whisper."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pessa_cli.common.lazy import lazy_exports

if TYPE_CHECKING:
    from pessa_cli.exports.onnx import export_onnx as export_onnx
    from pessa_cli.exports.openai import export_openai as export_openai
else:
    __getattr__, __all__ = lazy_exports(
        __name__,
        {
            "onnx": ["export_onnx"],
            "openai": ["export_openai"],
        },
    )
