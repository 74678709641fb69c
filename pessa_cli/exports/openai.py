"""Exporting a Hugging Face Whisper as the .pt file of openai-whisper, which whisper.load_model reads.

The file has the tensors of the folder, bit for bit and in their dtype. Dropped directions of compact blocks are zeros.
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
    """Write a dense or compact Whisper folder as a dense file `out` of openai-whisper, in the same dtype.

    torch.save needs all tensors at once, so the dense weights are in memory once. The alignment heads, whose attention
    follows the audio in time, are stored beside `dims` under `alignment_heads`, in the encoding that
    `Whisper.set_alignment_heads` takes. whisper.load_model itself knows them only for the official model names.

    Raises PessaError for a model that openai-whisper cannot represent (see `openai_form`), for weights that are not
    finite, and in the cases of `new_file`; UsageError when the name of `out` does not end in .pt.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out} does not end in .pt, as files of openai-whisper do", f"give -o {out}.pt")
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
        except RuntimeError as error:  # torch raises this type when the disk is full
            raise OSError(str(error).splitlines()[0]) from error
        reader.check_unchanged()


@contextmanager
def new_file(out: Path, source: Path, force: bool = False) -> Iterator[BinaryIO]:
    """A temporary file beside `out`, which is flushed to disk and renamed to `out` at the end, or deleted on errors.

    force: replace an existing file, if torch.save wrote it. Raises PessaError when `out` exists otherwise, when it is
    inside the folder `source`, when it cannot be written, and while another run is writing it.
    """
    import fcntl

    partial = out.parent / f".{out.name}.partial"
    if source.resolve() in out.resolve().parents:
        raise PessaError(f"{out} is inside {source}, which is only read", "give an -o outside the model's folder")
    _check_replaceable(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = f"another run is writing {out} at this moment"
                raise PessaError(busy, "wait until it ends, or give another -o") from None
            try:
                file.truncate(0)  # a killed run may have left content
                yield file
                file.flush()
                os.fsync(file.fileno())
                _check_replaceable(out, force)
                partial.replace(out)
            finally:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise PessaError(f"could not write {out}: {error}", "free disk space, or give another -o") from error


def _check_replaceable(out: Path, force: bool) -> None:
    if not (out.exists() or out.is_symlink()):
        return
    if not force:
        raise PessaError(f"{out} exists", "give another -o, or --force to replace it")
    if not out.is_file() or not zipfile.is_zipfile(out):
        raise PessaError(f"{out} was not written by torch.save, so --force does not replace it", "give another -o")
