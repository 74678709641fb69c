"""Helpers of the fine-tuning tests: a tokenizer of single characters, and training examples in every form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from characters import tokenizer
from harness import copy_of


def with_tokenizer(folder: Path, to: Path) -> Path:
    """Copy a model and add the tokenizer."""
    copy_of(folder, to)
    tokenizer().save_pretrained(to)
    return to


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def sums(path: Path, count: int = 16) -> Path:
    """Return training examples such as {"prompt": "3+4=", "completion": "7"}."""
    return write_lines(path, [{"prompt": f"{i}+{i % 3}=", "completion": str(i + i % 3)} for i in range(count)])


def history(adapter: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (adapter / "history.jsonl").read_text().splitlines()]


def losses(adapter: Path) -> list[float]:
    return [step["loss"] for step in history(adapter) if "loss" in step]


def disturb(model: torch.nn.Module, scale: float = 0.05) -> None:
    """Add noise to the weights of a fresh adapter, which has no effect yet, so that it changes the outputs."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))
