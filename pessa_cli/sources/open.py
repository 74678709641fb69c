"""Resolution of the model argument: a folder, a file or a hub name becomes a folder that CheckpointReader reads."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pessa_cli.checkpoint.files import CONFIG_FILE, source_name
from pessa_cli.checkpoint.links import check_links
from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.sources import ctranslate2, hub, pickled
from pessa_cli.sources import gguf as gguf_source
from pessa_cli.sources import openai as openai_whisper

Convert = Callable[[Path, Path], None]


def _converter(path: Path, allow_pickle: bool) -> Convert | None:
    """Return the function that converts this file or folder to a Hugging Face folder, or None if none is needed.

    For a folder in no known format it also returns None: CheckpointReader then reports what is missing. Raises
    PessaError for a file in no known format.
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
        f"give the folder that holds it, {path.parent}, or an openai-whisper .pt file or a GGUF file",
    )


@contextmanager
def _converted(source: Path, convert: Convert) -> Iterator[Path]:
    """Convert the source into a temporary folder, which is deleted when the context ends."""
    with tempfile.TemporaryDirectory(prefix="pessa-") as temporary:
        # The folder has the source's name, so that messages show the name that the user gave.
        into = Path(temporary) / source_name(source).rpartition("/")[2]
        try:
            convert(source, into)
            # `--resume` compares modification times to tell whether the source is the same, so copy the source's time.
            read = source.iterdir() if source.is_dir() else [source]
            stamp = max(path.stat().st_mtime_ns for path in read)
            for path in into.iterdir():
                os.utime(path, ns=(stamp, stamp))
        except OSError as error:
            raise PessaError(
                f"could not convert {source}: {error}", "free some space, or set TMPDIR to a folder with more space"
            ) from error
        yield into


@contextmanager
def open_source(
    name: str, revision: str | None = None, allow_pickle: bool = False, follow_links: bool = False
) -> Iterator[Path]:
    """Open the named model as a Hugging Face folder: `with open_source(name) as folder`.

    An existing Hugging Face folder is used in place. If the path does not exist and the name is a hub repository or a
    model of openai-whisper, it is downloaded into the hub's cache. Other formats (CTranslate2 Whisper folders,
    openai-whisper's .pt files, GGUF files, and with `allow_pickle` pickled weights) are converted into a temporary
    folder, which is deleted when the context ends. With `follow_links` the files of a folder may be links to files
    outside of it. Raises PessaError if the name is neither a model that pessa reads nor the name of one, a link leads
    out of the folder or nowhere, the download fails or the model is damaged, and UsageError for a revision of a local
    model.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise UsageError(f"--revision is for models on the hub, but {name} is a local path", "leave it out")
    else:
        repository = hub.repository_of(name)
        if repository is None:
            raise PessaError(
                f"{name} does not exist",
                "give a folder, a file, a hub name such as owner/name, or an openai-whisper name such as tiny.en",
            )
        path = hub.download(repository, revision, allow_pickle)
    convert = _converter(path, allow_pickle)
    if path.is_dir() and (convert or (path / CONFIG_FILE).is_symlink() or (path / CONFIG_FILE).exists()):
        check_links(path, follow_links, everything=convert is not None)  # no other folder is read
    if convert is None:
        yield path
        return
    with _converted(path, convert) as folder:
        yield folder
