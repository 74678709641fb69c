"""Reading calibration and evaluation data: audio files, folders of audio files, JSON lines, and text files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import is_there
from pessa_cli.common.text import read_text

AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".opus")


@dataclass(frozen=True)
class DataItem:
    """One file or one line of JSON lines: a clip with its transcript, if that is known, or a text."""

    audio: Path | None = None
    text: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.text or "") if self.audio is None else self.audio.stat().st_size


class CalibrationData(NamedTuple):
    """Data to calibrate on, and the SHA-256 of each of its files."""

    items: list[DataItem]
    sha256: list[str]


def read_data(paths: Sequence[Path]) -> CalibrationData:
    """Read the data in files and folders, and compute the SHA-256 of each audio or text file.

    Files with equal contents count once. Raises PessaError for files that are missing, unreadable or malformed, and for
    folders without audio.
    """
    found: dict[str, list[DataItem]] = {}
    for path in paths:
        if is_there(path) and path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO and file.is_file())
            if not files:
                raise PessaError(
                    f"{path} contains no audio", f"give a folder with files that end in {', '.join(AUDIO)}"
                )
            found |= {sha256_of(file): [DataItem(audio=file)] for file in files}
        elif not (is_there(path) and path.is_file()):
            raise PessaError(f"{path} does not exist", "give audio or text files, folders of audio, or JSON lines")
        elif path.suffix.lower() in AUDIO:
            found[sha256_of(path)] = [DataItem(audio=path)]
        elif path.suffix.lower() in (".jsonl", ".json"):
            lines = list(_lines(path))
            found |= {sha256_of(line.audio): [line] for line in lines if line.audio is not None}
            if texts := [line for line in lines if line.audio is None]:
                found[sha256_of(path)] = texts
        else:
            found[sha256_of(path)] = [DataItem(text=read_text(path, "give audio, UTF-8 text or JSON lines"))]
    return CalibrationData([item for items in found.values() for item in items], list(found))


def _lines(path: Path) -> Iterator[DataItem]:
    for number, line in enumerate(read_text(path, "give audio, UTF-8 text or JSON lines").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text = row.get("audio", row.get("file")), row.get("text")
            if not all(value is None or isinstance(value, str) for value in (audio, text)) or not (audio or text):
                raise ValueError("the line has neither text nor audio")
        except (ValueError, AttributeError, RecursionError) as error:
            raise PessaError(f"{path}, line {number}: {error}", 'write {"audio": FILE} or {"text": "..."}') from None
        clip = None if not audio else path.parent / audio
        if clip is not None and not (is_there(clip) and clip.is_file()):
            raise PessaError(
                f"{path}, line {number}: {clip} does not exist", "correct the path; it is relative to the JSONL file"
            )
        yield DataItem(clip, text)
