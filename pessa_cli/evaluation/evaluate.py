"""`pessa eval`: which measures fit a model, and the models scored by them, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoTokenizer, WhisperProcessor

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.packages import need
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import listed
from pessa_cli.evaluation.measures import Measure, Score, ScoreSettings
from pessa_cli.evaluation.multiple_choice import load_tasks
from pessa_cli.evaluation.perplexity import Perplexity
from pessa_cli.evaluation.similarity import Similarity, embedding_of
from pessa_cli.evaluation.word_errors import WordErrors
from pessa_cli.models.load import from_folder, load, model_class, quiet_transformers
from pessa_cli.sources.open import open_source
from pessa_cli.surgery.model import Model, open_model


@dataclass(frozen=True)
class EvaluationData:
    """What models are scored on, by the name of the option of `pessa eval`."""

    tasks: Sequence[Path] = ()
    speech: Path | None = None
    text: Path | None = None
    pairs: Path | None = None

    @property
    def given(self) -> list[str]:
        return [name for name, value in vars(self).items() if value]


@dataclass(frozen=True)
class Scores:
    """One model's: `kind` of data, as in Data, to what was found on them; and the SHA-256 of the files, by name."""

    model: str
    found: Mapping[str, Sequence[Score]]
    sources: Mapping[str, str]

    @property
    def mean(self) -> float:
        """Of the accuracies, where there are tasks."""
        return fmean(score.value for score in self.found["tasks"])

    def to_dict(self) -> dict[str, Any]:
        """Tasks by their names, everything else, of which there is one each, by its kind."""
        tasks = {score.data: score.to_dict() for score in self.found.get("tasks", ())}
        others = {kind: score.to_dict() for kind, (score, *_) in self.found.items() if kind != "tasks"}
        return {"model": self.model} | ({"tasks": tasks, "mean": self.mean} if tasks else {}) | others


def split_adapter(name: str, adapter: Path | None) -> tuple[str, Path | None]:
    """MODEL+ADAPTER in its parts; a path that is there is one name, whatever is in it."""
    model, plus, own = name.rpartition("+")
    if not plus or Path(name).exists():
        return name, adapter
    if adapter is not None:
        raise UsageError(f"--adapter and {name} both name an adapter", "give one of them")
    return model, Path(own)


def evaluate_models(
    subjects: Sequence[tuple[str, Path | None]],
    data: EvaluationData,
    settings: ScoreSettings,
    revision: str | None = None,
    allow_pickle: bool = False,
    progress: Progress = quietly,
) -> list[Scores]:
    """The scores of each model, with its adapter where one is given, on all data.

    Raises UsageError, before anything runs, when one of the models is of a kind that the data are not for.
    """
    if not data.given:
        raise UsageError("nothing says on what to score the models", "give --tasks, --speech, --text or --pairs")
    with ExitStack() as sources, quiet_transformers():
        models = [open_model(sources.enter_context(open_source(name, revision, allow_pickle))) for name, _ in subjects]
        for model in models:
            _check(model, data)
        return [
            _scores(name, model, adapter, prepare(model, data, settings), settings, progress)
            for (name, adapter), model in zip(subjects, models, strict=True)
        ]


def _scores(
    name: str,
    model: Model,
    adapter: Path | None,
    measures: Mapping[str, Sequence[Measure]],
    settings: ScoreSettings,
    progress: Progress,
) -> Scores:
    loaded = load_with_adapter(model, adapter, settings)
    found = {kind: [measure.score(loaded, progress) for measure in some] for kind, some in measures.items()}
    files = {file: sha for some in measures.values() for measure in some for file, sha in measure.sources.items()}
    return Scores(name if adapter is None else f"{name}+{adapter}", found, files)


def fitting(model: Model) -> tuple[str, ...]:
    """On which data a model can be scored."""
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
        hint = f"give it {' or '.join(f'--{name}' for name in fit)}" if fit else "there is no measure for it yet"
        raise UsageError(f"{options}: not for {model.reader.folder}, a {model_class(model).__name__}", hint)


def prepare(model: Model, data: EvaluationData, settings: ScoreSettings) -> dict[str, list[Measure]]:
    """The measures for models with the tokenizer or processor of this one, by the kind of data."""
    folder = model.reader.folder
    if data.speech is not None:
        processor = from_folder(WhisperProcessor, folder, "preprocessor and tokenizer")
        return {"speech": [WordErrors.load(data.speech, processor, settings)]}
    tokenizer = from_folder(AutoTokenizer, folder, "tokenizer")
    measures: dict[str, list[Measure]] = {}
    if data.tasks:
        measures["tasks"] = [*load_tasks(data.tasks, tokenizer, settings)]
    if data.text is not None:
        measures["text"] = [Perplexity.load(data.text, tokenizer, settings)]
    if data.pairs is not None:
        measures["pairs"] = [
            Similarity.load(data.pairs, tokenizer, settings, embedding_of(folder, model.reader.config))
        ]
    return measures


def load_with_adapter(model: Model, adapter: Path | None, settings: ScoreSettings) -> Any:
    """A model as it is scored."""
    loaded, folder = load(model, getattr(torch, settings.dtype)), model.reader.folder
    if adapter is not None:
        need("peft")
        from peft import PeftModel

        if not (adapter / "adapter_config.json").is_file():
            raise PessaError(f"{adapter} is no adapter: it has no adapter_config.json", "give what `pessa tune` wrote")
        try:
            loaded = PeftModel.from_pretrained(loaded, str(adapter))
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reasons = listed(str(error).splitlines())
            raise PessaError(
                f"{adapter} cannot be put on {folder}\n{reasons}", "give the model that it was tuned on"
            ) from error
    return loaded.to(settings.device).eval()
