"""Reading audio files in any format of libsndfile, as the 16 kHz mono samples that speech models expect."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import check_file

SAMPLE_RATE = 16_000
FORMATS = "give a WAV, FLAC, OGG or MP3 file"


def load_audio(path: Path) -> NDArray[np.float32]:
    """Read a file as samples, (time,), float32 in [-1, 1] at 16 kHz, with its channels averaged.

    Raises PessaError when the file does not exist, cannot be read or is empty, or when the `whisper` extra is not
    installed.
    """
    with _reading(path) as soundfile:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    if not len(samples):
        raise PessaError(f"{path} contains no samples", "give a clip with speech in it")
    mono: NDArray[np.float32] = samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else resampled(mono, rate)


def seconds_of(path: Path) -> float:
    """Return the length of a file in seconds, by its header. Raises PessaError as `load_audio` does."""
    with _reading(path) as soundfile:
        found = soundfile.info(path)
    if not found.frames:
        raise PessaError(f"{path} contains no samples", "give a clip with speech in it")
    return float(found.frames / found.samplerate)


def resampled(samples: NDArray[np.float32], rate: float) -> NDArray[np.float32]:
    """Return samples, (time,), that were taken at `rate` Hz, at 16 kHz. Raises PessaError without soxr."""
    soxr = _library("soxr")
    return np.asarray(soxr.resample(samples, rate, SAMPLE_RATE), dtype=np.float32)


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    """Yield the module soundfile to read a file with, and turn its errors into PessaError."""
    check_file(path, FORMATS)
    soundfile = _library("soundfile")
    _library("soxr")
    try:
        yield soundfile
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise PessaError(f"cannot read {path}: {error}", FORMATS) from error


def _library(name: str) -> Any:
    """Import a library of the `whisper` extra. Raises PessaError if it is not installed."""
    try:
        return import_module(name)
    except ImportError as error:
        raise PessaError(
            f"reading audio needs the package {error.name}, which is not installed", "pip install 'pessa[whisper]'"
        ) from error
