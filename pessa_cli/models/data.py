"""Calibration and evaluation data: audio files, folders of them, JSON lines, and text files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import read_text

AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".opus")


@dataclass(frozen=True)
class DataItem:
    """One file, or one line of JSON lines: a clip with what is said in it, if that is known, or a text."""

    audio: Path | None = None
    text: str | None = None

    @property
    def nbytes(self) -> int:
        return len(self.text or "") if self.audio is None else self.audio.stat().st_size


def read_data(paths: Sequence[Path]) -> tuple[list[DataItem], list[str]]:
    """The calibration data in files and folders, and the SHA-256 of each file of audio or text, once for equal ones.

    Raises PessaError when there is none.
    """
    found: dict[str, list[DataItem]] = {}
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.suffix.lower() in AUDIO)
            if not files:
                raise PessaError(f"{path} holds no audio", f"it has no file that ends in {', '.join(AUDIO)}")
            found |= {sha256_of(file): [DataItem(audio=file)] for file in files}
        elif not path.is_file():
            raise PessaError(f"{path} is not there", "give audio or text files, folders of audio, or JSON lines")
        elif path.suffix.lower() in AUDIO:
            found[sha256_of(path)] = [DataItem(audio=path)]
        elif path.suffix.lower() in (".jsonl", ".json"):
            lines = list(_lines(path))
            found |= {sha256_of(line.audio): [line] for line in lines if line.audio is not None}
            if texts := [line for line in lines if line.audio is None]:
                found[sha256_of(path)] = texts
        else:
            found[sha256_of(path)] = [DataItem(text=read_text(path, "give audio, UTF-8 text or JSON lines"))]
    return [item for items in found.values() for item in items], list(found)


def _lines(path: Path) -> Iterator[DataItem]:
    for number, line in enumerate(read_text(path, "give audio, UTF-8 text or JSON lines").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            audio, text = row.get("audio", row.get("file")), row.get("text")
            if not isinstance(audio or text, str) or not isinstance(text or "", str):
                raise ValueError("it has no text and no audio")
        except (ValueError, AttributeError, RecursionError) as error:
            raise PessaError(f"{path}, line {number}: {error}", 'write {"audio": FILE} or {"text": "..."}') from None
        clip = None if audio is None else path.parent / audio
        if clip is not None and not clip.is_file():
            raise PessaError(f"{path}, line {number}: {clip} is not there", "correct the path")
        yield DataItem(clip, text)
