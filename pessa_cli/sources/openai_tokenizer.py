"""Conversion of openai-whisper's tokenizer, with the vocabularies of that package, to a Hugging Face tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pessa_cli.common.errors import PessaError
from pessa_cli.sources.whisper_folder import MULTILINGUAL_SIZE, PREVIOUS, START, TRANSCRIBE, TRANSLATE, Vocabulary

if TYPE_CHECKING:
    from tiktoken import Encoding


def get_encoding(path: Path, size: int) -> Encoding:
    """Return openai-whisper's tokenizer with `size` token ids.

    Raises PessaError if openai-whisper is not installed or has no such vocabulary.
    """
    try:
        from whisper.tokenizer import get_encoding as theirs
    except ImportError as error:
        raise PessaError(
            f"{path} is an openai-whisper checkpoint; converting it needs the tokenizer in openai-whisper, which is "
            "not installed",
            "pip install 'pessa[whisper]'",
        ) from error
    multilingual = size >= MULTILINGUAL_SIZE
    languages = size - 51765 - multilingual  # the rule in openai-whisper
    encoding: Encoding | None = None
    if languages in (99, 100):
        encoding = theirs("multilingual" if multilingual else "gpt2", num_languages=languages)
    if encoding is None or encoding.n_vocab != size:
        raise PessaError(
            f"{path} has {size:,} tokens, but openai-whisper has no vocabulary of that size",
            "give a file that openai-whisper loads",
        )
    return encoding


def _merges(ranks: Mapping[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Reconstruct the ordered BPE merges of a tiktoken vocabulary, by splitting each token into its two parts."""

    def parts(token: bytes, limit: int) -> list[bytes]:
        pieces = [token[i : i + 1] for i in range(len(token))]
        while len(pieces) > 2:
            pairs = [(ranks.get(pieces[i] + pieces[i + 1], limit), i) for i in range(len(pieces) - 1)]
            rank, i = min(pairs)
            if rank >= limit:
                break
            pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
        return pieces

    made = [parts(token, rank) for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if len(token) > 1]
    return [(pieces[0], pieces[1]) for pieces in made if len(pieces) == 2]


def _letters() -> dict[int, str]:
    """Return GPT-2's printable character for every byte: the byte's own if printable, else one from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return {byte: chr(byte if byte in visible else next(others)) for byte in range(256)}


def tokens_and_tokenizer(encoding: Encoding) -> tuple[list[str], dict[str, Any]]:
    """Return all tokens by id as byte-level text, and a tokenizer.json with all of them except the timestamps."""
    letters = _letters()

    def text(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    specials = sorted((encoding.encode_single_token(token), token) for token in encoding.special_tokens_set)
    ranks = {encoding.decode_single_token_bytes(index): index for index in range(specials[0][0])}
    vocabulary = {text(token): index for token, index in ranks.items()}
    tokens = [*vocabulary, *(token for _, token in specials)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    return tokens, {
        "version": "1.0",
        **dict.fromkeys(("truncation", "padding", "normalizer", "post_processor")),
        "added_tokens": [{"id": index, "content": token, **flags} for index, token in specials if "." not in token],
        "pre_tokenizer": byte_level | {"add_prefix_space": False},
        "decoder": byte_level | {"add_prefix_space": True},  # as in the published files
        "model": {
            **{"type": "BPE", "dropout": None, "unk_token": None, **empty, "fuse_unk": False},
            "vocab": vocabulary,
            "merges": [f"{text(left)} {text(right)}" for left, right in _merges(ranks)],
        },
    }


def suppressed(encoding: Encoding, vocabulary: Vocabulary) -> dict[str, list[int]]:
    """Return the token ids that openai-whisper never decodes, or not as the first token, under CTranslate2's keys."""
    from whisper.tokenizer import Tokenizer

    never = (TRANSCRIBE, TRANSLATE, START, PREVIOUS, "<|startoflm|>", "<|nospeech|>")
    text = Tokenizer(encoding=encoding, num_languages=0).non_speech_tokens
    return {
        "suppress_ids": sorted({*text, *(vocabulary.ids[token] for token in never)}),
        "suppress_ids_begin": [*encoding.encode(" "), encoding.eot_token],
    }
