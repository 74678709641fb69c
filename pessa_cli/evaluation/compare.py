"""Running two models on the same inputs and comparing their blocks, outputs and generated texts.

Both run in float32 whatever their stored dtype, so that differences come from the weights and not from 16-bit
arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from pessa_cli.common.errors import PessaError, UsageError
from pessa_cli.common.text import listed, read_text
from pessa_cli.models.audio import load_audio
from pessa_cli.models.classes import WEIGHTS_ALONE
from pessa_cli.models.hooks import block_squares, output_of
from pessa_cli.models.inputs import (
    Inputs,
    built_in_speech,
    clip_features,
    has_tokenizer,
    hears,
    random_signal,
    random_speech,
    speech_encoder,
    text_prompts,
    transcribe_greedily,
    transcript_inputs,
    with_decoder_ids,
    with_encoder_states,
)
from pessa_cli.models.load import from_folder, load, quiet_transformers
from pessa_cli.models.windows import on_device
from pessa_cli.surgery.model import Model

PROMPT_TOKENS = 32  # of a text, which the models then continue greedily
NEW_TOKENS = 32
PREPROCESSOR_FILE = "preprocessor_config.json"
BUILT_IN_SPEECH = "built-in speech"


@dataclass(frozen=True)
class OutputDifference:
    """The difference between the final outputs of two models.

    what: "logits", or "hidden states" for a model without a head. error: relative Frobenius norm of the difference.
    max_difference, mean_difference: of the absolute entries. inputs: what the models were run on. For logits also kl,
    the mean Kullback-Leibler divergence in nats, and agreement, the share of positions at which both models predict the
    same token when both are given the tokens before it: of the text, or of the reference's transcript.
    """

    what: str
    error: float
    max_difference: float
    mean_difference: float
    inputs: str
    kl: float | None = None
    agreement: float | None = None


@dataclass(frozen=True)
class GeneratedText:
    """The texts of both models under greedy decoding: the transcript of a clip, or the continuation of a prompt.

    judged: whether both must be the same.
    """

    name: str
    reference: str
    candidate: str
    judged: bool = True

    @property
    def same(self) -> bool:
        """Whether both wrote the same."""
        return self.reference == self.candidate


def run_both(
    reference: Model, candidate: Model, whole: bool, audio: list[Path], text: list[Path], device: str = "cpu"
) -> tuple[dict[str, float], OutputDifference | None, list[GeneratedText]]:
    """Compare two models; returns the relative error of the output of each block that ran, by its name, the
    outputs and the texts.

    whole: whether outputs and texts are compared, too; otherwise they are None and empty. device: where both models
    run. Raises UsageError when audio or text do not fit the models, PessaError when a model cannot be loaded or run.
    """
    with quiet_transformers():
        return _run_both(reference, candidate, whole, audio, text, device)


def _run_both(
    reference: Model, candidate: Model, whole: bool, audio: list[Path], text: list[Path], device: str = "cpu"
) -> tuple[dict[str, float], OutputDifference | None, list[GeneratedText]]:
    ours, theirs = load(reference).to(device), load(candidate).to(device)
    speech, reads = hears(ours), ours.main_input_name == "input_ids"
    if audio and not speech:
        raise UsageError(
            f"--audio needs a speech model; {reference.reader.folder} is not one", "leave --audio out, or give --text"
        )
    if text and not reads:
        raise UsageError(
            f"--text needs a text model; {reference.reader.folder} is not one", "leave --text out, or give --audio"
        )
    folder = reference.reader.folder
    with torch.inference_mode():
        texts: list[GeneratedText] = []
        if speech:
            clips = [(path.name, load_audio(path)) for path in audio]
            known = bool(clips) or (folder / PREPROCESSOR_FILE).exists()
            encoder = (
                from_folder(transformers.AutoProcessor, folder, "preprocessor and tokenizer")
                if known
                else speech_encoder(ours)
            )
            samples = []
            for name, clip in clips or [(BUILT_IN_SPEECH, built_in_speech())]:
                if not ours.can_generate():
                    features = clip_features(encoder, clip)["input_features"]
                    samples.append(transcript_inputs(ours, features, random_speech(ours)["decoder_input_ids"]))
                    continue
                transcripts, features, ids = _transcribe(encoder, (ours, theirs) if whole else (ours,), clip)
                if whole:
                    texts.append(GeneratedText(name, transcripts[0], transcripts[1]))
                samples.append(transcript_inputs(ours, features, ids))
            names = [path.name for path in audio] or [BUILT_IN_SPEECH]
        elif not reads:
            samples, names = [random_signal(folder, ours)], ["random values"]
        else:
            contents, known = [(path.name, read_text(path)) for path in text], has_tokenizer(folder)
            tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer") if known or text else None
            prompts = text_prompts(tokenizer, ours, contents)
            crosses = [site.key_width for site in reference.attention if site.kind.endswith(".cross")]
            samples, names = [with_decoder_ids(ours, inputs) for _, inputs in prompts], [name for name, _ in prompts]
            if crosses:
                samples = [with_encoder_states(ours, crosses[0], inputs) for inputs in samples]
            if whole and ours.can_generate():
                decoder = tokenizer if known else None
                texts = [_continue(decoder, (ours, theirs), name, inputs) for name, inputs in prompts]
        samples = on_device(samples, device)
        with ExitStack() as hooks:
            squares = block_squares(reference.sites, ours, theirs, hooks)
            expected = [_first_output(folder, ours, inputs) for inputs in samples]
        blocks = {name: (off / all_) ** 0.5 if all_ else off**0.5 for name, (off, all_) in squares.items()}
        outputs = None
        if whole:
            outputs = _compare_outputs(expected, [output_of(theirs, inputs) for inputs in samples], ", ".join(names))
    return blocks, outputs, texts


def _first_output(folder: Path, model: Any, inputs: Inputs) -> tuple[str, Tensor]:
    """The output of the reference model. Raises PessaError when it needs more inputs than the built-in ones."""
    try:
        return output_of(model, inputs)
    except (ValueError, TypeError, AttributeError) as error:
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(f"{folder} does not run on built-in inputs\n{reason}", WEIGHTS_ALONE) from error


def _compare_outputs(
    expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]], inputs: str
) -> OutputDifference:
    """The difference between the outputs of two models on the same inputs, over all positions of all inputs."""
    what = expected[0][0]
    width = expected[0][1].shape[-1]
    a = torch.cat([values.reshape(-1, width) for _, values in expected]).cpu().double()
    b = torch.cat([values.reshape(-1, width) for _, values in found]).cpu().double()
    difference = (a - b).abs()
    kl = agreement = None
    if what == "logits":
        log_p, log_q = a.log_softmax(-1), b.log_softmax(-1)
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        agreement = float((a.argmax(-1) == b.argmax(-1)).double().mean())
    error = float((a - b).norm() / a.norm())
    return OutputDifference(what, error, float(difference.max()), float(difference.mean()), inputs, kl, agreement)


def _transcribe(encoder: Any, models: Sequence[Any], samples: Any) -> tuple[list[str], Tensor, Tensor]:
    """The transcript of a clip by each model under greedy decoding, its features, and the reference's token ids.

    encoder: a processor, or a feature extractor, with which the transcripts are token ids.
    """
    inputs = clip_features(encoder, samples)
    if not hasattr(encoder, "feature_extractor"):
        inputs["input_features"] = inputs["input_features"][..., : 2 * models[0].config.max_source_positions]
    tokens = [transcribe_greedily(model, inputs) for model in models]
    if hasattr(encoder, "feature_extractor"):
        transcripts = [encoder.batch_decode(ids, skip_special_tokens=True)[0].strip() for ids in tokens]
    else:
        transcripts = [" ".join(map(str, ids[0].tolist())) for ids in tokens]
    return transcripts, inputs["input_features"], tokens[0]


def _continue(tokenizer: Any | None, models: tuple[Any, Any], name: str, inputs: Inputs) -> GeneratedText:
    """The greedy continuations of the first PROMPT_TOKENS of a text; without a tokenizer as token ids."""
    prompt = {key: value[:1, :PROMPT_TOKENS].to(models[0].device) for key, value in inputs.items()}
    width = 0 if models[0].config.is_encoder_decoder else prompt["input_ids"].shape[1]
    tokens = [
        model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)[0, width:].tolist()
        for model in models
    ]
    first, second = (" ".join(map(str, ids)) if tokenizer is None else tokenizer.decode(ids) for ids in tokens)
    return GeneratedText(name, first, second)
