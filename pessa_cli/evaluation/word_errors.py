"""Word error rate: the transcripts of a speech model compared with reference texts."""

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
from pessa_cli.models.inputs import Inputs, clip_features, transcribe_greedily


class WordCounts(NamedTuple):
    """The number of substituted, deleted and inserted words, and the number of words in the reference texts."""

    errors: int
    words: int

    @property
    def rate(self) -> float:
        return self.errors / self.words


@dataclass(frozen=True)
class Clip:
    """An audio file with its SHA-256 and, if known, its reference text."""

    file: Path
    sha256: str
    text: str | None


@dataclass(frozen=True)
class WordErrors:
    """A `Measure`: clips encoded with one processor, with their texts. Takes 1 MB of memory per 30 seconds."""

    name: str
    clips: Sequence[Clip]
    inputs: Sequence[Inputs]
    left_out: int
    processor: Any
    settings: ScoreSettings

    @classmethod
    def load(cls, path: Path, processor: Any, settings: ScoreSettings | None = None) -> WordErrors:
        """Read JSON lines, each {"audio": FILE, "text": "..."}, and encode the clips that have a text."""
        return cls.of(path.name, read_clips(path), processor, settings or ScoreSettings())

    @classmethod
    def of(cls, name: str, clips: Sequence[Clip], processor: Any, settings: ScoreSettings) -> WordErrors:
        """Encode the clips that have a text, at most the first `settings.limit` of them.

        Raises PessaError when no clip has a text, UsageError for a language that Whisper does not know.
        """
        need("jiwer", "whisper", extra="eval")
        if settings.language is not None and _code(settings.language) not in LANGUAGES:
            raise UsageError(
                f"--language {settings.language} is not a language of Whisper", "give a code, for example en or de"
            )
        with_text = [clip for clip in clips if clip.text]
        if not with_text:
            raise PessaError(
                f"none of the {len(clips)} clips of {name} has a text",
                'write JSON lines: {"audio": FILE, "text": "..."}',
            )
        chosen = with_text[settings.first]
        inputs = [clip_features(processor, load_audio(clip.file)) for clip in chosen]
        return cls(name, chosen, inputs, len(clips) - len(with_text), processor, settings)

    @property
    def sources(self) -> dict[str, str]:
        return {str(clip.file): clip.sha256 for clip in self.clips}

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Compute the word error rate over all clips, with Whisper's text normaliser (arXiv:2212.04356, appendix C)."""
        english = _multilingual(model) is False or _code(self.settings.language) == "en"
        transcripts = transcribe(model, self.processor, self.inputs, self.settings, progress)
        counted = compare_words([clip.text or "" for clip in self.clips], transcripts, english)
        how = f"greedy decoding, Whisper's {'English' if english else 'basic'} normaliser"
        if self.left_out:
            how += f", {self.left_out} without a text left out"
        counts = {"clips": len(self.clips), "words": counted.words, "errors": counted.errors}
        return Score("word error rate", how, self.name, counted.rate, counts)


def read_clips(path: Path) -> list[Clip]:
    """Read the clips of JSON lines, with and without a text.

    Their SHA-256 can be compared with those in a statistics file. Raises PessaError for lines without audio.
    """
    items, _ = read_data([path])
    clips = [Clip(item.audio, item.sha256, item.text) for item in items if item.audio]
    if len(clips) < len(items):
        raise PessaError(
            f"{path}: {len(items) - len(clips)} lines name no audio", 'write {"audio": FILE, "text": "..."}'
        )
    return clips


@torch.inference_mode()
def transcribe(
    model: Any, processor: Any, clips: Sequence[Inputs], settings: ScoreSettings, progress: Progress = quietly
) -> list[str]:
    """Transcribe clips, each encoded by `clip_features`, under greedy decoding; returns one text per clip.

    Raises UsageError when the settings ask an English-only model for another language.
    """
    options: dict[str, Any] = {"max_new_tokens": settings.new_tokens or model.config.max_target_positions // 2}
    if settings.language is not None:
        if _multilingual(model):
            options["language"] = _code(settings.language)
        elif _code(settings.language) != "en":
            raise UsageError(f"--language {settings.language}: this model is English only", "leave --language out")
    texts: list[str] = []
    with progress("transcribing", 0, len(clips)) as tick:
        for batch in _batches(clips, settings.batch):
            inputs = {key: torch.cat([clip[key] for clip in batch]) for key in batch[0]}
            tokens = transcribe_greedily(model, inputs, **options)
            texts += [text.strip() for text in processor.batch_decode(tokens, skip_special_tokens=True)]
            tick(0, len(batch))
    return texts


def compare_words(references: Sequence[str], transcripts: Sequence[str], english: bool = True) -> WordCounts:
    """Count word errors by the edit distance of normalised words, clip by clip.

    Raises PessaError when the references contain no words.
    """
    from jiwer import process_words

    normal = _normaliser(english)
    found = process_words([normal(text) for text in references], [normal(text) for text in transcripts])
    words = found.hits + found.substitutions + found.deletions
    if not words:
        raise PessaError("the reference texts of the clips contain no words", "give the transcript of each clip")
    return WordCounts(found.substitutions + found.deletions + found.insertions, words)


def _normaliser(english: bool) -> Callable[[str], str]:
    from whisper.normalizers import BasicTextNormalizer, EnglishTextNormalizer

    normal: Callable[[str], str] = EnglishTextNormalizer() if english else BasicTextNormalizer()
    return normal


def _batches(clips: Sequence[Inputs], size: int) -> Iterator[Sequence[Inputs]]:
    """Consecutive clips with features of the same shape, at most `size` at a time; longer clips have other shapes."""
    for _, group in groupby(clips, key=lambda clip: clip["input_features"].shape):
        alike = list(group)
        for start in range(0, len(alike), size):
            yield alike[start : start + size]


def _code(language: str | None) -> str | None:
    return None if language is None else str(TO_LANGUAGE_CODE.get(language.lower(), language.lower()))


def _multilingual(model: Any) -> bool:
    return bool(getattr(model.generation_config, "is_multilingual", True))
