"""Loading models: memory that runs out is told as that, and own code of a checkpoint never runs."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Pessa, TinyFolder, copy_of, edit_json, edit_weights, is_refusal
from transformers import LlamaForCausalLM

from pessa_cli.common.errors import PessaError
from pessa_cli.common.memory import out_of_memory
from pessa_cli.models.classes import class_of
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.surgery.model import open_model


def no_memory_left(*_: Any, **__: Any) -> None:
    """Cause torch's own error for a size that no machine has."""
    torch.empty(2**55, dtype=torch.uint8)


def caused_by(reason: BaseException) -> Exception:
    """An error that says nothing of memory, and whose cause does."""
    error = ValueError("the weights cannot be read")
    error.__cause__ = reason
    return error


def raised(cause: Callable[[], object]) -> BaseException:
    with pytest.raises(BaseException) as info:  # noqa: PT011
        cause()
    return info.value


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (raised(no_memory_left), True),
        (raised(lambda: bytearray(2**62)), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (caused_by(raised(no_memory_left)), True),
        (raised(lambda: torch.ones(2) @ torch.ones(3)), False),
        (OSError(errno.ENOENT, "out of memory.txt"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_tells_that_memory_ran_out(error: BaseException, memory: bool) -> None:
    assert out_of_memory(error) == memory


def test_too_little_memory_is_no_bad_checkpoint(tiny_folder: TinyFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder("llama")
    model = open_model(folder)
    with quiet_transformers():
        class_of(model)
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", no_memory_left)
    with pytest.raises(PessaError, match="not enough memory") as raised:
        load(model)
    assert str(folder) in raised.value.message
    assert f"{model.parameters:,}" in raised.value.message
    assert "--level weights" in str(raised.value.hint)
    assert "config.json" not in f"{raised.value.message} {raised.value.hint}"
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_memory_that_runs_out_later_is_one_line(
    tiny_folder: TinyFolder, pessa: Pessa, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaForCausalLM, "forward", no_memory_left)
    monkeypatch.setattr("pessa_cli.models.hooks.fitted", lambda _, inputs: inputs)
    folder = tiny_folder("llama")
    is_refusal(pessa("verify", folder, folder), "not enough memory", "allocate")


def test_a_checkpoint_of_no_class_names_what_is_missing(tiny_folder: TinyFolder, tmp_path: Path) -> None:
    folder = copy_of(tiny_folder("bert"), tmp_path / "bert")

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        tensors["bert.words.weight"] = tensors.pop("bert.embeddings.word_embeddings.weight")

    edit_weights(rename)(folder)
    for names in (["BertForMaskedLM"], []):
        edit_json(partial(dict.update, architectures=names))(folder)
        with quiet_transformers(), pytest.raises(PessaError, match=r"word_embeddings.weight: missing") as raised:
            load(open_model(folder))
        assert str(folder) in raised.value.message
        assert "--level weights" in str(raised.value.hint)
