"""GGUF files, as llama.cpp runs them: dequantised by transformers into a float32 Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError

MAGIC = b"GGUF"
ARCHITECTURES = ("llama",)  # under GGUF's names; each is run by a test
DAMAGED = "the file is damaged or incomplete: download it again"


def is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def _architecture(path: Path) -> str:
    try:
        import accelerate  # noqa: F401  # transformers loads GGUF files with it
        from gguf import GGUFReader
    except ImportError as error:
        what = f"{path} is a GGUF file, and {error.name} is not installed"
        raise PessaError(what, "pip install 'pessa[gguf]'") from None
    try:
        return str(GGUFReader(path).fields["general.architecture"].contents())
    except Exception as error:  # the package checks little, so a damaged file ends in whatever comes first
        raise PessaError(f"{path} is no readable GGUF file: {error}", DAMAGED) from None


def convert(path: Path, into: Path) -> None:
    """Write the model in a GGUF file as a complete Hugging Face folder, in float32 so that nothing is rounded.

    The whole model is in memory meanwhile. Raises PessaError for another architecture, a damaged file, and where
    the gguf package is missing.
    """
    found = _architecture(path)
    if found not in ARCHITECTURES:
        raise PessaError(
            f"{path} is of the GGUF architecture {found!r}; supported: {', '.join(ARCHITECTURES)}",
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
    except Exception as error:  # as above: what is wrong with a file shows anywhere
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PessaError(f"{path} does not load: {type(error).__name__}: {reason}", DAMAGED) from error
    into.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(into)
    model.save_pretrained(into)
