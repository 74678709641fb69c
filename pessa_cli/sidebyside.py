"""Two models run on the same inputs: their attention blocks one by one, their outputs, and what they write.

Both run in float32 whatever they are stored in, so that differences come from the weights and not from 16-bit
arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor, nn

from pessa_cli.audio import SAMPLE_RATE, load_audio
from pessa_cli.errors import PessaError, UsageError, listed
from pessa_cli.model import Model
from pessa_cli.naming import module_names
from pessa_cli.sites import Site

SEED = 0
PROMPT_TOKENS = 32  # of a text, before the greedy continuation
NEW_TOKENS = 32
WEIGHTS_ALONE = "compare weights alone: --level weights"
TEXT_TOKENS = 512  # of a text, for its logits
PASSAGE = """The lighthouse at the end of the harbour had been dark for eleven years when the letter arrived. It was
addressed to the keeper, a post that no longer existed, and so the postmistress read it herself. "Please light the
lamp on the ninth of March," it said, "and keep it burning until you see three sails." She counted the days, bought
two litres of oil, and climbed the 143 steps with her daughter, who asked what they would do if nobody came."""

# Whatever a checkpoint asks for: none of its code runs, nothing is fetched.
LOCAL_ONLY = {"trust_remote_code": False, "local_files_only": True}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Outputs:
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
class Text:
    """What both models wrote under greedy decoding: a transcript, or the continuation of a prompt."""

    name: str
    reference: str
    candidate: str


def run_both(
    reference: Model, candidate: Model, whole: bool, audio: list[Path], text: list[Path]
) -> tuple[list[tuple[str, float]], Outputs | None, list[Text]]:
    """The relative error of each attention block's output, and if `whole` those of the outputs and all texts."""
    with quiet_transformers():
        return _run_both(reference, candidate, whole, audio, text)


def _run_both(
    reference: Model, candidate: Model, whole: bool, audio: list[Path], text: list[Path]
) -> tuple[list[tuple[str, float]], Outputs | None, list[Text]]:
    ours, theirs = load(reference), load(candidate)
    speech, reads = ours.config.model_type == "whisper", ours.main_input_name == "input_ids"
    if audio and not speech:
        raise UsageError(f"--audio: {reference.reader.folder} does not listen", "give --text to a text model")
    if text and not reads:
        raise UsageError(f"--text: {reference.reader.folder} does not read", "give --audio to a speech model")
    folder = reference.reader.folder
    with torch.inference_mode():
        texts: list[Text] = []
        if speech:
            clips = [(path.name, load_audio(path)) for path in audio]
            written = [(name, *_transcribe(folder, (ours, theirs), samples)) for name, samples in clips]
            texts = [Text(name, *said) for name, said, _ in written]
            samples = [_speech_inputs(ours, features, ids) for _, _, (features, ids) in written]
            samples = samples or [noise(ours)]
        elif not reads:
            samples = [signal(folder, ours)]
        else:
            prompts = _prompts(folder, ours, text)
            samples = [with_answer(ours, inputs) for _, inputs in prompts]
            if whole and ours.can_generate():
                texts = [_continue(folder, ours, theirs, name, inputs) for name, inputs in prompts]
        with ExitStack() as hooks:
            squares = block_squares(reference.sites, ours, theirs, hooks)
            expected = [_first_output(folder, ours, inputs) for inputs in samples]
        blocks = [(name, (off / all_) ** 0.5 if all_ else off**0.5) for name, (off, all_) in squares.items()]
        outputs = _compare_outputs(expected, [output_of(theirs, inputs) for inputs in samples]) if whole else None
    return blocks, outputs, texts if whole else []


def load(model: Model, dtype: torch.dtype = torch.float32, **placing: Any) -> Any:
    """The model in its own class from transformers, in eval mode; `placing`: options on where its weights are kept."""
    folder, kind = model.reader.folder, model_class(model)
    hint = "the checkpoint and its config.json do not fit; weights alone compare with --level weights"
    try:
        # Mismatched sizes are asked for as data, because as an exception they come without the names.
        options = {"output_loading_info": True, "ignore_mismatched_sizes": True} | LOCAL_ONLY | placing
        loaded, info = kind.from_pretrained(folder, dtype=dtype, **options)
    except Exception as error:  # whatever transformers raises, it is about this folder
        raise PessaError(f"transformers cannot load {folder}\n{listed(str(error).splitlines())}", hint) from error
    faults = [f"{name}: missing" for name in sorted(info["missing_keys"])]
    faults += [f"{name}: {tuple(found)}, the model has {tuple(own)}" for name, found, own in info["mismatched_keys"]]
    if faults:
        raise PessaError(f"{folder} does not have the weights of a {kind.__name__}\n{listed(faults)}", hint)
    return loaded.eval()


def model_class(model: Model) -> Any:
    """The class from transformers that config.json names, and whose construction runs no code of the checkpoint."""
    folder, names = model.reader.folder, model.reader.config.get("architectures")
    kind = getattr(transformers, str(names[0]), None) if isinstance(names, list) and names else None
    kernels = str(model.reader.config.get("attn_implementation") or "")
    if "/" in kernels:  # transformers would fetch and run it
        raise PessaError(f"{folder}: config.json asks for code from {kernels}", "take attn_implementation out of it")
    if not isinstance(names, list) or not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise PessaError(
            f"{folder}: config.json names no model of transformers under `architectures` ({names})",
            "add the class it was saved from, or compare weights alone: --level weights",
        )
    return kind


def from_folder(kind: Any, folder: Path, what: str) -> Any:
    """A tokenizer or processor. Raises PessaError when the folder has none."""
    try:
        return kind.from_pretrained(folder, **LOCAL_ONLY)
    except Exception as error:  # as above: there are many ways not to have one
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(f"{folder} has no {what}\n{reason}", "copy it there from the original model") from error


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """transformers' own progress bars and notes would stand among our results."""
    log = transformers.utils.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()


def _first_output(folder: Path, model: Any, inputs: Inputs) -> tuple[str, Tensor]:
    """The outputs of a model that may want more than we have to give."""
    try:
        return output_of(model, inputs)
    except (ValueError, TypeError, AttributeError) as error:
        reason = listed(str(error).splitlines(), most=1)
        raise PessaError(f"{folder} does not run on built-in inputs\n{reason}", WEIGHTS_ALONE) from error


def output_of(model: Any, inputs: Inputs) -> tuple[str, Tensor]:
    extra = {"use_cache": False} if hasattr(model.config.get_text_config(), "use_cache") else {}
    output = model(**inputs, **extra)
    logits = getattr(output, "logits", None)
    return ("hidden states", output[0]) if logits is None else ("logits", logits)


def _compare_outputs(expected: list[tuple[str, Tensor]], found: list[tuple[str, Tensor]]) -> Outputs:
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
    return Outputs(what, error, float(difference.max()), float(difference.mean()), kl, agreement)


def block_squares(sites: Sequence[Site], ours: Any, theirs: Any, hooks: ExitStack) -> dict[str, list[float]]:
    """Sums that go on while our model runs: of the squares of what each block of theirs does differently, and of ours.

    Whenever our model enters an attention block, theirs runs on the very same inputs; compared is what leaves the
    output projections.
    """
    squares = {site.name: [0.0, 0.0] for site in sites}
    for site in sites:

        def add(expected: Tensor, found: Tensor, sums: list[float] = squares[site.name]) -> None:
            expected = expected.double()
            sums[0] += float((expected - found.double()).square().sum())
            sums[1] += float(expected.square().sum())

        compare_block(site, ours, theirs, add, hooks)
    return squares


def compare_block(
    site: Site, ours: Any, theirs: Any, heard: Callable[[Tensor, Tensor], None], hooks: ExitStack
) -> None:
    """Tell `heard` at every call of a block what leaves its output projection, and what does in the other model."""
    (block, ours_at), (other_block, theirs_at) = modules_of(site, ours), modules_of(site, theirs)
    o, other_o = ours_at["o"], theirs_at["o"]
    seen: dict[str, Any] = {}

    def entered(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen["args"], seen["kwargs"] = args, kwargs

    def left(_module: nn.Module, _args: Any, output: Tensor) -> None:
        seen["expected"] = output

    def finished(*_: Any) -> None:
        if "expected" not in seen:
            raise PessaError(f"{site.name} reads the weights of its output projection directly", WEIGHTS_ALONE)
        found: list[Tensor] = []
        handle = other_o.register_forward_hook(lambda _m, _a, output: found.append(output))
        try:
            other_block(*seen["args"], **seen["kwargs"])
        finally:
            handle.remove()
        heard(seen["expected"], found[-1])

    hooks.callback(block.register_forward_pre_hook(entered, with_kwargs=True).remove)
    hooks.callback(o.register_forward_hook(left).remove)
    hooks.callback(block.register_forward_hook(finished).remove)


def modules_of(site: Site, model: Any) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The module that holds the block's four projections, and those, by their letter."""
    modules = dict(model.named_modules())
    found = module_names(model, {site.module(side) for side in "qkvo"})
    names = {side: found[site.module(side)] for side in "qkvo" if site.module(side) in found}
    if len(names) < len("qkvo"):
        raise PessaError(f"{type(model).__name__} has no module named {site.q}", "compare with --level weights")
    shared = 0
    q, o = names["q"].split("."), names["o"].split(".")
    while q[shared] == o[shared]:
        shared += 1
    return modules[".".join(q[:shared])], {side: modules[name] for side, name in names.items()}


def noise(model: Any, batch: int = 1) -> Inputs:
    """Built-in input for a speech model: one window of noise in the range of log-mel features, random tokens."""
    generator = torch.Generator().manual_seed(SEED)
    config = model.config
    features = torch.randn(batch, config.num_mel_bins, 2 * config.max_source_positions, generator=generator)
    length = min(64, config.max_target_positions)
    ids = torch.randint(config.vocab_size, (batch, length), generator=generator)
    ids[:, 0] = config.decoder_start_token_id
    return {"input_features": features.clamp(-1, 1.5), "decoder_input_ids": ids}


def _speech_inputs(model: Any, features: Tensor, ids: Tensor) -> Inputs:
    """The first window of a clip with the reference's own transcript as the decoder's input."""
    return {
        "input_features": features[..., : 2 * model.config.max_source_positions],
        "decoder_input_ids": ids[:, : model.config.max_target_positions],
    }


def _transcribe(folder: Path, models: tuple[Any, Any], samples: Any) -> tuple[list[str], tuple[Tensor, Tensor]]:
    """What each model hears under greedy decoding, and the reference's features and tokens."""
    processor = from_folder(transformers.AutoProcessor, folder, "preprocessor and tokenizer")
    inputs = listen(processor, samples)
    tokens = [write_down(model, inputs) for model in models]
    said = [processor.batch_decode(ids, skip_special_tokens=True)[0].strip() for ids in tokens]
    return said, (inputs["input_features"], tokens[0])


def listen(processor: Any, samples: NDArray[np.float32]) -> Inputs:
    """A clip as a speech model hears it: input_features (1, mels, frames), one window of them, or the whole clip.

    One that is longer than the window has an attention_mask (1, frames).
    """
    long = len(samples) > processor.feature_extractor.n_samples
    more = {"truncation": False, "padding": "longest", "return_attention_mask": True} if long else {}
    return dict(processor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt", **more))


def write_down(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    """The tokens that a speech model writes under greedy decoding, (clips, tokens).

    Options as for generate. Through clips that are longer than its window it finds its way by its timestamps.
    """
    features = inputs["input_features"].to(model.device, model.dtype)
    if features.shape[-1] > 2 * model.config.max_source_positions:
        options |= {"return_timestamps": True, "attention_mask": inputs["attention_mask"].to(model.device)}
    tokens: Tensor = model.generate(input_features=features, do_sample=False, num_beams=1, **options)
    return tokens


def _prompts(folder: Path, model: Any, paths: list[Path]) -> list[tuple[str, Inputs]]:
    """Token inputs for a text model: the given files', or a built-in passage, or random tokens for no tokenizer."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", TEXT_TOKENS)
    most = min(TEXT_TOKENS, positions - 2)  # RoBERTa counts from 2
    if not paths and not _has_tokenizer(folder):
        return [("random tokens", random_tokens(model, 2, min(64, most)))]
    contents = [(path.name, read_text(path)) for path in paths] or [("built-in text", PASSAGE)]
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    prompts: list[tuple[str, Inputs]] = []
    for name, content in contents:
        encoded = tokenizer(content, return_tensors="pt", truncation=True, max_length=most)
        prompts.append((name, {key: encoded[key] for key in ("input_ids", "attention_mask")}))
    return prompts


def signal(folder: Path, model: Any, batch: int = 1) -> Inputs:
    """Built-in input for a model that sees or hears: an image or two seconds of noise, and random tokens to answer.

    Raises UsageError for a model that takes something else.
    """
    generator, config = torch.Generator().manual_seed(SEED), model.config
    size = getattr(config, "image_size", 0)
    shapes = {
        "pixel_values": (getattr(config, "num_channels", 3), *((size, size) if isinstance(size, int) else size)),
        "input_values": (2 * SAMPLE_RATE,),
        "input_features": (200, getattr(config, "input_feat_per_channel", 0)),
    }
    shape = shapes.get(model.main_input_name, (0,))
    if 0 in shape:
        raise UsageError(f"{folder} takes {model.main_input_name}, of which there are no samples", WEIGHTS_ALONE)
    inputs = {model.main_input_name: torch.randn(batch, *shape, generator=generator)}
    return with_answer(model, inputs)


def with_answer(model: Any, inputs: Inputs) -> Inputs:
    """With something for the decoder, where there is an encoder, too: what it reads, or random tokens."""
    if not model.config.is_encoder_decoder:
        return inputs
    answer = inputs.get("input_ids")
    return inputs | {
        "decoder_input_ids": random_tokens(model, len(next(iter(inputs.values()))), 32)["input_ids"]
        if answer is None
        else answer
    }


def random_tokens(model: Any, batch: int, length: int) -> Inputs:
    """Built-in input for a text model without a tokenizer."""
    ids = torch.randint(
        model.config.get_text_config().vocab_size, (batch, length), generator=torch.Generator().manual_seed(SEED)
    )
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def read_text(path: Path, hint: str = "give a UTF-8 text file") -> str:
    """What is in a text file. Raises PessaError, with the hint, for one that cannot be read, and for an empty one."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PessaError(f"cannot read {path}: {error}", hint) from None
    if not content.strip():
        raise PessaError(f"{path} is empty", "give a file with some text")
    return content


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists()


def _continue(folder: Path, ours: Any, theirs: Any, name: str, inputs: Inputs) -> Text:
    """What both write after the first tokens of a text, as text if there is a tokenizer, else as token numbers."""
    prompt = {key: value[:1, :PROMPT_TOKENS] for key, value in inputs.items()}
    width = 0 if ours.config.is_encoder_decoder else prompt["input_ids"].shape[1]
    tokens = [
        model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1)[0, width:].tolist()
        for model in (ours, theirs)
    ]
    if not _has_tokenizer(folder):
        return Text(name, *(" ".join(map(str, ids)) for ids in tokens))
    tokenizer = from_folder(transformers.AutoTokenizer, folder, "tokenizer")
    return Text(name, *(tokenizer.decode(ids) for ids in tokens))
