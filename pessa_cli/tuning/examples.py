"""Training data: JSON and JSONL in the usual forms, as token ids of which only the answers count.

Every form becomes a text with the spans in it that are to be learned; tokens outside of them are masked. That is all
there is to instructions, completions, conversations and plain text alike.
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

MASKED = -100  # a label that the loss leaves out
Tokens = dict[str, NDArray[np.int64]]


def encode(rendered: Rendered, tokenizer: Any, options: DataOptions) -> Tokens:
    """Token ids and labels, (tokens,) each, cut after `max_length`; the first token has nothing to be told from."""
    found = tokenizer(rendered.text, return_offsets_mapping=True, add_special_tokens=not rendered.framed)
    ids, offsets = list(found["input_ids"]), found["offset_mapping"]
    # A token belongs to a span when it ends in it: one across the border carries the first letters of the answer.
    learned = [start < end and any(a < end <= b for a, b in rendered.spans) for start, end in offsets]
    if not rendered.framed and tokenizer.eos_token_id is not None and ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
        learned.append(True)
    input_ids = np.array(ids[: options.max_length], dtype=np.int64)
    keep = np.array(learned[: options.max_length]) if options.mask_prompt else np.ones(len(input_ids), dtype=bool)
    keep[0] = False
    return {"input_ids": input_ids, "labels": np.where(keep, input_ids, MASKED)}


def encode_text(path: Path, rows: Sequence[Row], tokenizer: Any, options: DataOptions) -> list[Tokens]:
    """All examples as tokens, packed if asked for; those whose answers are all beyond `max_length` are left out."""
    if not tokenizer.is_fast:
        raise PessaError("the model's tokenizer gives no offsets", "add the tokenizer.json of the original model")
    if options.template == "chat" and not tokenizer.chat_template:
        raise UsageError("--template chat: the model's tokenizer has no chat template", "leave it out")
    encoded = [encode(render(row, tokenizer, options.template), tokenizer, options) for row in rows]
    kept = [tokens for tokens in encoded if (tokens["labels"] != MASKED).any()]
    if not kept:
        raise PessaError(f"no answer in {path} begins within {options.max_length} tokens", "give a larger --max-length")
    return pack(kept, options.max_length) if options.packing else kept


def pack(rows: Sequence[Tokens], length: int) -> list[Tokens]:
    """Rows of at most `length` tokens made of whole examples, best fit by decreasing length.

    position_ids start anew with each example: that is how transformers' masks know that they are several.
    """
    free: list[tuple[int, int]] = []  # (room left, which row), sorted
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
    """Rows as a batch, filled up on the right; packed rows have positions instead of a mask."""

    def collate(rows: list[Tokens]) -> dict[str, Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": pad, "labels": MASKED}
        batch = {
            key: torch.tensor(np.stack([_filled(row[key], width, value) for row in rows]))
            for key, value in fill.items()
        }
        if "position_ids" in rows[0]:
            # What fills up is one more example, so that nothing looks at it.
            positions = [np.concatenate([r["position_ids"], np.arange(width - len(r["input_ids"]))]) for r in rows]
            return batch | {"position_ids": torch.tensor(np.stack(positions))}
        mask = [_filled(np.ones_like(row["input_ids"]), width, 0) for row in rows]
        return batch | {"attention_mask": torch.tensor(np.stack(mask))}

    return collate


def _filled(values: NDArray[np.int64], width: int, value: int) -> NDArray[np.int64]:
    return np.pad(values, (0, width - len(values)), constant_values=value)


class SpeechData(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Clips and what is said in them; the sound is read when it is its turn.

    A row: input_features (mels, frames), labels (tokens,). Raises PessaError for clips that are not there.
    """

    def __init__(self, path: Path, rows: Sequence[Row], processor: Any, options: DataOptions) -> None:
        self._clips = [(path.parent / (row.get("audio") or row["file"]), row["text"]) for row in rows]
        missing = [str(clip) for clip, _ in self._clips if not clip.is_file()]
        if missing:
            raise PessaError(f"{len(missing)} clips of {path} are not there\n{listed(missing)}", "correct the paths")
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
            raise PessaError(f"{path} is {seconds:.0f} s long, and the model hears {most:.0f} s", "cut it")
        features = self._processor.feature_extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt")
        ids = self._processor.tokenizer(text).input_ids[: self._options.max_length]
        # The model itself puts the start before the labels.
        return {"input_features": features.input_features[0], "labels": torch.tensor(ids[1:])}


def collate_speech(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Clips as a batch: input_features (clips, mels, frames), labels (clips, tokens)."""
    labels = torch.nn.utils.rnn.pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=MASKED)
    return {"input_features": torch.stack([row["input_features"] for row in rows]), "labels": labels}
