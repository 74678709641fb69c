"""Encoding training examples as token ids and labels.

`models.instructions` renders every form of example as a text with the spans to learn. Here the text is tokenised, and
tokens outside the spans get a label that the loss ignores.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.models.instructions import Rendered, Row, render
from pessa_cli.tuning.options import DataOptions

MASKED = -100  # the label that the loss ignores
Tokens = dict[str, NDArray[np.int64]]


def encode(rendered: Rendered, tokenizer: Any, options: DataOptions) -> Tokens:
    """Encode one example as token ids and labels, (tokens,) each, truncated to `max_length`.

    The label of the first token is masked, because it has no context.
    """
    found = tokenizer(rendered.text, return_offsets_mapping=True, add_special_tokens=not rendered.framed)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    # A token belongs to the span that it ends in: a token across the border contains the start of the answer.
    learned = [start < end and any(a < end <= b for a, b in rendered.spans) for start, end in offsets]
    if not rendered.framed and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        learned.append(True)
    input_ids = np.array(ids[: options.max_length], dtype=np.int64)
    keep = np.array(learned[: options.max_length]) if options.mask_prompt else np.ones(len(input_ids), dtype=bool)
    keep[0] = False
    return {"input_ids": input_ids, "labels": np.where(keep, input_ids, MASKED)}


def encode_text(path: Path, rows: Sequence[Row], tokenizer: Any, options: DataOptions) -> list[Tokens]:
    """Encode examples, packed if the options say so.

    Examples whose answers all begin after `max_length` tokens are left out. Raises PessaError when none remain and when
    the tokenizer gives no offsets, UsageError for the chat template of a tokenizer without one.
    """
    if not tokenizer.is_fast:
        raise PessaError(
            "the model's tokenizer gives no character offsets", "add the tokenizer.json of the original model"
        )
    if options.template == "chat" and not tokenizer.chat_template:
        raise UsageError("--template chat: the model's tokenizer has no chat template", "use --template alpaca")
    encoded = [encode(render(row, tokenizer, options.template), tokenizer, options) for row in rows]
    kept = [tokens for tokens in encoded if (tokens["labels"] != MASKED).any()]
    if not kept:
        raise PessaError(f"no answer in {path} begins within {options.max_length} tokens", "give a larger --max-length")
    return pack(kept, options.max_length) if options.packing else kept


def pack(rows: Sequence[Tokens], length: int) -> list[Tokens]:
    """Combine whole examples into rows of at most `length` tokens, by best-fit decreasing.

    position_ids restart at 0 with each example, by which transformers' attention masks separate the examples.
    """
    free: list[tuple[int, int]] = []  # (remaining tokens, index of the row), sorted
    packed: list[list[Tokens]] = []
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        at = bisect_left(free, (size, 0))
        room, which = free.pop(at) if at < len(free) else (length, len(packed))
        if which == len(packed):
            packed.append([])
        packed[which].append(row | {"position_ids": np.arange(size)})
        insort(free, (room - size, which))
    return [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in packed]


def collate_text(pad: int) -> Callable[[list[Tokens]], dict[str, Tensor]]:
    """A collator that pads rows on the right with `pad`. Packed rows get position_ids instead of an attention_mask."""

    def collate(rows: list[Tokens]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": pad, "labels": MASKED}
        batch = {
            key: torch.tensor(np.stack([_filled(row[key], width, value) for row in rows]))
            for key, value in fill.items()
        }
        if "position_ids" in rows[0]:
            # The padding has positions from 0, so it is one more example, which no other example attends to.
            positions = [np.concatenate([r["position_ids"], np.arange(width - len(r["input_ids"]))]) for r in rows]
            return batch | {"position_ids": torch.tensor(np.stack(positions))}
        mask = [_filled(np.ones_like(row["input_ids"]), width, 0) for row in rows]
        return batch | {"attention_mask": torch.tensor(np.stack(mask))}

    return collate


def _filled(values: NDArray[np.int64], width: int, value: int) -> NDArray[np.int64]:
    return np.pad(values, (0, width - len(values)), constant_values=value)


class SpeechData(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Clips with their transcripts. Audio is read when a row is requested.

    A row has input_features (mels, frames) and labels (tokens,). Raises PessaError for missing clips, and when a
    requested clip is longer than the model's window.
    """

    def __init__(self, path: Path, rows: Sequence[Row], processor: Any, options: DataOptions) -> None:
        self._clips = [(path.parent / (row.get("audio") or row["file"]), row["text"]) for row in rows]
        missing = [str(clip) for clip, _ in self._clips if not clip.is_file()]
        if missing:
            raise PessaError(
                f"{len(missing)} clips of {path} do not exist\n{listed(missing)}",
                "correct the paths; they are relative to the data file",
            )
        self._processor, self._options = processor, options
        if options.language is not None:
            processor.tokenizer.set_prefix_tokens(language=options.language, task="transcribe")

    def __len__(self) -> int:
        return len(self._clips)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        path, text = self._clips[i]
        samples, longest = load_audio(path), self._processor.feature_extractor.n_samples
        if len(samples) > longest:
            seconds, most = len(samples) / SAMPLE_RATE, longest / SAMPLE_RATE
            raise PessaError(
                f"{path} is {seconds:.0f} s long, but the model's window is {most:.0f} s", "cut it into shorter clips"
            )
        features = self._processor.feature_extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        ids = self._processor.tokenizer(text).input_ids[: self._options.max_length]
        # The model itself adds the start token in front of the labels.
        return {"input_features": features.input_features[0], "labels": torch.tensor(ids[1:])}


def collate_speech(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack clips into a batch: input_features (clips, mels, frames), labels (clips, tokens)."""
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=MASKED)
    return {"input_features": torch.stack([row["input_features"] for row in rows]), "labels": labels}
