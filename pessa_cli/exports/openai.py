"""A Hugging Face Whisper in openai-whisper's form: its names and dims, and the .pt file that whisper.load_model reads.

The tensors are those of the folder, bit for bit and in its dtype; compact blocks get zeros where directions were cut.
"""

from __future__ import annotations

import base64
import gzip
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch

from pessa_cli.blocks.site import in_full
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.runtime.openai_form import alignment_mask, openai_form
from pessa_cli.sources.openai import SUFFIXES
from pessa_cli.surgery.block_io import read_site, write_site
from pessa_cli.surgery.model import open_model


def export_openai(folder: Path, out: Path, force: bool = False, progress: Progress = quietly) -> None:
    """Write a Whisper folder, dense or compact, as the stock file `out` of openai-whisper: dense, in the same dtype.

    torch.save wants all tensors when it begins, so the dense weights are in memory once, which is a fraction of
    what loading the file takes. The heads that follow time lie beside `dims` under `alignment_heads`, written as
    `Whisper.set_alignment_heads` takes them: whisper.load_model knows them by a model's name only, not by its file.

    Raises PessaError for a model that is none of openai-whisper's (see `openai_form`), for weights with NaN, and as
    `new_file` does.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out} does not end in .pt, as openai-whisper's files do", "name it so")
    with new_file(out, folder, force) as file:
        form = openai_form(open_model(folder))
        reader = form.model.reader
        tensors: dict[str, torch.Tensor] = {}
        with progress("reading", form.model.nbytes, len(form.model.sites)) as tick:
            for site in form.model.sites:
                weights = read_site(reader, site)
                tensors |= write_site(weights, in_full(site), reader.header, "dense")
                tick(sum(reader.header[name].nbytes for name in site.tensors), 1)
            for name in form.names.values():
                if name not in tensors:
                    tensors[name] = form.tensor(name)
                    tick(reader.header[name].nbytes, 0)
        checkpoint: dict[str, object] = {
            "dims": form.dims,
            "model_state_dict": {theirs: tensors[ours] for theirs, ours in form.names.items()},
        }
        if form.alignment_heads:
            packed = gzip.compress(alignment_mask(form).numpy().tobytes(), mtime=0)
            checkpoint["alignment_heads"] = base64.b85encode(packed).decode()
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(str(error).splitlines()[0]) from error
        reader.check_unchanged()


@contextmanager
def new_file(out: Path, source: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A file beside `out` that is flushed to the disk and renamed to it at the end; nothing stays when this raises.

    `force` lets another file of torch.save give way. Raises PessaError when `out` exists otherwise or lies in
    `source`, which is only read, where nothing can be written, and while another run is writing there.
    """
    import fcntl

    partial = out.parent / f".{out.name}.partial"
    if source.resolve() in out.resolve().parents:
        raise PessaError(f"{out} is inside {source}, which is only read", "give an -o outside of it")
    _check_replaceable(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = f"another run is writing {out} just now"
                raise PessaError(busy, "wait for it, or give another -o") from None
            try:
                file.truncate(0)  # what a killed run has left
                yield file
                file.flush()
                os.fsync(file.fileno())
                _check_replaceable(out, force)
                partial.replace(out)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise PessaError(f"could not write {out}: {error}", "free some space, or give another -o") from error


def _check_replaceable(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise PessaError(f"{out} exists", "give another -o, or --force to replace it")
    if not out.is_file() or not zipfile.is_zipfile(out):
        raise PessaError(f"{out} is no file of torch.save, so --force does not replace it", "give another -o")
