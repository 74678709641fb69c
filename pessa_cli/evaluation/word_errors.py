"""Word error rate: what a speech model hears in clips, held against what is said in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.packages import need
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.measures import Score, ScoreSettings
from pessa_cli.models.audio import load_audio
from pessa_cli.models.data import read_data
from pessa_cli.models.inputs import Inputs, listen, write_down


class Words(NamedTuple):
    """How many words are wrong, missing or too many, and how many there were to hear."""

    errors: int
    said: int

    @property
    def rate(self) -> float:
        return self.errors / self.said


@dataclass(frozen=True)
class Clip:
    """A recording and, where that is known, what is said in it."""

    file: Path
    sha256: str
    text: str | None


@dataclass(frozen=True)
class WordErrors:
    """Clips with their texts, made ready for one processor: a Measure. Takes a megabyte for each half minute."""

    name: str
    clips: Sequence[Clip]
    inputs: Sequence[Inputs]
    left_out: int
    processor: Any
    settings: ScoreSettings

    @classmethod
    def load(cls, path: Path, processor: Any, settings: ScoreSettings | None = None) -> WordErrors:
        """The clips of JSON lines, each {"audio": FILE, "text": "..."}; those without a text are left out."""
        return cls.of(path.name, read_clips(path), processor, settings or ScoreSettings())

    @classmethod
    def of(cls, name: str, clips: Sequence[Clip], processor: Any, settings: ScoreSettings) -> WordErrors:
        """Raises PessaError when no clip has a text, UsageError for a language that Whisper does not know."""
        need("jiwer", "whisper", extra="eval")
        if settings.language is not None and _code(settings.language) not in LANGUAGES:
            raise UsageError(f"--language {settings.language} is none that Whisper knows", "give a code, as en or de")
        told = [clip for clip in clips if clip.text]
        if not told:
            raise PessaError(
                f"none of the {len(clips)} clips of {name} has a text", 'write {"audio": FILE, "text": "..."}'
            )
        chosen = told[settings.first]
        inputs = [listen(processor, load_audio(clip.file)) for clip in chosen]
        return cls(name, chosen, inputs, len(clips) - len(told), processor, settings)

    @property
    def sources(self) -> dict[str, str]:
        return {str(clip.file): clip.sha256 for clip in self.clips}

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """The word error rate over all clips; normalised as Whisper's paper does, appendix C (arXiv:2212.04356)."""
        english = _multilingual(model) is False or _code(self.settings.language) == "en"
        heard = transcribe(model, self.processor, self.inputs, self.settings, progress)
        words = compare_words([clip.text or "" for clip in self.clips], heard, english)
        how = f"greedy decoding, Whisper's {'English' if english else 'basic'} normaliser"
        if self.left_out:
            how += f", {self.left_out} without a text left out"
        counts = {"clips": len(self.clips), "words": words.said, "errors": words.errors}
        return Score("word error rate", how, self.name, words.rate, counts)


def read_clips(path: Path) -> list[Clip]:
    """The clips of JSON lines, with and without a text; their SHA-256 are those that calibration keeps."""
    items, hashes = read_data([path])
    clips = [Clip(item.audio, sha, item.text) for item, sha in zip(items, hashes, strict=False) if item.audio]
    if len(clips) < len(items):
        raise PessaError(f"{path}: {len(items) - len(clips)} lines name no audio", 'write {"audio": FILE, "text": ...}')
    return clips


@torch.inference_mode()
def transcribe(
    model: Any, processor: Any, clips: Sequence[Inputs], settings: ScoreSettings, progress: Progress = quietly
) -> list[str]:
    """What the model writes down of each clip, as `listen` has made it ready."""
    options: dict[str, Any] = {"max_new_tokens": settings.new_tokens or model.config.max_target_positions // 2}
    if settings.language is not None:
        if _multilingual(model):
            options["language"] = _code(settings.language)
        elif _code(settings.language) != "en":
            raise UsageError(f"--language {settings.language}: this model knows English only", "leave it out")
    texts: list[str] = []
    with progress("listening", len(clips), 1) as tick:
        for batch in _batches(clips, settings.batch):
            tokens = write_down(model, {key: torch.cat([clip[key] for clip in batch]) for key in batch[0]}, **options)
            texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
            tick(len(batch), 0)
    return texts


def compare_words(references: Sequence[str], transcripts: Sequence[str], english: bool = True) -> Words:
    """Edit distance over normalised words, clip by clip."""
    from jiwer import process_words

    normal = _normaliser(english)
    found = process_words([normal(text) for text in references], [normal(text) for text in transcripts])
    said = found.hits + found.substitutions + found.deletions
    if not said:
        raise PessaError("the texts of the clips have no words", "give what is said in them")
    return Words(found.substitutions + found.deletions + found.insertions, said)


def _normaliser(english: bool) -> Callable[[str], str]:
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    normal: Callable[[str], str] = EnglishTextNormalizer() if english else BasicTextNormalizer()
    return normal


def _batches(clips: Sequence[Inputs], size: int) -> Iterator[Sequence[Inputs]]:
    """Clips of one window together; those of a length of their own alone."""
    for _, group in groupby(clips, key=lambda clip: clip["input_features"].shape):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _code(language: str | None) -> str | None:
    return None if language is None else str(TO_LANGUAGE_CODE.get(language.lower(), language.lower()))


def _multilingual(model: Any) -> bool:
    return bool(getattr(model.generation_config, "is_multilingual", True))
