"""Multiple-choice tasks: the share of questions that a language model answers correctly.

The questions have the form of the data sets in the papers on LoRA, DoRA and PESSA: an instruction that lists its
possible answers, and the correct one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pessa_cli.checkpoint.files import sha256_of
from pessa_cli.common.errors import PessaError
from pessa_cli.common.progress import Progress, quietly
from pessa_cli.common.text import listed
from pessa_cli.evaluation.figures import ratio
from pessa_cli.evaluation.measures import Score, ScoreSettings
from pessa_cli.models.instructions import Row, read_rows, render

ANSWERS = re.compile(r"Answer format:\s*([^\n]+?)\s*$")
NEW_TOKENS = 16  # generated per answer, with --metric generation
Ids = NDArray[np.int32]  # token ids, (tokens,)


@dataclass(frozen=True)
class Question:
    """A question, its possible answers, the full response for each answer, and the index of the correct one."""

    row: Row
    answers: tuple[str, ...]
    responses: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class QuestionFile:
    """The questions of one file, not yet encoded. name: of the task. sources: the SHA-256 of the file, by its name."""

    name: str
    questions: Sequence[Question]
    sources: dict[str, str]


class Metric(NamedTuple):
    """How a model is asked: `encode` turns a question into token ids, `judge` yields whether each answer is correct.

    `judge` takes the model, the tokenizer and the questions with their token ids.
    """

    encode: Callable[[Question, Any, str], Any]
    judge: Callable[[Any, Any, Sequence[tuple[Question, Any]], ScoreSettings], Iterator[bool]]


@dataclass(frozen=True)
class Task:
    """A `Measure`: the questions of one file, encoded with one tokenizer for the metric of the settings."""

    name: str
    questions: Sequence[Question]
    encoded: Sequence[Any]  # for each question, what the metric's `encode` returns
    sources: dict[str, str]
    tokenizer: Any
    settings: ScoreSettings

    @classmethod
    def of(cls, file: QuestionFile, tokenizer: Any, settings: ScoreSettings) -> Task:
        """Encode the questions of a file."""
        encode = METRICS[settings.metric].encode
        encoded = [encode(question, tokenizer, settings.template) for question in file.questions]
        return cls(file.name, file.questions, encoded, file.sources, tokenizer, settings)

    def score(self, model: Any, progress: Progress = quietly) -> Score:
        """Compute the share of questions that the model answers correctly."""
        right: list[bool] = []
        way, both = self.settings.metric, list(zip(self.questions, self.encoded, strict=True))
        with progress(self.name, 0, len(both)) as tick, torch.inference_mode():
            for correct in METRICS[way].judge(model, self.tokenizer, both, self.settings):
                right.append(correct)
                tick(0, 1)
        counts = {"questions": len(right), "right": sum(right)}
        return Score("accuracy", f"by {way}", self.name, counts, ratio(right, [1] * len(right)))


def load_tasks(paths: Sequence[Path], tokenizer: Any, settings: ScoreSettings) -> list[Task]:
    """Read and encode tasks; see `read_tasks` for their form and for the errors."""
    return [Task.of(file, tokenizer, settings) for file in read_tasks(paths, settings)]


def read_tasks(paths: Sequence[Path], settings: ScoreSettings) -> list[QuestionFile]:
    """Read files of questions, or folders with a test.json or test.jsonl, which then give the task its name.

    Raises PessaError for a folder without such a file, and for questions of another form.
    """
    tasks = []
    for path in paths:
        file = next((path / n for n in ("test.json", "test.jsonl") if (path / n).is_file()), None)
        if path.is_dir() and file is None:
            raise PessaError(
                f"{path} contains neither test.json nor test.jsonl", "give a file of questions, or a folder with one"
            )
        name, file = (path.name, file) if file else (path.stem, path)
        questions = _questions(file, read_rows(file)[settings.first])
        tasks.append(QuestionFile(name, questions, {str(file): sha256_of(file)}))
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
            f"{len(wrong)} questions of {path} have an answer that their instruction does not list\n{listed(wrong)}",
            'give each question an instruction that ends in "Answer format: a/b", an output, and the answer in it',
        )
    return found


def encode_responses(question: Question, tokenizer: Any, template: str) -> list[tuple[Ids, int]]:
    """For each possible response: the token ids of prompt and response, and the index where the response begins."""
    rows = ({**question.row, "output": response} for response in question.responses)
    return [_tokens(row, tokenizer, template) for row in rows]


def by_likelihood(
    model: Any,
    tokenizer: Any,  # noqa: ARG001
    questions: Sequence[tuple[Question, list[tuple[Ids, int]]]],
    settings: ScoreSettings,
) -> Iterator[bool]:
    """A question counts when the correct response has the highest mean log-likelihood per token, given the prompt.

    Responses that differ only in their last token, such as "answer1" and "answer2", share one row of the batch.
    """
    for group in _groups(questions, settings.batch):
        contexts: dict[tuple[int, ...], int] = {}
        scored: list[list[tuple[int, list[int]]]] = []  # per question and response: row of the batch, response's tokens
        for _, encoded in group:
            scored.append([])
            for ids, first in encoded:
                context = contexts.setdefault(tuple(ids[:-1].tolist()), len(contexts))
                scored[-1].append((context, ids[first:].tolist()))
        longest = max(len(ids) for responses in scored for _, ids in responses)
        logits = _last_logits(model, list(contexts), longest, settings.batch)
        for (question, _), responses in zip(group, scored, strict=True):
            means = []
            for context, ids in responses:
                logprobs = logits[context, longest - len(ids) :].float().log_softmax(-1)  # (tokens, vocabulary)
                means.append(float(logprobs.gather(1, torch.tensor(ids, device=logprobs.device)[:, None]).mean()))
            yield max(range(len(means)), key=means.__getitem__) == question.right


def encode_prompt(question: Question, tokenizer: Any, template: str) -> Ids:
    """The token ids of the prompt, up to where the response begins."""
    rendered = render(question.row, tokenizer, template)
    prompt = rendered.text[: rendered.spans[-1][0]]
    return np.array(tokenizer(prompt, add_special_tokens=not rendered.framed)["input_ids"], dtype=np.int32)


def by_generation(
    model: Any, tokenizer: Any, questions: Sequence[tuple[Question, Ids]], settings: ScoreSettings
) -> Iterator[bool]:
    """A question counts when the first possible answer in the greedily generated text is the correct one.

    The evaluation scripts of LLM-Adapters (arXiv:2304.01933) and DoRA (arXiv:2402.09353) count this way.
    """
    for group in _groups(questions, settings.batch):
        ids, mask = _left_padded([prompt.tolist() for _, prompt in group], model.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        generated = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=pad
        )
        for (question, _), tokens in zip(group, generated[:, ids.shape[1] :], strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            found = re.search("|".join(re.escape(answer) for answer in question.answers), text)
            yield found is not None and found[0] == question.answers[question.right]


METRICS: dict[str, Metric] = {
    "likelihood": Metric(encode_responses, by_likelihood),
    "generation": Metric(encode_prompt, by_generation),
}


def _groups(questions: Sequence[tuple[Question, Any]], size: int) -> Iterator[Sequence[tuple[Question, Any]]]:
    """Batches of questions with instructions of similar length, so that little padding is needed."""
    ordered = sorted(questions, key=lambda pair: len(pair[0].row["instruction"]))
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _tokens(row: Row, tokenizer: Any, template: str) -> tuple[Ids, int]:
    """The token ids up to the end of the response, and the index of the response's first token."""
    rendered = render(row, tokenizer, template)
    begin = rendered.spans[-1][0]
    end = begin + len(row["output"])
    found = tokenizer(rendered.text[:end], return_offsets_mapping=True, add_special_tokens=not rendered.framed)
    first = next(i for i, (a, b) in enumerate(found["offset_mapping"]) if a < b and b > begin)
    return np.array(found["input_ids"], dtype=np.int32), first


def _last_logits(model: Any, rows: Sequence[Sequence[int]], count: int, batch: int) -> Tensor:
    """The logits after each of the last `count` tokens of every row: (rows, count, vocabulary)."""
    found = []
    for start in range(0, len(rows), batch):
        ids, mask = _left_padded(rows[start : start + batch], model.device)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        options = {"position_ids": positions, "use_cache": False, "logits_to_keep": count}
        found.append(model(input_ids=ids, attention_mask=mask, **options).logits[:, -count:])
    return torch.cat(found)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, (rows, tokens), padded on the left so that all rows end at the same position."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
