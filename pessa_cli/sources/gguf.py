"""Conversion of GGUF files, which llama.cpp runs: transformers dequantises them into a float32 Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError

MAGIC = b"GGUF"
ARCHITECTURES = ("llama",)  # GGUF's names; a test runs each of them
DAMAGED = "the file is damaged or incomplete: download it again"


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file that begins with GGUF's magic bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _architecture(path: Path) -> str:
    """Return the architecture named in the file. Raises PessaError if it is unreadable or a package is missing."""
    try:
        import accelerate  # noqa: F401  # transformers needs it to load GGUF files
        from gguf import GGUFReader
    except ImportError as error:
        what = f"{path} is a GGUF file, and reading it needs {error.name}, which is not installed"
        raise PessaError(what, "pip install 'pessa[gguf]'") from None
    try:
        return str(GGUFReader(path).fields["general.architecture"].contents())
    except Exception as error:  # the gguf package validates little, so a damaged file can raise any exception
        raise PessaError(f"{path} is not a readable GGUF file: {error}", DAMAGED) from None


def convert(path: Path, into: Path) -> None:
    """Write the model in a GGUF file as a complete Hugging Face folder, in float32 so that no weight is rounded.

    The whole model is held in memory. Raises PessaError if the file has an unsupported architecture or is damaged, or
    if the gguf or accelerate package is missing.
    """
    found = _architecture(path)
    if found not in ARCHITECTURES:
        raise PessaError(
            f"{path} has the GGUF architecture {found!r}; supported: {', '.join(ARCHITECTURES)}",
            "give the Hugging Face folder that it was made from",
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **options)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32, **options
        )
    except Exception as error:  # as above: a damaged file can raise any exception
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PessaError(f"{path} does not load: {type(error).__name__}: {reason}", DAMAGED) from error
    into.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(into)
    model.save_pretrained(into)
