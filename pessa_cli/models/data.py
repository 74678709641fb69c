"""Reading calibration and evaluation data: audio files, folders of audio files, JSON lines, and text files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import check_file, is_there
from pessa_cli.common.text import read_text
from pessa_cli.models.audio import load_audio, seconds_of

AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".opus")


@dataclass(frozen=True)
class DataItem:
    """One file or one line of JSON lines: a clip with its transcript, if that is known, or a text.

    language: the code of the language that is spoken, such as "de"; None if it is not known. sha256: of the audio file,
    or of the file that contains the text.
    """

    audio: Path | None = None
    text: str | None = None
    language: str | None = None
    sha256: str = ""

    @property
    def nbytes(self) -> int:
        return len(self.text or "") if self.audio is None else self.audio.stat().st_size

    @property
    def seconds(self) -> float:
        """The length of a clip, by the header of its file. Raises PessaError if it cannot be read."""
        assert self.audio is not None
        return seconds_of(self.audio)

    @property
    def recordings(self) -> dict[str, float]:
        """The seconds of each recording in a clip, by a name that tells it from others."""
        return {self.sha256: self.seconds}

    @property
    def samples(self) -> NDArray[np.float32]:
        """The samples of a clip at 16 kHz, (time,). Raises PessaError if its file cannot be read."""
        assert self.audio is not None
        return load_audio(self.audio)

    @property
    def identity(self) -> str:
        """The SHA-256 of the file, and for a clip with a transcript or language, after a colon, that of these."""
        if self.audio is None or (self.text is None and self.language is None):
            return self.sha256
        return f"{self.sha256}:{hashlib.sha256(json.dumps([self.text, self.language]).encode()).hexdigest()}"


class CalibrationData(NamedTuple):
    """Data to calibrate on, and the identities of its items, see `DataItem.identity`."""

    items: list[DataItem]
    identities: list[str]


def read_data(paths: Sequence[Path]) -> CalibrationData:
    """Read the data in files and folders, and compute the SHA-256 of each audio or text file.

    Files with equal contents count once, and so do a clip on its own and the same clip in JSON lines, of which the
    lines are used. Lines of one file always count. Raises PessaError for files that are missing, unreadable or
    malformed, and for folders without audio.
    """
    found: dict[str, list[DataItem]] = {}  # by the SHA-256 of the file
    for path in paths:
        if is_there(path) and path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO and file.is_file())
            if not files:
                raise PessaError(
                    f"{path} contains no audio", f"give a folder with files that end in {', '.join(AUDIO)}"
                )
        else:
            check_file(path, "give audio or text files, folders of audio, or JSON lines")
            files = [path]
        for file in files:
            digest = sha256_of(file)
            if digest not in found:
                found[digest] = list(_items(file, digest))
    in_lines = {item.sha256 for digest, items in found.items() for item in items if item.sha256 != digest}
    chosen: dict[str, list[DataItem]] = {}  # by identity, in which the lines of one file may be equal
    for digest, items in found.items():
        new = [item for item in items if item.identity not in chosen and digest not in in_lines]
        for item in new:
            chosen.setdefault(item.identity, []).append(item)
    return CalibrationData([item for items in chosen.values() for item in items], list(chosen))


def amount_of(items: Sequence[DataItem]) -> str:
    """Say how many data these are: "3.2 minutes of audio", or "5,000 characters of text". A recording counts once."""
    if any(item.audio is None for item in items):
        return f"{sum(len(item.text or '') for item in items):,} characters of text"
    recordings = {name: seconds for item in items for name, seconds in item.recordings.items()}
    return f"{sum(recordings.values()) / 60:.2g} minutes of audio"


def _items(file: Path, digest: str) -> Iterator[DataItem]:
    """Read one file; `digest` is its SHA-256."""
    if file.suffix.lower() in AUDIO:
        yield DataItem(audio=file, sha256=digest)
    elif file.suffix.lower() in (".jsonl", ".json"):
        hashes: dict[Path, str] = {}  # several lines may name one clip
        for item in _lines(file):
            if item.audio is not None and item.audio not in hashes:
                hashes[item.audio] = sha256_of(item.audio)
            yield replace(item, sha256=digest if item.audio is None else hashes[item.audio])
    else:
        yield DataItem(text=read_text(file, "give audio, UTF-8 text or JSON lines"), sha256=digest)


def _lines(path: Path) -> Iterator[DataItem]:
    for number, line in enumerate(read_text(path, "give audio, UTF-8 text or JSON lines").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text, language = row.get("audio", row.get("file")), row.get("text"), row.get("language")
            if not all(value is None or isinstance(value, str) for value in (audio, text)) or not (audio or text):
                raise ValueError("the line has neither text nor audio")
            if not isinstance(language or "", str):
                raise ValueError(f'the language is {language!r}, which is not a code such as "en"')
        except (ValueError, AttributeError, RecursionError) as error:
            raise PessaError(f"{path}, line {number}: {error}", 'write {"audio": FILE} or {"text": "..."}') from error
        clip = None if not audio else path.parent / audio
        if clip is not None:
            try:
                check_file(clip, "correct the path; it is relative to the JSONL file")
            except PessaError as error:
                raise PessaError(f"{path}, line {number}: {error.message}", error.hint) from error
        yield DataItem(clip, text, language or None)
