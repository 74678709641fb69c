"""Reading audio files in any format of libsndfile, as the 16 kHz mono samples that speech models expect."""

from __future__ import annotations

from pathlib import Path

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
    check_file(path, FORMATS)
    try:
        import soundfile
        import soxr
    except ImportError as error:
        raise PessaError(
            f"reading audio needs the package {error.name}, which is not installed", "pip install 'pessa[whisper]'"
        ) from error
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError, TypeError) as error:
        raise PessaError(f"cannot read {path}: {error}", FORMATS) from error
    if not len(samples):
        raise PessaError(f"{path} contains no samples", "give a clip with speech in it")
    mono: NDArray[np.float32] = samples.mean(axis=1)
    return mono if rate == SAMPLE_RATE else np.asarray(soxr.resample(mono, rate, SAMPLE_RATE), dtype=np.float32)
