"""The data of scripts/reproduce.py: what a model is calibrated on, and how it is scored on other data.

Each function of DATA returns folds: files to calibrate on, and a score on what is not in them. The figures of several
folds are computed over the items of all of them together.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from speech_scores import Sums, original, score
from text_baselines import spaced
from transformers import AutoTokenizer, WhisperProcessor

from pessa_cli.evaluation.figures import Figure
from pessa_cli.evaluation.likelihood import likelihoods
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.perplexity import Perplexity
from pessa_cli.evaluation.similarity import Similarity, embedding_of
from pessa_cli.evaluation.word_errors import Clip, read_clips
from pessa_cli.models.load import load
from pessa_cli.surgery.model import open_model

KL, NATS, WORDS, OTHER, SPEARMAN = "KL", "nats", "word errors", "nats of the other text", "Spearman correlation"
CHARACTERS = 45_000  # of the end of the text, to calibrate attention on
WINDOWS = 20  # from its beginning, to score on
TOKENS = 61_000  # of one half of the text, to calibrate attention and MLPs on
WINDOW = 512
EVERY_TOPIC = 6  # of the topics of Python's documentation, one in the other text
EVERY_PAIR = 5  # of the pairs, one to calibrate on: the file goes from genre to genre
Found = Mapping[str, Sums | Figure]


@dataclass(frozen=True)
class Fold:
    """Calibration files, and the score of a loaded model on other data, by the names above; the first one is shown."""

    calibration: Sequence[Path]
    score: Callable[[Any], Found]


@dataclass(frozen=True)
class Places:
    """Where the data are, and where derived files are written. speech: a folder of scripts/speech_data.py, or None.

    windows: the number of windows of each text to score, evenly spaced; 0 for all.
    """

    data: Path
    out: Path
    speech: Path | None = None
    windows: int = 0


def figures(found: Sequence[Found]) -> dict[str, Figure]:
    """The figures of all folds together. Only sums can be of more than one fold."""
    together: dict[str, Figure] = {}
    for name, one in found[0].items():
        if isinstance(one, Figure):
            together[name] = one
        else:
            parts = [each for fold in found if isinstance(each := fold[name], Sums)]
            sums, counts = ([value for part in parts for value in part[i]] for i in (0, 1))
            together[name] = Sums(sums, [int(each) for each in counts]).figure
    return together


def speech(places: Places, source: Path) -> list[Fold]:
    """Speech of the folder that is given, or two halves of a few clips, each scored by models of the other half."""
    if places.speech is None:
        clips = read_clips(places.data / "speech" / "clips.jsonl")
        parts = [(clips[0::2], clips[1::2]), (clips[1::2], clips[0::2])]
    else:
        heard, scored = (read_clips(places.speech / each / "clips.jsonl") for each in ("calibrate", "score"))
        parts = [(heard, scored)]
    return [_speech_fold(heard, scored, source) for heard, scored in parts]


def _speech_fold(heard: Sequence[Clip], scored: Sequence[Clip], source: Path) -> Fold:
    if common := {clip.sha256 for clip in heard} & {clip.sha256 for clip in scored}:
        raise SystemExit(f"{len(common)} clips would be scored that the model is calibrated on")
    of = original(load(open_model(source)), WhisperProcessor.from_pretrained(source), scored)

    def scores(model: Any) -> Found:
        found = score(model, of)
        assert found.words is not None
        return {KL: found.kl, NATS: found.nats, WORDS: found.words}

    return Fold([clip.file for clip in heard], scores)


def text(places: Places, source: Path) -> list[Fold]:
    """The end of a text to calibrate on, and windows from its beginning."""
    known = _text(places)
    beginning, end = places.out / "text-beginning.txt", places.out / "text-end.txt"
    beginning.write_text(known[:-CHARACTERS], encoding="utf-8")
    end.write_text(known[-CHARACTERS:], encoding="utf-8")
    return [Fold([end], _text_scores({NATS: beginning}, source, ScoreSettings(limit=WINDOWS)))]


def text_halves(places: Places, source: Path) -> list[Fold]:
    """TOKENS of one half of a text to calibrate on, the other half, and a text of another kind."""
    lines = _text(places).splitlines(keepends=True)
    names = ("text-calibrate.txt", "text-score.txt", "text-other.txt")
    calibrate, scored, other = (places.out / name for name in names)
    half = "".join(lines[: len(lines) // 2])
    ends = AutoTokenizer.from_pretrained(source)(half, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    kept = TOKENS // WINDOW * WINDOW
    calibrate.write_text(half[: ends[kept - 1][1]], encoding="utf-8")
    scored.write_text("".join(lines[len(lines) // 2 :]), encoding="utf-8")
    other.write_text("\n\n".join(topics[name] for name in sorted(topics)[::EVERY_TOPIC]), encoding="utf-8")
    settings = ScoreSettings(window=WINDOW, stride=WINDOW)
    return [Fold([calibrate], _text_scores({NATS: scored, OTHER: other}, source, settings, places.windows))]


def _text(places: Places) -> str:
    return (places.data / "text" / "wikitext2-valid.txt").read_text(encoding="utf-8")


def _text_scores(
    files: Mapping[str, Path], source: Path, settings: ScoreSettings, windows: int = 0
) -> Callable[[Any], Found]:
    tokenizer = AutoTokenizer.from_pretrained(source)
    measures = {name: Perplexity.load(file, tokenizer, settings) for name, file in files.items()}

    def scores(model: Any) -> Found:
        passages = {name: spaced(each.passages(model), windows) for name, each in measures.items()}
        found = {name: likelihoods(model, some, None, name) for name, some in passages.items()}
        return {name: Sums(one.nats.tolist(), one.tokens.tolist()) for name, one in found.items()}

    return scores


def pairs(places: Places, source: Path) -> list[Fold]:
    """Sentences of every few pairs to calibrate on, unless they are in another pair, and the other pairs."""
    with (places.data / "text" / "stsb-en-dev.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    others = [row for number, row in enumerate(rows) if number % EVERY_PAIR]
    there = {sentence for row in others for sentence in row[:2]}
    sentences = dict.fromkeys(sentence for row in rows[::EVERY_PAIR] for sentence in row[:2] if sentence not in there)
    calibration, scored = places.out / "sentences.jsonl", places.out / "pairs.csv"
    calibration.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in sentences), encoding="utf-8")
    with scored.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(others)
    embedding = embedding_of(source, open_model(source).reader.config)
    measure = Similarity.load(scored, AutoTokenizer.from_pretrained(source), ScoreSettings(batch=32), embedding)
    return [Fold([calibration], lambda model: {SPEARMAN: measure.score(model).figure})]
