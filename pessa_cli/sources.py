"""Where a model comes from: anything a user may name becomes a folder that CheckpointReader reads."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from pessa_cli import ctranslate2
from pessa_cli.errors import PessaError


@contextmanager
def _converted(source: Path, convert: Callable[[Path, Path], None]) -> Iterator[Path]:
    """A temporary folder with the converted source, gone at the end."""
    with tempfile.TemporaryDirectory(prefix="pessa-") as temporary:
        into = Path(temporary) / source.resolve().name  # so that messages show the name that the user gave
        try:
            convert(source, into)
        except OSError as error:
            raise PessaError(
                f"could not convert {source}: {error}", "free some space, or set TMPDIR to where there is some"
            ) from error
        yield into


def _ctranslate2_folder(name: str) -> AbstractContextManager[Path] | None:
    folder = Path(name)
    return _converted(folder, ctranslate2.convert) if ctranslate2.is_ctranslate2(folder) else None


def _hugging_face_folder(name: str) -> AbstractContextManager[Path] | None:
    # Any folder: what is missing in one that holds no model, CheckpointReader says best.
    folder = Path(name)
    return nullcontext(folder) if folder.is_dir() else None


# One function per kind of source; the first that knows the name opens it, so the particular stand before the general.
KINDS: tuple[Callable[[str], AbstractContextManager[Path] | None], ...] = (
    _ctranslate2_folder,
    _hugging_face_folder,
)


@contextmanager
def open_source(name: str) -> Iterator[Path]:
    """A folder with the named model, as `with open_source(name) as folder`.

    A Hugging Face folder is given as it is; a CTranslate2 Whisper folder is converted into a temporary folder that
    lives as long as the block. Raises PessaError for a name that is nothing pessa reads, or a damaged model.
    """
    for kind in KINDS:
        source = kind(name)
        if source is not None:
            with source as folder:
                yield folder
            return
    if Path(name).exists():
        raise PessaError(f"{name} is a file, not a folder", f"give the folder that holds it: {Path(name).parent}")
    raise PessaError(f"{name} does not exist", "give the folder of a Hugging Face or CTranslate2 Whisper model")
