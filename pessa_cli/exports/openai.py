"""Exporting a Hugging Face Whisper as the .pt file of openai-whisper, which whisper.load_model reads.

The file has the tensors of the folder, bit for bit and in their dtype. Dropped directions of compact blocks are zeros.
"""

from __future__ import annotations

import base64
import gzip
import zipfile
from pathlib import Path

import torch

from pessa_cli.checkpoint.staging import new_file
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import disk_error
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.version import VERSION
from pessa_cli.runtime.openai_form import alignment_mask, openai_form
from pessa_cli.sources.openai import SUFFIXES
from pessa_cli.sources.pickled import load_pickle
from pessa_cli.surgery.block_io import read_site, write_site
from pessa_cli.surgery.model import open_model

MARK = "pessa"  # the key that tells that pessa wrote a file


def export_openai(folder: Path, out: Path, force: bool = False, progress: Progress = quietly) -> None:
    """Write a dense or compact Whisper folder as a dense file `out` of openai-whisper, in the same dtype.

    torch.save needs all tensors at once, so the dense weights are in memory once. The alignment heads, whose attention
    follows the audio in time, are stored beside `dims` under `alignment_heads`, in the encoding that
    `Whisper.set_alignment_heads` takes. whisper.load_model itself knows them only for the official model names. It
    ignores the key `pessa`, which tells that pessa wrote the file.

    Raises PessaError for a model that openai-whisper cannot represent (see `openai_form`), for weights that are not
    finite, and in the cases of `checkpoint.staging.new_file`; UsageError when the name of `out` does not end in .pt.
    """
    if out.suffix not in SUFFIXES:
        raise UsageError(f"{out} does not end in .pt, as files of openai-whisper do", f"give -o {out}.pt")
    with new_file(out, [folder], force, _not_ours) as partial:
        form = openai_form(open_model(folder))
        reader = form.model.reader
        tensors: dict[str, torch.Tensor] = {}
        with progress("reading", form.model.nbytes, len(form.model.sites)) as tick:
            for site in form.model.sites:
                weights = read_site(reader, site)
                tensors |= write_site(weights, site.in_full(), reader.header, "dense")
                tick(sum(reader.header[name].nbytes for name in site.tensors), 1)
            for name in form.names.values():
                if name not in tensors:
                    tensors[name] = form.tensor(name)
                    tick(reader.header[name].nbytes, 0)
        checkpoint: dict[str, object] = {
            MARK: VERSION,
            "dims": form.dims,
            "model_state_dict": {theirs: tensors[ours] for theirs, ours in form.names.items()},
        }
        if form.alignment_heads:
            packed = gzip.compress(alignment_mask(form).numpy().tobytes(), mtime=0)
            checkpoint["alignment_heads"] = base64.b85encode(packed).decode()
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
        except RuntimeError as error:  # torch raises this type when the disk is full
            if failed := disk_error(error):
                raise failed from error
            raise
        reader.check_unchanged()


def _not_ours(out: Path) -> str:
    """Return why a file may not be replaced: pessa did not write it. Return "" if it may."""
    if out.is_symlink():
        return f"{out} is a link"
    try:
        if out.is_file() and zipfile.is_zipfile(out) and MARK in load_pickle(out).value:
            return ""
    except PessaError:
        pass
    return f"{out} was not written by pessa"
