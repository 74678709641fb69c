"""Fixtures that every test file may use: tiny models on disk, made once, and the command line in this process."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
import torch
import transformers
from calibrating import data  # noqa: F401  # a fixture
from harness import Pessa, Result, TinyFolder
from tuned import with_tokenizer

from pessa_cli.cli.main import main
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.passes import prune_model

# One thread a test process: for tiny matrices more are slower, and the cores are for other tests.
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_progress_bars() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """`tiny_folder("whisper")`: a saved tiny model, made on first use and then shared, so copy it before changing it.

    Keyword arguments as for save_pretrained; `dtype` changes that of the weights.
    """
    made: dict[str, Path] = {}

    def folder(name: str, **kwargs: Any) -> Path:
        key = "-".join([name, *map(str, kwargs.values())])
        if key not in made:
            made[key] = tmp_path_factory.mktemp("tiny") / key
            dtype = kwargs.pop("dtype", None)
            tiny.build(name).to(dtype).save_pretrained(made[key], **kwargs)
        return made[key]

    return folder


@pytest.fixture(scope="session")
def pruned(tiny_folder: TinyFolder, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`pruned("whisper", "dense")`: a tiny model pruned to uneven ranks, in that layout or compact, made once."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, layout: Literal["compact", "dense"] = "compact") -> Path:
        if (name, layout) not in made:
            out = tmp_path_factory.mktemp("pruned") / "out"
            written = prune_model(open_model(tiny_folder(name)), out, Rule(ratio=0.45), layout=layout)
            assert len({rank for ranks in written.ranks.vo.values() for rank in ranks}) > 1
            made[name, layout] = out
        return made[name, layout]

    return get


@pytest.fixture
def pessa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pessa:
    """`pessa("inspect", folder, "--json")`: the command in this process; an uncaught exception fails the test."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pessa", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as leaving:
            code = leaving.code or 0
        printed = capsys.readouterr()
        assert isinstance(code, int), code
        return Result(code, printed.out, printed.err)

    return call


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in; temporary files of the command fall into it too, where `snapshot` sees them."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


@pytest.fixture
def llama(tiny_folder: TinyFolder, tmp_path: Path) -> Path:
    """The folder of a tiny LLaMA with a tokenizer."""
    return with_tokenizer(tiny_folder("llama"), tmp_path / "llama")
