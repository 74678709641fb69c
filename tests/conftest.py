"""Fixtures that every test file may use: tiny models on disk, made once, and the command line in this process.

Tests lie in folders named as the packages they are about. There are two tiers:

- `make check` runs what is neither `slow` nor `real`: tiny models in this process. Nothing is downloaded.
- `make test` runs everything.

`slow` is for what takes more than two seconds of CPU time: processes of their own (the hub, signals, several processes,
programs such as lm_eval), ONNX, training, PEFT's own tests, and sweeps of which a part is in the fast tier: of all
architectures eight, of the commands that meet each damaged model, or an output in the way, two. `real` is set here for
whatever takes a real model.
"""

from __future__ import annotations

import fcntl
import os
import shutil
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
from fetch_models import fetch
from harness import Once, Pessa, Real, RealPruned, Result, TinyFolder
from sites import ranks_by
from tuned import with_tokenizer

from pessa_cli.cli.main import BUG, main
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

# One thread a test process: for tiny matrices more are slower, and the cores are for other tests.
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
torch.set_num_threads(1)
LIBRARIES = ("compat", "runtime", "tuning", "sources/test_sources.py")  # tests that the libraries' versions decide


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark tests of real models by what they take, and those of other libraries' versions by their folder."""
    if any(item.path.is_relative_to(Path(__file__).parent / folder) for folder in LIBRARIES):
        item.add_marker(pytest.mark.libraries)
    if "real" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.real)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long goes first: at the end it would keep one process busy while the others have nothing to do."""
    items.sort(key=lambda item: not any(item.get_closest_marker(name) for name in ("slow", "real")))


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
            assert len({rank for ranks in ranks_by(written.ranks, "vo").values() for rank in ranks}) > 1
            made[name, layout] = out
        return made[name, layout]

    return get


@pytest.fixture(scope="session")
def real() -> Real:
    """`real("minilm")`: the folder of a real model, fetched on first use; a test that takes this is marked `real`."""
    return fetch


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """`once("name", make)`: the folder that `make(folder)` writes, written by one test process for all of them."""
    here = tmp_path_factory.getbasetemp()
    shared = (here.parent if "PYTEST_XDIST_WORKER" in os.environ else here) / "shared"
    shared.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with (shared / f".{name}.lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (shared / name).exists():
                shutil.rmtree(shared / f".{name}", ignore_errors=True)  # where making it failed before
                make(shared / f".{name}")
                (shared / f".{name}").rename(shared / name)
        return shared / name

    return folder


@pytest.fixture(scope="session")
def real_pruned(real: Real, once: Once) -> RealPruned:
    """`real_pruned("minilm", Rule(rank=3), "dense")`: a real model pruned, made once; copy it before changing it."""

    def get(name: str, rule: Rule, layout: Literal["compact", "dense"] = "compact") -> Path:
        def make(out: Path) -> None:
            prune_model(open_model(real(name)), out, rule, layout=layout)

        return once(f"{name} {rule} {layout}", make)

    return get


@pytest.fixture(scope="session")
def clip(real: Real) -> Path:
    """Ten seconds of English: "Ever tried. Ever failed. No matter. Try again. Fail again. Fail better." """
    return real("speech") / "beckett.wav"


@pytest.fixture
def pessa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Pessa:
    """`pessa("inspect", folder, "--json")`: the command in this process; an unexpected error fails the test."""

    def call(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["pessa", *map(str, arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            main()
        except SystemExit as leaving:
            if leaving.code == BUG and leaving.__context__ is not None:
                raise leaving.__context__ from leaving.__context__.__cause__
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
