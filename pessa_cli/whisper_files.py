"""The files beside a Whisper's weights in a Hugging Face folder, from sizes, a vocabulary and a tokenizer.json.

Everything is plain JSON. The field values are those of the published Whisper folders; the ids come from the
vocabulary, so that English-only, multilingual and later vocabularies need no cases of their own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pessa_cli.checkpoint import CONFIG_FILE, read_json, write_json
from pessa_cli.errors import PessaError, listed

TOKENIZER_FILE = "tokenizer.json"
SAMPLING_RATE, HOP_LENGTH, WINDOW = 16000, 160, 400  # of every Whisper
MULTILINGUAL_SIZE = 51865  # openai-whisper's own rule: English-only vocabularies have one token less
END, START, TRANSLATE, TRANSCRIBE = "<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>"
PREVIOUS, NO_TIMESTAMPS, FIRST_TIMESTAMP = "<|startofprev|>", "<|notimestamps|>", "<|0.00|>"
CONTROL = re.compile(r"<\|.+\|>")
TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens in order of their ids; timestamps follow <|notimestamps|>."""

    path: Path
    tokens: list[str]
    ids: Mapping[str, int]

    @property
    def multilingual(self) -> bool:
        return len(self.tokens) >= MULTILINGUAL_SIZE

    @property
    def specials(self) -> list[str]:
        """<|endoftext|> to <|notimestamps|>: transformers takes the token after the last one as 0.00 seconds."""
        return self.tokens[self.ids[END] : self.ids[NO_TIMESTAMPS] + 1]


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """The vocabulary.json or vocabulary.txt of a CTranslate2 folder, one token an embedding row.

    Raises PessaError when it is missing, not of this size, or not a Whisper's.
    """
    path = next(iter(sorted(folder.glob("vocabulary.*"))), folder / "vocabulary.json")
    try:
        text = path.read_text(encoding="utf-8")
        # Not splitlines: it would also break lines at characters that are tokens. One token may be empty.
        tokens = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PessaError(f"{path} is no readable vocabulary: {error}", "copy the folder again") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or len(tokens) != size:
        count = f"{len(tokens):,} tokens" if isinstance(tokens, list) else "no list"
        raise PessaError(f"{path} holds {count}, the embedding has {size:,} rows", "copy the folder again")
    ids = {token: index for index, token in enumerate(tokens)}
    needed = [END, START, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_TIMESTAMPS, FIRST_TIMESTAMP]
    missing = [token for token in needed if token not in ids]
    if missing or ids[FIRST_TIMESTAMP] != ids[NO_TIMESTAMPS] + 1:
        what = f"lacks {', '.join(missing)}" if missing else f"has {FIRST_TIMESTAMP} not right after {NO_TIMESTAMPS}"
        raise PessaError(f"{path} is not a Whisper's vocabulary: it {what}", "copy the folder again")
    return Vocabulary(path, tokens, ids)


def whisper_config(sizes: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """config.json: `sizes` with what is the same in every Whisper, and the ids of the vocabulary."""
    end = vocabulary.ids[END]
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "activation_function": "gelu",
        "is_encoder_decoder": True,
        "scale_embedding": False,
        **sizes,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": vocabulary.ids[START],
    }


def _generation_config(source: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """generation_config.json; suppressed tokens and alignment heads come from CTranslate2's config.json."""
    theirs, ids = read_json(source), vocabulary.ids
    layers, heads, size = config["decoder_layers"], config["decoder_attention_heads"], config["vocab_size"]
    result: dict[str, Any] = {
        **{key: config[key] for key in config if key.endswith("_token_id")},
        "is_multilingual": vocabulary.multilingual,
        "max_initial_timestamp_index": 50,  # one second, as openai-whisper
        "max_length": config["max_target_positions"],
        "no_timestamps_token_id": ids[NO_TIMESTAMPS],
        "prev_sot_token_id": ids[PREVIOUS],
        "return_timestamps": False,
    }
    for ours, key in (("suppress_tokens", "suppress_ids"), ("begin_suppress_tokens", "suppress_ids_begin")):
        tokens = theirs.get(key) or []
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < size for token in tokens):
            raise PessaError(f"{source}: {key} is not a list of token ids below {size}", "copy the folder again")
        if tokens:
            result[ours] = tokens
    pairs = theirs.get("alignment_heads") or []
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list) and [type(index) for index in pair] == [int, int]
        # Compared as ranges: 0 <= layer < layers and 0 <= head < heads.
        and pair[0] in range(layers) and pair[1] in range(heads)
        for pair in pairs
    ):
        raise PessaError(f"{source}: alignment_heads are not pairs of a layer and a head", "copy the folder again")
    if pairs:
        result["alignment_heads"] = pairs
    if vocabulary.multilingual:
        languages = vocabulary.tokens[ids[START] + 1 : ids[TRANSLATE]]
        # The first tokenizers called Hebrew iw; transformers looks for he.
        result["lang_to_id"] = {"<|he|>" if token == "<|iw|>" else token: ids[token] for token in languages}
        result["task_to_id"] = {"transcribe": ids[TRANSCRIBE], "translate": ids[TRANSLATE]}
        # Without a task transformers 5 leaves the task token out of the prompt, and the model guesses.
        result["task"] = "transcribe"
    return result
