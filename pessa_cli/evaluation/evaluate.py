"""`pessa eval`: decides which measures fit a model, and scores the models one after the other.

Nothing is done twice in one command: each data file is read and hashed once, models with equal tokenizers share the
encoded data, and a model that is scored with and without an adapter is loaded once. Predictions are compared with those
of the first model, which stays in memory beside each of the others: two models and the logits of one clip or window,
whatever the amount of data. Without that comparison only one model is in memory at a time.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoTokenizer, WhisperProcessor

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.files import check_there
from pessa_cli.common.memory import raise_if_out_of_memory
from pessa_cli.common.packages import need
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import listed
from pessa_cli.evaluation.likelihood import First
from pessa_cli.evaluation.measures import Measure, Score, ScoreSettings, TokenMeasure
from pessa_cli.evaluation.multiple_choice import QuestionFile, Task, read_tasks
from pessa_cli.evaluation.perplexity import Documents, Perplexity, read_documents
from pessa_cli.evaluation.similarity import Embedding, SentencePairs, Similarity, embedding_of, read_pairs
from pessa_cli.evaluation.word_errors import Clip, WordErrors, read_clips
from pessa_cli.models.classes import model_class
from pessa_cli.models.load import encodes_alike, from_folder, load, quiet_transformers
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.model import Model, open_model


@dataclass(frozen=True)
class EvaluationData:
    """The files that models are scored on, by the name of the option of `pessa eval`."""

    tasks: Sequence[Path] = ()
    speech: Path | None = None
    text: Path | None = None
    pairs: Path | None = None

    @property
    def given(self) -> list[str]:
        return [name for name, value in vars(self).items() if value]


@dataclass(frozen=True)
class EvaluationItems:
    """The contents of the files of `EvaluationData`, not yet encoded. speech: the name of the file, and its clips."""

    tasks: Sequence[QuestionFile] = ()
    speech: tuple[str, Sequence[Clip]] | None = None
    text: Documents | None = None
    pairs: SentencePairs | None = None

    @property
    def files(self) -> dict[str, Path]:
        """The files of audio and text by their SHA-256, also those of clips that have no reference text."""
        clips = {clip.sha256: clip.file for clip in self.speech[1]} if self.speech is not None else {}
        return clips | ({self.text.sha256: self.text.path} if self.text is not None else {})


@dataclass(frozen=True)
class Scores:
    """The scores of one model.

    found: the scores on each kind of data, by its name in EvaluationData. sources: the SHA-256 of the files, by name.
    notes: what was not measured, and why.
    """

    model: str
    found: Mapping[str, Sequence[Score]]
    sources: Mapping[str, str]
    notes: Sequence[str] = ()

    @property
    def mean(self) -> float:
        """The mean accuracy over the tasks. Needs at least one task."""
        return fmean(score.value for score in self.found["tasks"])

    def beside(self, first: Scores) -> dict[str, list[tuple[Score, Score]]]:
        """By the kind of data, pairs of a score of this model and that of the first one on the same data."""
        return {kind: list(zip(scores, first.found[kind], strict=True)) for kind, scores in self.found.items()}

    def to_dict(self, first: Scores) -> dict[str, Any]:
        """The scores as JSON, with the differences to those of the first model, unless this is it.

        Tasks by their names, every other kind of data, which has one score, by its kind.
        """
        dicts = {
            kind: [score.to_dict(None if first is self else other) for score, other in pairs]
            for kind, pairs in self.beside(first).items()
        }
        tasks = {score["data"]: score for score in dicts.pop("tasks", ())}
        others = {kind: score for kind, (score, *_) in dicts.items()}
        notes = {"notes": list(self.notes)} if self.notes else {}
        return {"model": self.model} | ({"tasks": tasks, "mean": self.mean} if tasks else {}) | others | notes


@dataclass(frozen=True)
class Prepared:
    """Measures by the kind of data, and what encoded their data: a tokenizer or processor, and the pooling of pairs."""

    encoder: Any
    embedding: Embedding | None
    measures: Mapping[str, Sequence[Measure]]


def split_adapter(name: str, adapter: Path | None) -> tuple[str, Path | None]:
    """Split MODEL+ADAPTER into its parts. A path that exists is a model name as a whole, even if it contains a plus.

    Raises UsageError when both `name` and `adapter` give an adapter.
    """
    model, plus, own = name.rpartition("+")
    if not plus or Path(name).exists():
        return name, adapter
    if adapter is not None:
        raise UsageError(f"--adapter {adapter} and {name} both name an adapter", "give only one of them")
    return model, Path(own)


def evaluate_models(
    subjects: Sequence[tuple[str, Path | None]],
    data: EvaluationData,
    settings: ScoreSettings,
    revision: str | None = None,
    allow_pickle: bool = False,
    follow_links: bool = False,
    progress: Progress = quietly,
) -> list[Scores]:
    """Score each model, with its adapter if it has one, on all data.

    Raises UsageError, before any model is loaded, when the data do not fit one of the models.
    """
    if not data.given:
        raise UsageError("no data to score the models on", "give --tasks, --speech, --text or --pairs")
    with ExitStack() as sources, quiet_transformers():
        opened: dict[str, Model] = {}
        for name, _ in subjects:
            if name not in opened:
                opened[name] = open_model(
                    sources.enter_context(open_source(name, revision, allow_pickle, follow_links))
                )
        for model in opened.values():
            _check(model, data)
        items, prepared, scores = read_items(data, settings), None, list[Scores]()
        compared = settings.kl and len(subjects) > 1 and bool({"speech", "text"} & {*data.given})
        loading, first = Loading(settings, compared), dict[str, First]() if compared else None
        for name, adapter in subjects:
            prepared = prepare(opened[name], items, settings, prepared)
            whole = name if adapter is None else f"{name}+{adapter}"
            # No variable here holds the model, which would then be in memory beside the next one.
            scores.append(_scores(whole, loading.load(name, opened[name], adapter), prepared.measures, first, progress))
        return scores


def _scores(
    name: str,
    model: Any,
    measures: Mapping[str, Sequence[Measure]],
    first: dict[str, First] | None,
    progress: Progress,
) -> Scores:
    """Score one model. first: the first model by the kind of data, which is added where it is missing, if compared."""
    found, notes = dict[str, list[Score]](), []
    for kind, some in measures.items():
        found[kind] = []
        for measure in some:
            if not isinstance(measure, TokenMeasure):
                found[kind].append(measure.score(model, progress))
                continue
            passages, reference = measure.passages(model), None if first is None else first.get(kind)
            score = measure.score_tokens(model, passages, reference, progress)
            if score.nats is None:
                notes.append(f"no nats per token of {measure.name} by {name}: all clips are longer than one window")
            elif reference is not None and score.divergence is None:
                notes.append(f"no KL to the first on {measure.name} for {name}: its tokens are not those of the first")
            if first is not None:
                first.setdefault(kind, First(model, passages))
            found[kind].append(score)
    files = {file: sha for some in measures.values() for measure in some for file, sha in measure.sources.items()}
    return Scores(name, found, files, notes)


class Loading:
    """Loads models one after the other, each as often as adapters, which change it, require.

    keep: whether the first model stays in memory beside each of the others. Otherwise only one model is in memory.
    """

    def __init__(self, settings: ScoreSettings, keep: bool) -> None:
        self._settings, self._keep = settings, keep
        self._first: dict[str, Any] = {}  # the first model by its name, if it is kept and has no adapter
        self._last: dict[str, Any] = {}  # the last model by its name, as long as no adapter has been put on it

    def load(self, name: str, model: Model, adapter: Path | None) -> Any:
        """Return a model, with its adapter if it has one, in eval mode on its device."""
        base = self._last.pop(name, None)
        self._last.clear()
        if name in self._first:
            base = self._first[name] if adapter is None else copy.deepcopy(self._first[name])
        if base is None:
            base = load(model, getattr(torch, self._settings.dtype))
        loaded = base if adapter is None else with_adapter(base, model.reader.folder, adapter)
        loaded = loaded.to(self._settings.device).eval()
        if adapter is None:
            (self._first if self._keep else self._last)[name] = loaded
        self._keep = False
        return loaded


def fitting(model: Model) -> tuple[str, ...]:
    """The kinds of data that a model can be scored on, by their names in EvaluationData."""
    kind = model_class(model)
    if kind.main_input_name == "input_features":
        return ("speech",) if kind.can_generate() else ()
    if model.reader.config.get("is_encoder_decoder"):
        return ()
    return ("tasks", "text") if kind.can_generate() else ("pairs",)


def _check(model: Model, data: EvaluationData) -> None:
    fit = fitting(model)
    if wrong := [name for name in data.given if name not in fit]:
        options = " and ".join(f"--{name}" for name in wrong)
        hint = f"give {' or '.join(f'--{name}' for name in fit)}" if fit else "pessa eval has no measure for this class"
        raise UsageError(
            f"{model.reader.folder} is a {model_class(model).__name__}, which cannot be scored on {options}", hint
        )


def read_items(data: EvaluationData, settings: ScoreSettings) -> EvaluationItems:
    """Read and hash every file once. Raises PessaError for files that are missing or malformed."""
    return EvaluationItems(
        tasks=read_tasks(data.tasks, settings),
        speech=None if data.speech is None else (data.speech.name, read_clips(data.speech)),
        text=None if data.text is None else read_documents(data.text),
        pairs=None if data.pairs is None else read_pairs(data.pairs),
    )


def prepare(
    model: Model, items: EvaluationItems, settings: ScoreSettings, previous: Prepared | None = None
) -> Prepared:
    """Encode the data with the tokenizer or processor of a model.

    Returns `previous`, and encodes nothing, when that was made with an equal tokenizer or processor.
    """
    folder = model.reader.folder
    if items.speech is not None:
        encoder, embedding = from_folder(WhisperProcessor, folder, "preprocessor and tokenizer"), None
    else:
        encoder = from_folder(AutoTokenizer, folder, "tokenizer")
        embedding = embedding_of(folder, model.reader.config) if items.pairs is not None else None
    if previous is not None and previous.embedding == embedding and encodes_alike(previous.encoder, encoder):
        return previous
    measures: dict[str, Sequence[Measure]] = {}
    if items.speech is not None:
        measures["speech"] = [WordErrors.of(*items.speech, encoder, settings)]
    if items.tasks:
        measures["tasks"] = [Task.of(file, encoder, settings) for file in items.tasks]
    if items.text is not None:
        measures["text"] = [Perplexity.of(items.text, encoder, settings)]
    if items.pairs is not None and embedding is not None:
        measures["pairs"] = [Similarity.of(items.pairs, encoder, settings, embedding)]
    return Prepared(encoder, embedding, measures)


def with_adapter(base: Any, folder: Path, adapter: Path) -> Any:
    """The model with an adapter on it, on the CPU, where adapters that start from an SVD of the base compute it.

    Changes the modules of `base`. `folder` is that of the base, for messages. Raises PessaError when the adapter's
    folder has no adapter_config.json, or when PEFT cannot put all of the adapter on this model.
    """
    need("peft")
    from peft import PeftModel, get_peft_model_state_dict

    check_there(adapter, "give a folder that `pessa tune` wrote")
    if not (adapter / "adapter_config.json").is_file():
        raise PessaError(
            f"{adapter} is not an adapter: it has no adapter_config.json", "give a folder that `pessa tune` wrote"
        )
    try:
        model = PeftModel.from_pretrained(base.to("cpu"), str(adapter))
    except (ValueError, TypeError, KeyError, RuntimeError, re.error) as error:
        raise_if_out_of_memory(error, f"put the adapter {adapter} on {folder}")
        reasons = listed(str(error).splitlines())
        raise PessaError(
            f"the adapter {adapter} does not fit {folder}\n{reasons}", "give the model that the adapter was tuned on"
        ) from error
    weights = adapter / "adapter_model.safetensors"
    if weights.is_file():  # PEFT passes over weights of modules that the model does not have
        with safe_open(weights, "pt") as file:
            stored = set(file.keys())
        taken = {*get_peft_model_state_dict(model, save_embedding_layers=False), *model.state_dict()}
        if lost := sorted(stored - taken):
            raise PessaError(
                f"the adapter {adapter} does not fit {folder}, which has no place for these weights\n{listed(lost)}",
                "give the model that the adapter was tuned on",
            )
    return model
