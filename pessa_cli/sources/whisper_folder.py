"""The JSON files of a Hugging Face Whisper folder, built from sizes, a vocabulary and a tokenizer.json.

The values are those of the published Whisper folders. Token ids are looked up in the vocabulary, so that the same code
handles English-only, multilingual and later vocabularies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pessa_cli.blocks.alignment import alignment_heads
from pessa_cli.checkpoint.files import CONFIG_FILE, read_json, write_json
from pessa_cli.common.errors import PessaError
from pessa_cli.common.text import listed, shortened

TOKENIZER_FILE = "tokenizer.json"
SAMPLING_RATE, HOP_LENGTH, WINDOW = 16000, 160, 400  # the same in every Whisper model; lengths in samples
MULTILINGUAL_SIZE = 51865  # the rule in openai-whisper: English-only vocabularies have one token less
END, START, TRANSLATE, TRANSCRIBE = "<|endoftext|>", "<|startoftranscript|>", "<|translate|>", "<|transcribe|>"
PREVIOUS, NO_TIMESTAMPS, FIRST_TIMESTAMP = "<|startofprev|>", "<|notimestamps|>", "<|0.00|>"
CONTROL = re.compile(r"<\|.+\|>")
TIMESTAMP = re.compile(r"<\|\d+\.\d\d\|>")


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a Whisper model ordered by id, and their ids; timestamp tokens follow <|notimestamps|>."""

    path: Path
    tokens: list[str]
    ids: Mapping[str, int]

    @property
    def multilingual(self) -> bool:
        """Whether the vocabulary is that of a multilingual model."""
        return len(self.tokens) >= MULTILINGUAL_SIZE

    @property
    def specials(self) -> list[str]:
        """The special tokens from <|endoftext|> to <|notimestamps|>.

        The list must end there, because transformers takes the token after the last one as 0.00 seconds.
        """
        return self.tokens[self.ids[END] : self.ids[NO_TIMESTAMPS] + 1]


def read_vocabulary(folder: Path, size: int) -> Vocabulary:
    """Read vocabulary.json or vocabulary.txt of a CTranslate2 folder, with one token per embedding row.

    Raises PessaError if the file is missing, has another number of tokens than `size`, or is not of a Whisper model.
    """
    path = next(iter(sorted(folder.glob("vocabulary.*"))), folder / "vocabulary.json")
    try:
        text = path.read_text(encoding="utf-8")
        # splitlines would also split at characters that are tokens themselves. One token may be empty.
        tokens = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PessaError(f"{path} is not a readable vocabulary: {error}", "copy the folder again") from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or len(tokens) != size:
        count = f"{len(tokens):,} tokens" if isinstance(tokens, list) else "no list of tokens"
        raise PessaError(f"{path} holds {count}, but the embedding has {size:,} rows", "copy the folder again")
    ids = {token: index for index, token in enumerate(tokens)}
    needed = [END, START, TRANSLATE, TRANSCRIBE, PREVIOUS, NO_TIMESTAMPS, FIRST_TIMESTAMP]
    missing = [token for token in needed if token not in ids]
    if missing or ids[FIRST_TIMESTAMP] != ids[NO_TIMESTAMPS] + 1:
        what = (
            f"lacks {', '.join(missing)}" if missing else f"does not have {FIRST_TIMESTAMP} right after {NO_TIMESTAMPS}"
        )
        raise PessaError(f"{path} is not the vocabulary of a Whisper model: it {what}", "copy the folder again")
    return Vocabulary(path, tokens, ids)


def whisper_config(sizes: Mapping[str, Any], vocabulary: Vocabulary) -> dict[str, Any]:
    """Build config.json from `sizes`, the values that every Whisper model shares, and the ids of special tokens."""
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
    """Build generation_config.json; suppressed tokens and alignment heads come from CTranslate2's config.json.

    Raises PessaError if those are malformed or out of range.
    """
    theirs, ids = read_json(source), vocabulary.ids
    layers, heads, size = config["decoder_layers"], config["decoder_attention_heads"], config["vocab_size"]
    result: dict[str, Any] = {
        **{key: config[key] for key in config if key.endswith("_token_id")},
        "is_multilingual": vocabulary.multilingual,
        "max_initial_timestamp_index": 50,  # one second, as in openai-whisper
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
    found = alignment_heads(pairs, layers, heads)
    if found is None:
        raise PessaError(
            f"{source}: alignment_heads is {shortened(pairs)}, not a list of pairs of a layer and a head",
            "copy the folder again",
        )
    if found:
        result["alignment_heads"] = [list(pair) for pair in found]
    if vocabulary.multilingual:
        languages = vocabulary.tokens[ids[START] + 1 : ids[TRANSLATE]]
        # The first tokenizers used the code iw for Hebrew; transformers uses he.
        result["lang_to_id"] = {"<|he|>" if token == "<|iw|>" else token: ids[token] for token in languages}
        result["task_to_id"] = {"transcribe": ids[TRANSCRIBE], "translate": ids[TRANSLATE]}
        # Without a task transformers 5 leaves the task token out of the prompt, and the model chooses one itself.
        result["task"] = "transcribe"
    return result


def _tokenizer(source: Path, vocabulary: Vocabulary) -> dict[str, Any]:
    """Return tokenizer.json completed with the vocabulary's missing tokens, mostly timestamps, as added tokens.

    Raises PessaError if the file is missing or malformed, or disagrees with the vocabulary.
    """
    if not source.is_file():
        raise PessaError(f"{source} does not exist", f"copy it from the model that {source.parent} was converted from")
    tokenizer = read_json(source)
    model: Any = tokenizer.get("model")
    added: Any = tokenizer.get("added_tokens")
    try:
        known = {index: token for token, index in model["vocab"].items()}
        known |= {token["id"]: token["content"] for token in added}
        problems = [f"{index}: only in the tokenizer" for index in known if index not in range(len(vocabulary.tokens))]
    except (AttributeError, KeyError, TypeError) as error:
        raise PessaError(f"{source} is not a tokenizer with a vocabulary", "copy the file again") from error
    for index, token in enumerate(vocabulary.tokens):
        # Control tokens have other names in other tokenizer versions (nocaptions, nospeech); text tokens never do.
        control = CONTROL.fullmatch(token) is not None
        if index not in known and control:
            timestamp = TIMESTAMP.fullmatch(token) is not None
            plain = {"single_word": False, "lstrip": False, "rstrip": False}
            added.append({"id": index, "content": token, **plain, "normalized": timestamp, "special": not timestamp})
        elif known.get(index) != token and not (control and CONTROL.fullmatch(str(known[index]))):
            problems.append(f"{index}: {known.get(index)!r}, but {token!r} in the vocabulary")
    if problems:
        raise PessaError(
            f"{source} belongs to another model than {vocabulary.path.name}\n{listed(problems)}",
            "copy the tokenizer.json of the model that this one was converted from",
        )
    return tokenizer


def write_side_files(source: Path, into: Path, config: Mapping[str, Any], vocabulary: Vocabulary) -> None:
    """Write the files other than the weights: config, generation config, tokenizer and preprocessor.

    `source` is the CTranslate2 folder. Raises PessaError if its config.json or tokenizer.json is missing, not JSON, or
    belongs to another model, and if the encoder's input is not a whole number of seconds.
    """
    seconds, rest = divmod(config["max_source_positions"] * 2 * HOP_LENGTH, SAMPLING_RATE)
    if rest or not seconds:
        raise PessaError(
            f"{source}: the encoder has {config['max_source_positions']} positions, which are not whole seconds",
            "copy the folder again",
        )
    preprocessor = {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": config["num_mel_bins"],
        "sampling_rate": SAMPLING_RATE,
        "hop_length": HOP_LENGTH,
        "n_fft": WINDOW,
        "chunk_length": seconds,
        "n_samples": seconds * SAMPLING_RATE,
        "nb_max_frames": seconds * SAMPLING_RATE // HOP_LENGTH,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": False,
    }
    tokenizer_config = {
        "tokenizer_class": "WhisperTokenizer",
        "processor_class": "WhisperProcessor",
        "add_prefix_space": False,
        **{f"{role}_token": END for role in ("bos", "eos", "pad", "unk")},
        "additional_special_tokens": vocabulary.specials,
        "clean_up_tokenization_spaces": False,
        "errors": "replace",
        "model_max_length": config["max_target_positions"],
    }
    generation = _generation_config(source / CONFIG_FILE, config, vocabulary)
    write_json(into / TOKENIZER_FILE, _tokenizer(source / TOKENIZER_FILE, vocabulary))
    write_json(into / "tokenizer_config.json", tokenizer_config)
    write_json(into / "preprocessor_config.json", preprocessor)
    write_json(into / "generation_config.json", generation)
    write_json(into / CONFIG_FILE, config)
