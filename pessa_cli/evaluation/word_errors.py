"""Word error rate: the transcripts of a speech model compared with reference texts, and how likely it finds those."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.packages import need
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.evaluation.figures import ratio
from pessa_cli.evaluation.likelihood import First, Passage, likelihoods
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
    """A `TokenMeasure`: clips encoded with one processor, with their texts. Takes 1 MB of memory per 30 seconds."""

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
        counted = count_words([clip.text or "" for clip in self.clips], transcripts, english)
        how = f"greedy decoding, Whisper's {'English' if english else 'basic'} normaliser"
        if self.left_out:
            how += f", {self.left_out} without a text left out"
        errors, words = zip(*counted, strict=True)
        counts = {"clips": len(self.clips), "words": sum(words), "errors": sum(errors)}
        return Score("word error rate", how, self.name, counts, ratio(errors, words))

    def score_tokens(
        self, model: Any, passages: Sequence[Passage], first: First | None = None, progress: Progress = quietly
    ) -> Score:
        """Compute the word error rate, the nats per token of the reference texts, and their divergence."""
        score = self.score(model, progress)
        if not passages:
            return score
        found = likelihoods(model, passages, first, "reference texts", progress)
        about = f"{found.tokens.sum():,} tokens of the reference texts of {len(passages)} clips of at most one window"
        return replace(score, nats=found.nats_per_token, divergence=found.divergence_per_token, about_nats=about)

    @torch.inference_mode()
    def passages(self, model: Any) -> list[Passage]:
        """The clips of at most one window, with their texts as the decoder's input after the tokens that begin one.

        A text is encoded as it is, or in lower case if all of it is in upper case, as some data sets write every text.
        It is cut to the model's positions; the token that ends it is not predicted. A longer clip is transcribed in
        windows, and which part of its text belongs to which is not known.
        """
        tokenizer, found = self.processor.tokenizer, []
        for clip, given in zip(self.clips, self.inputs, strict=True):
            features = given["input_features"]
            if features.shape[-1] > 2 * model.config.max_source_positions:
                continue
            prompt = self._prompt(model, features)
            text = (clip.text or "").strip()
            spoken = f" {text.lower() if text.isupper() else text}"
            ids = torch.tensor([prompt + tokenizer(spoken, add_special_tokens=False)["input_ids"]])[
                :, : model.config.max_target_positions + 1
            ]
            inputs = {"input_features": features, "decoder_input_ids": ids[:, :-1]}
            found.append(Passage(inputs, ids[0, len(prompt) :]))
        return found

    def _prompt(self, model: Any, features: Tensor) -> list[int]:
        """The tokens that begin a transcript without timestamps, as generate gives them to the model.

        Without a language in the settings, a multilingual model detects it.
        """
        of, code = self.processor.tokenizer.convert_tokens_to_ids, _code(self.settings.language)
        start, end = of("<|startoftranscript|>"), of("<|notimestamps|>")
        if not _multilingual(model):
            return [start, end]
        if code is None:
            language = int(model.detect_language(input_features=features.to(model.device, model.dtype)))
        else:
            language = of(f"<|{code}|>")
        return [start, language, of("<|transcribe|>"), end]


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
    """Count the word errors of all clips together; see `count_words`."""
    return WordCounts(*map(sum, zip(*count_words(references, transcripts, english), strict=True)))


def count_words(references: Sequence[str], transcripts: Sequence[str], english: bool = True) -> list[WordCounts]:
    """Count the word errors of each clip by the edit distance of normalised words.

    Raises PessaError when the references contain no words.
    """
    from jiwer import process_words

    normal, counted = _normaliser(english), []
    for reference, transcript in zip(references, transcripts, strict=True):
        found = process_words(normal(reference), normal(transcript))
        errors = found.substitutions + found.deletions + found.insertions
        counted.append(WordCounts(errors, found.hits + found.substitutions + found.deletions))
    if not any(words for _, words in counted):
        raise PessaError("the reference texts of the clips contain no words", "give the transcript of each clip")
    return counted


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
