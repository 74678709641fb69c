"""Two models run on the same inputs: their attention blocks one by one, their outputs, and what they write.

Both run in float32 whatever they are stored in, so that differences come from the weights and not from 16-bit
arithmetic.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed
from pessa_cli.models.audio import load_audio
from pessa_cli.models.hooks import block_squares, output_of
from pessa_cli.models.inputs import (
    Inputs,
    has_tokenizer,
    listen,
    noise,
    signal,
    text_prompts,
    transcript_inputs,
    with_answer,
    write_down,
)
from pessa_cli.models.load import WEIGHTS_ALONE, from_folder, load, quiet_transformers
from pessa_cli.surgery.model import Model

PROMPT_TOKENS = 32  # of a text, before the greedy continuation
NEW_TOKENS = 32


@dataclass(frozen=True)
class OutputDifference:
    """How far the final outputs are apart: `what` is "logits", or "hidden states" for a model without a head.

    error: relative Frobenius norm of the difference; max_difference and mean_difference: of the entries;
    kl: mean Kullback-Leibler divergence in nats; agreement: share of equal top-1 predictions (logits only).
    """

    what: str
    error: float
    max_difference: float
    mean_difference: float
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class GeneratedText:
    """What both models wrote under greedy decoding: a transcript, or the continuation of a prompt."""

    name: str
    reference: str
    candidate: str


def run_both(
    reference: Model, candidate: Model, whole: bool, audio: list[Path], text: list[Path]
) -> tuple[list[tuple[str, float]], OutputDifference | None, list[GeneratedText]]:
    """The relative error of each attention block's output, and if `whole` those of the outputs and all texts."""
    with quiet_transformers():
        return _run_both(reference, candidate, whole, audio, text)


def _run_both(
    reference: Model, candidate: Model, whole: bool, audio: list[Path], text: list[Path]
) -> tuple[list[tuple[str, float]], OutputDifference | None, list[GeneratedText]]:
    ours, theirs = load(reference), load(candidate)
    speech, reads = ours.config.model_type == "whisper", ours.main_input_name == "input_ids"
    if audio and not speech:
        raise UsageError(f"--audio: {reference.reader.folder} does not listen", "give --text to a text model")
    if text and not reads:
        raise UsageError(f"--text: {reference.reader.folder} does not read", "give --audio to a speech model")
    folder = reference.reader.folder
    with torch.inference_mode():
        texts: list[GeneratedText] = []
        if speech:
            clips = [(path.name, load_audio(path)) for path in audio]
            written = [(name, *_transcribe(folder, (ours, theirs), samples)) for name, samples in clips]
            texts = [GeneratedText(name, *said) for name, said, _ in written]
            samples = [transcript_inputs(ours, features, ids) for _, _, (features, ids) in written]
            samples = samples or [noise(ours)]
        elif not reads:
            samples = [signal(folder, ours)]
        else:
            prompts = text_prompts(folder, ours, text)
            samples = [with_answer(ours, inputs) for _, inputs in prompts]
            if whole and ours.can_generate():
                texts = [_continue(folder, ours, theirs, name, inputs) for name, inputs in prompts]
        with ExitStack() as hooks:
            squares = block_squares(reference.sites, ours, theirs, hooks)
            expected = [_first_output(folder, ours, inputs) for inputs in samples]
        blocks = [(name, (off / all_) ** 0.5 if all_ else off**0.5) for name, (off, all_) in squares.items()]
        outputs = _compare_outputs(expected, [output_of(theirs, inputs) for inputs in samples]) if whole else None
    return blocks, outputs, texts if whole else []


def _first_output(folder: Path, model: Any, inputs: Inputs) -> tuple[str, Tensor]:
    """The outputs of a model that may want more than we have to give."""
    try:
        return output_of(model, inputs)
    except (ValueError, TypeError, AttributeError) as error:
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(f"{folder} does not run on built-in inputs\n{reason}", WEIGHTS_ALONE) from error


def _compare_outputs(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> OutputDifference:
    what = expected[0][0]
    width = expected[0][1].shape[-1]
    a = torch.cat([values.reshape(-1, width) for _, values in expected]).double()
    b = torch.cat([values.reshape(-1, width) for _, values in found]).double()
    difference = (a - b).abs()
    kl = agreement = None
    if what == "logits":
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        agreement = float((a.argmax(-1) == b.argmax(-1)).double().mean())
    error = float((a - b).norm() / a.norm())
    return OutputDifference(what, error, float(difference.max()), float(difference.mean()), kl, agreement)


def _transcribe(folder: Path, models: tuple[Any, Any], samples: Any) -> tuple[list[str], tuple[Tensor, Tensor]]:
    """What each model hears under greedy decoding, and the reference's features and tokens."""
    processor = from_folder(transformers.AutoProcessor, folder, "preprocessor and tokenizer")
    inputs = listen(processor, samples)
    tokens = [write_down(model, inputs) for model in models]
    said = [processor.batch_decode(ids, skip_special_tokens=True)[0].strip() for ids in tokens]
    return said, (inputs["input_features"], tokens[0])


def _continue(folder: Path, ours: Any, theirs: Any, name: str, inputs: Inputs) -> GeneratedText:
    """What both write after the first tokens of a text, as text if there is a tokenizer, else as token numbers."""
    prompt = {key: value[:1, :PROMPT_TOKENS] for key, value in inputs.items()}
    width = 0 if ours.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    tokens = [
        model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)[0, width:].tolist()
        for model in (ours, theirs)
    ]
    if not has_tokenizer(folder):
        return GeneratedText(name, *(" ".join(map(str, ids)) for ids in tokens))
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    return GeneratedText(name, *(tokenizer.decode(ids) for ids in tokens))
