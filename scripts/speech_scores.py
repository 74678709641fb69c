"""Score Whisper models on clips: how far they are from the original, and how well they know the reference texts.

    python scripts/speech_scores.py models/whisper-tiny.en out/pruned --clips out/speech/score/clips.jsonl

Printed for each model, with an interval that 95 % of bootstrap samples of the clips fall into: the KL divergence of its
predictions from the original's and the negative log-likelihood of the reference texts, in nats per token, and the word
error rate under greedy decoding. The first folder is the original. Tokens are teacher-forced: the KL divergence is the
mean over the tokens of what the original itself transcribes and the one that ends it, so that it needs no reference
text. The likelihood is that of `pessa eval`, without the token that ends a text. Whisper's share: parameters of the
layers of the encoder, and of the decoder, against the original's.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import WhisperProcessor

from pessa_cli.algebra.compare import kl_divergence
from pessa_cli.evaluation.figures import Figure, ratio
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.word_errors import Clip, count_words, read_clips, transcribe
from pessa_cli.models.data import DataItem
from pessa_cli.models.load import load, quiet_transformers
from pessa_cli.models.windows import inputs_of
from pessa_cli.surgery.model import open_model

SETTINGS = ScoreSettings(new_tokens=200)


class Sums(NamedTuple):
    """A figure of each clip as a sum and the number of tokens or words that it is a sum over, (clips,) each."""

    sums: Sequence[float]
    counts: Sequence[int]

    @property
    def figure(self) -> Figure:
        return ratio(self.sums, self.counts)


@dataclass(frozen=True)
class SpeechScores:
    """kl: from the original, nats: of the reference texts, both in nats per token; words: errors, None if not asked."""

    kl: Sums
    nats: Sums
    words: Sums | None


@dataclass(frozen=True)
class Forced:
    """Tokens of one clip for the decoder, (1, tokens), of which the first `prompt` are not predicted."""

    tokens: Tensor
    prompt: int

    def predicted(self, decoded: Tensor) -> Tensor:
        """Keep what predicts the tokens after the prompt, of (tokens - 1, ...)."""
        return decoded[self.prompt - 1 :]


@dataclass(frozen=True)
class Original:
    """Clips that fit into a window, with their texts, and what the original model says and predicts.

    features: (1, mels, frames) each. said: its transcripts. states: the last states of its decoder for these, from
    which `head` makes the logits; the logits of all clips would take a hundred times the memory.
    """

    clips: Sequence[Clip]
    features: Sequence[Tensor]
    said: Sequence[Forced]
    texts: Sequence[Forced]
    states: Sequence[Tensor]
    head: Any
    processor: Any


@torch.inference_mode()
def original(model: Any, processor: Any, clips: Sequence[Clip]) -> Original:
    """Transcribe the clips that have a text with the original model. Raises ValueError for one beyond a window."""
    known = [clip for clip in clips if clip.text]
    features, said, texts, states = [], list[Forced](), list[Forced](), []
    for clip in known:
        forced = []
        for text in (None, f" {clip.text}"):  # without a text, what the model itself makes of a clip is taken
            (given, *more) = inputs_of(model, processor, DataItem(clip.file, text))
            if more:
                raise ValueError(f"{clip.file} is longer than one window, give shorter clips")
            ids = given["decoder_input_ids"]
            prompt = ids[0].tolist().index(processor.tokenizer.convert_tokens_to_ids("<|notimestamps|>")) + 1
            end = torch.tensor([[processor.tokenizer.eos_token_id]] if text is None else [[]], dtype=ids.dtype)
            ids = torch.cat([ids[:, : model.config.max_target_positions - 1].cpu(), end], 1)
            forced.append(Forced(ids, prompt))
        features.append(given["input_features"])
        said.append(forced[0])
        texts.append(forced[1])
        encoded = model.model.encoder(given["input_features"].to(model.device, model.dtype)).last_hidden_state
        states.append(forced[0].predicted(decoded(model, encoded, forced[0])))
    return Original(known, features, said, texts, states, model.proj_out, processor)


def decoded(model: Any, encoded: Tensor, forced: Forced) -> Tensor:
    """The last states of a Whisper's decoder before each token but the first, (tokens - 1, width)."""
    ids = forced.tokens[:, :-1].to(encoded.device)
    states: Tensor = model.model.decoder(input_ids=ids, encoder_hidden_states=encoded, use_cache=False)[0][0]
    return states


@torch.inference_mode()
def score(model: Any, of: Original, words: bool = True) -> SpeechScores:
    """Score any Whisper model of transformers; words: whether clips are transcribed, which takes most of the time."""
    kl, nats = list[float](), list[float]()
    for features, said, text, states in zip(of.features, of.said, of.texts, of.states, strict=True):
        encoded = model.model.encoder(features.to(model.device, model.dtype)).last_hidden_state
        ours, theirs = model.proj_out(said.predicted(decoded(model, encoded, said))), of.head(states)
        kl.append(float(kl_divergence(theirs, ours.to(theirs.device)).sum()))
        logits = model.proj_out(text.predicted(decoded(model, encoded, text))).double()
        nats.append(float(cross_entropy(logits, text.tokens[0, text.prompt :].to(logits.device), reduction="sum")))
    sizes = [[forced.tokens.shape[1] - forced.prompt for forced in some] for some in (of.said, of.texts)]
    return SpeechScores(Sums(kl, sizes[0]), Sums(nats, sizes[1]), word_errors(model, of) if words else None)


def word_errors(model: Any, of: Original) -> Sums:
    """The word errors under greedy decoding, with Whisper's English normaliser."""
    heard = transcribe(model, of.processor, [{"input_features": each} for each in of.features], SETTINGS)
    counted = count_words([clip.text or "" for clip in of.clips], heard)
    return Sums([count.errors for count in counted], [count.words for count in counted])


def layer_parameters(model: Any) -> tuple[int, int]:
    """The number of parameters in the layers of a Whisper's encoder, and in those of its decoder."""
    stacks = (model.model.encoder.layers, model.model.decoder.layers)
    encoder, decoder = (sum(each.numel() for each in stack.parameters()) for stack in stacks)
    return encoder, decoder


def cells(scores: SpeechScores) -> list[str]:
    """The cells of a row in Markdown."""
    found = [shown(scores.kl.figure, ".4f"), shown(scores.nats.figure, ".3f")]
    return [*found, "" if scores.words is None else shown(scores.words.figure, ".1%")]


def shown(figure: Figure, form: str) -> str:
    """A figure with its interval in this format."""
    if figure.interval is None:
        return f"{figure.value:{form}}"
    low, high = figure.interval
    return f"{figure.value:{form}} ({low:{form}} to {high:{form}})"


HEADINGS = ("KL divergence from the original", "nats per token of the references", "word error rate")


def row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def prepare(folder: Path, clips: Path) -> tuple[Any, Original]:
    """Load an original model, and let it transcribe the clips of JSON lines."""
    model = load(open_model(folder))
    return model, original(model, WhisperProcessor.from_pretrained(folder), read_clips(clips))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders; the first is the original")
    parser.add_argument("--clips", type=Path, required=True, help="JSON lines, each {audio, text}")
    parser.add_argument("--no-words", action="store_true", help="do not transcribe, which takes most of the time")
    args = parser.parse_args()
    with quiet_transformers():
        first, of = prepare(args.models[0], args.clips)
        sizes = layer_parameters(first)
        print(row(["model", "encoder layers", "decoder layers", *HEADINGS]))
        print("|---" * 6 + "|")
        for folder in args.models:
            model = load(open_model(folder))
            shares = [f"{ours / all_:.3f}" for ours, all_ in zip(layer_parameters(model), sizes, strict=True)]
            print(row([folder.name, *shares, *cells(score(model, of, not args.no_words))]), flush=True)


if __name__ == "__main__":
    main()
