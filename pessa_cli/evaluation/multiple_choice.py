"""Multiple choice. A metric is one function from a model and questions to whether each was answered right.

The questions are those that the papers on LoRA, DoRA and PESSA use: an instruction that names its possible answers,
and the one that is right.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import listed
from pessa_cli.evaluation.measures import Score, ScoreSettings
from pessa_cli.models.instructions import Row, read_rows, render

ANSWERS = re.compile(r"Answer format:\s*([^\n]+?)\s*$")
NEW_TOKENS = 16  # of an answer that is generated


@dataclass(frozen=True)
class Question:
    """What is asked, all possible responses, and which of them is right; `answers` is what tells them apart."""

    row: Row
    answers: tuple[str, ...]
    responses: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Task:
    """Questions with the tokenizer of the models that are asked: a Measure. `metric` is a key of METRICS."""

    name: str
    questions: Sequence[Question]
    sources: dict[str, str]
    tokenizer: Any
    settings: ScoreSettings

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """The share of questions that the model answers right."""
        right, count, way = 0, len(self.questions), self.settings.metric
        with progress(self.name, count, 1) as tick, torch.inference_mode():
            for correct in METRICS[way](model, self.tokenizer, self.questions, self.settings):
                right += correct
                tick(1, 0)
        return Score("accuracy", f"by {way}", self.name, right / count, {"questions": count, "right": right})


Metric = Callable[[Any, Any, Sequence[Question], ScoreSettings], Iterator[bool]]


def load_tasks(paths: Sequence[Path], tokenizer: Any, settings: ScoreSettings) -> list[Task]:
    """Tasks from files of questions, or from folders with a test.json or test.jsonl, which then give the names."""
    tasks = []
    for path in paths:
        file = next((path / n for n in ("test.json", "test.jsonl") if (path / n).is_file()), None)
        if path.is_dir() and file is None:
            raise PessaError(f"{path} holds no test.json", "give a file of questions, or a folder with one")
        name, file = (path.name, file) if file else (path.stem, path)
        questions = _questions(file, read_rows(file)[settings.first])
        tasks.append(Task(name, questions, {str(file): sha256_of(file)}, tokenizer, settings))
    return tasks


def _questions(path: Path, rows: Sequence[Row]) -> list[Question]:
    found, wrong = [], []
    for number, row in enumerate(rows, 1):
        named = ANSWERS.search(str(row.get("instruction", "")))
        answers = tuple(named[1].split("/")) if named else ()
        answer, output = row.get("answer"), row.get("output")
        if not (isinstance(answer, str) and isinstance(output, str) and answer in answers and answer in output):
            wrong.append(f"question {number}: {str(row)[:80]}")
            continue
        responses = tuple(output.replace(answer, other) for other in answers)
        found.append(Question(row, answers, responses, answers.index(answer)))
    if wrong:
        raise PessaError(
            f"{len(wrong)} questions of {path} have no answer among those they name\n{listed(wrong)}",
            'a question needs an instruction that ends in "Answer format: a/b", an output and its answer',
        )
    return found


def by_likelihood(model: Any, tokenizer: Any, questions: Sequence[Question], settings: ScoreSettings) -> Iterator[bool]:
    """Right where the right response has the highest mean log-likelihood a token, given the question.

    Responses that differ in their last token only, as "answer1" and "answer2" do, take one pass for all of them.
    """
    for group in _groups(questions, settings.batch):
        contexts: dict[tuple[int, ...], int] = {}
        scored: list[list[tuple[int, list[int]]]] = []  # for each question and response: context, response's tokens
        for question in group:
            scored.append([])
            for response in question.responses:
                ids, first = _tokens({**question.row, "output": response}, tokenizer, settings.template)
                context = contexts.setdefault(tuple(ids[:-1]), len(contexts))
                scored[-1].append((context, ids[first:]))
        longest = max(len(ids) for responses in scored for _, ids in responses)
        logits = _last_logits(model, list(contexts), longest, settings.batch)
        for question, responses in zip(group, scored, strict=True):
            means = []
            for context, ids in responses:
                logprobs = logits[context, longest - len(ids) :].float().log_softmax(-1)  # (tokens, vocabulary)
                means.append(float(logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None]).mean()))
            yield max(range(len(means)), key=means.__getitem__) == question.right


def by_generation(model: Any, tokenizer: Any, questions: Sequence[Question], settings: ScoreSettings) -> Iterator[bool]:
    """Right where the first of the possible answers in what the model writes, greedily, is the right one.

    This is how the evaluation scripts of LLM-Adapters and DoRA count.
    """
    for group in _groups(questions, settings.batch):
        rendered = [render(question.row, tokenizer, settings.template) for question in group]
        prompts = [r.text[: r.spans[-1][0]] for r in rendered]
        rows = [
            tokenizer(p, add_special_tokens=not r.framed)["input_ids"] for p, r in zip(prompts, rendered, strict=True)
        ]
        ids, mask = _left_padded(rows, model.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        written = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad
        )
        for question, tokens in zip(group, written[:, ids.shape[1] :], strict=True):
            said = tokenizer.decode(tokens, skip_special_tokens=True)
            found = re.search("|".join(re.escape(answer) for answer in question.answers), said)
            yield found is not None and found[0] == question.answers[question.right]


METRICS: dict[str, Metric] = {"likelihood": by_likelihood, "generation": by_generation}


def _groups(questions: Sequence[Question], size: int) -> Iterator[Sequence[Question]]:
    """Questions of about the same length together."""
    ordered = sorted(questions, key=lambda question: len(question.row["instruction"]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _tokens(row: Row, tokenizer: Any, template: str) -> tuple[list[int], int]:
    """The tokens up to the end of the response, and at which of them it begins."""
    rendered = render(row, tokenizer, template)
    begin = rendered.spans[-1][0]
    end = begin + len(row["output"])
    found = tokenizer(rendered.text[:end], return_offsets_mapping=True, add_special_tokens=not rendered.framed)
    first = next(i for i, (a, b) in enumerate(found["offset_mapping"]) if a < b and b > begin)
    return found["input_ids"], first


def _last_logits(model: Any, rows: Sequence[Sequence[int]], count: int, batch: int) -> Tensor:
    """What follows each of the last `count` tokens: (rows, count, vocabulary)."""
    found = []
    for start in range(0, len(rows), batch):
        ids, mask = _left_padded(rows[start : start + batch], model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"position_ids": positions, "use_cache": False, "logits_to_keep": count}
        found.append(model(input_ids=ids, attention_mask=mask, **options).logits[:, -count:])
    return torch.cat(found)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and mask, (rows, tokens), filled up on the left, so that all end together."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
