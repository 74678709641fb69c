"""Reading instructions, completions and conversations, and rendering them as texts with the spans of the answers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pessa_cli.common.errors import PessaError
from pessa_cli.common.files import file_size
from pessa_cli.common.text import listed

ALPACA = (
    "Below is an instruction that describes a task{with_input}. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n{input}### Response:\n"
)
FORMS = (
    ("messages",),
    ("prompt", "completion"),
    ("instruction", "output"),
    ("audio", "text"),
    ("file", "text"),
    ("text",),
)
EXAMPLE_FILES = "give a .json or .jsonl file"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A text, the (start, end) characters of the spans to learn, and whether it already contains special tokens."""

    text: str
    spans: tuple[tuple[int, int], ...]
    framed: bool = False


def read_rows(path: Path) -> list[Row]:
    """Read the examples of a JSON array or of JSON lines.

    Raises PessaError when the file is unreadable or empty, and lists examples whose keys are none of FORMS.
    """
    try:
        file_size(path)
        text = path.read_text(encoding="utf-8")
        rows = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    except FileNotFoundError as error:
        raise PessaError(f"{path} does not exist", EXAMPLE_FILES) from error
    except (OSError, ValueError, RecursionError) as error:
        raise PessaError(f"{path} cannot be read as examples: {error}", EXAMPLE_FILES) from error
    wrong = [f"example {i}: {json.dumps(row)[:80]}" for i, row in enumerate(rows, 1) if form_of(row) is None]
    if wrong or not rows:
        known = "; ".join(", ".join(form) for form in FORMS)
        what = f"{len(wrong)} examples of {path} have unknown keys\n{listed(wrong)}" if wrong else f"{path} is empty"
        raise PessaError(what, f"give each example one of these sets of keys, with strings as values: {known}")
    return rows


def _lines(text: str) -> list[Any]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return rows


def form_of(row: Any) -> tuple[str, ...] | None:
    """The entry of FORMS that a row has, or None for a row of another form."""
    if not isinstance(row, dict):
        return None
    for form in FORMS:
        if all(key in row for key in form):
            strings = form == ("messages",) or all(isinstance(row[key], str) for key in form)
            return form if strings else None
    return None


def render(row: Row, tokenizer: Any, template: str) -> Rendered:
    """Render an example as a text with the spans to learn.

    template: "chat" renders instructions with the tokenizer's chat template, "alpaca" with that of Alpaca. Raises
    PessaError when the chat template fails or does not keep earlier turns unchanged.
    """
    form = form_of(row)
    if form == ("messages",):
        return _conversation(row["messages"], tokenizer)
    if form == ("text",):
        return Rendered(row["text"], ((0, len(row["text"])),))
    if form == ("prompt", "completion"):
        prompt, completion = row["prompt"], row["completion"]
    else:
        prompt, completion = instruction(row), row["output"]
        if template == "chat":
            asked = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
            turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": completion}]
            return _conversation(turns, tokenizer)
    return Rendered(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))


def instruction(row: Row) -> str:
    """The prompt of an instruction in the Alpaca template, as in LLM-Adapters (arXiv:2304.01933)."""
    more = row.get("input") or ""
    with_input = ", paired with an input that provides further context" if more else ""
    return ALPACA.format(
        with_input=with_input, instruction=row["instruction"], input=f"### Input:\n{more}\n\n" if more else ""
    )


def _conversation(messages: Any, tokenizer: Any) -> Rendered:
    """Render a conversation with the chat template. A span is what an assistant turn adds to the text before it."""

    def text(turns: int, prompt: bool = False) -> str:
        rendered: str = tokenizer.apply_chat_template(messages[:turns], tokenize=False, add_generation_prompt=prompt)
        return rendered

    try:
        whole = text(len(messages))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = [(text(i, prompt=True), text(i + 1)) for i in turns]
    except Exception as error:  # a template is a program and can raise any type
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise PessaError(
            f"the tokenizer's chat template fails on {str(messages)[:80]}: {reason}",
            "check the roles and contents of the messages, or give the data as prompt and completion",
        ) from error
    if not all(whole.startswith(after) and after.startswith(before) for before, after in spans):
        raise PessaError(
            "the tokenizer's chat template renders earlier turns differently once later turns follow",
            "give the data as prompt and completion",
        )
    return Rendered(whole, tuple((len(before), len(after)) for before, after in spans), framed=True)
