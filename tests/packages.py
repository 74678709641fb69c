"""The packages of pessa, lowest first: a package imports only from those above it in this list.

The picture in docs/design.md is drawn from this tuple, and the test of the imports reads it.
"""

from __future__ import annotations

PACKAGES: tuple[tuple[str, str], ...] = (
    ("common", "Errors, progress, text, jobs and optional packages."),
    ("checkpoint", "Reading safetensors, writing shards in a staging folder, and files."),
    ("blocks", "The table of architectures, the sites found in a checkpoint, the compact format and names."),
    ("sources", "Checkpoints from the hub, GGUF, pickles, CTranslate2 and openai-whisper's .pt files."),
    ("algebra", "Head weights, absorbing, decomposing and RoPE."),
    ("ranks", "Rules, spectra, plans and budgets."),
    ("statistics", "The file of calibration statistics, and how they weigh a decomposition."),
    ("surgery", "The model on disk: measure, rewrite, output, manifest and model card."),
    ("runtime", "Compact linear layers, buckets, and the loaders for transformers and openai-whisper."),
    ("models", "Models in memory: loading, inputs, hooks, audio and data."),
    ("calibration", "Collecting statistics, listeners, sequential calibration and trial cuts."),
    ("evaluation", "Measures, verify, search and bench."),
    ("tuning", "Adapters, training and merging."),
    ("exports", "ONNX graphs and openai-whisper's .pt files."),
    ("cli", "The commands, and the only code that prints."),
)
