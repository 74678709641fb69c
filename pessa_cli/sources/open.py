"""Where a model comes from: anything a user may name becomes a folder that CheckpointReader reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pessa_cli.checkpoint.files import source_name
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.sources import ctranslate2, hub, pickled
from pessa_cli.sources import gguf as gguf_source
from pessa_cli.sources import openai as openai_whisper

Convert = Callable[[Path, Path], None]


def _converter(path: Path, allow_pickle: bool) -> Convert | None:
    """What turns this file or folder into a Hugging Face folder; None for what is one, or claims to be.

    What is missing in a folder that holds no model, CheckpointReader says best.
    """
    if path.is_dir():
        if ctranslate2.is_ctranslate2(path):
            return ctranslate2.convert
        return pickled.convert if allow_pickle and pickled.is_pickled(path) else None
    if gguf_source.is_gguf(path):
        return gguf_source.convert
    if openai_whisper.is_openai_file(path):
        return openai_whisper.convert
    raise PessaError(
        f"{path} is a file, not a folder",
        f"give the folder that holds it: {path.parent}; or an openai-whisper .pt or a GGUF file",
    )


@contextmanager
def _converted(source: Path, convert: Convert) -> Iterator[Path]:
    """A temporary folder with the converted source, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="pessa-") as temporary:
        # Called as the source is, so that messages show the name that the user gave.
        into = Path(temporary) / source_name(source).rpartition("/")[2]
        try:
            convert(source, into)
            # As old as the source: by its time `--resume` knows that a converted model is the one it began with.
            read = source.iterdir() if source.is_dir() else [source]
            stamp = max(path.stat().st_mtime_ns for path in read)
            for path in into.iterdir():
                os.utime(path, ns=(stamp, stamp))
        except OSError as error:
            raise PessaError(
                f"could not convert {source}: {error}", "free some space, or set TMPDIR to where there is some"
            ) from error
        yield into


@contextmanager
def open_source(name: str, revision: str | None = None, allow_pickle: bool = False) -> Iterator[Path]:
    """A folder with the named model, as `with open_source(name) as folder`.

    A Hugging Face folder is given as it is. What has no such folder here, but a name that a hub or openai-whisper
    could have, is downloaded into the hub's cache. Other formats (CTranslate2 Whisper folders, openai-whisper's
    .pt, GGUF, and pickled weights if `allow_pickle`) are converted into a temporary folder that lives as long as
    the block. Raises PessaError for a name that is nothing pessa reads, a failing download, or a damaged model.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UsageError(f"--revision is for models from a hub, and {name} is here", "leave it out")
    else:
        repository = hub.repository_of(name)
        if repository is None:
            raise PessaError(
                f"{name} does not exist",
                "give a folder, a file, a name on the hub as owner/name, or one of openai-whisper's as tiny.en",
            )
        path = hub.download(repository, revision, allow_pickle)
    convert = _converter(path, allow_pickle)
    if convert is None:
        yield path
        return
    with _converted(path, convert) as folder:
        yield folder
