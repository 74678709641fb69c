"""Compress the encoder of a Whisper by LiteASR's method, to compare with, and score it.

    python scripts/liteasr_baseline.py models/whisper-tiny.en --calibrate out/speech/calibrate/clips.jsonl \\
        --clips out/speech/score/clips.jsonl --shares 0.9 0.8 0.7

LiteASR (Kamahori et al., arXiv:2502.20583) projects the outputs of each linear layer, Y = X W + b with mean m over the
calibration data, on their first k principal components V: Y is about X (W V) V' + m + (b - m) V V', which are two
smaller layers. Each linear layer of the encoder's layers is compressed on its own, from statistics of the original
model, and left as it is where the two would not have fewer weights. Two rules choose k:

- energy: the paper's. The smallest k whose components have a share of the variance, the same for all linear layers.
- ratio: the two smaller layers have the same share of the weights of each linear layer.

--shares are those of all parameters in the encoder's layers, also norms and biases; the level of the rule is the
largest that keeps no more. The paper's faster self-attention computes the same in less time, so it does not matter
here.
"""

from __future__ import annotations

import argparse
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from speech_scores import HEADINGS, cells, layer_parameters, prepare, row, score
from torch import Tensor, nn
from transformers import WhisperProcessor

from pessa_cli.evaluation.word_errors import read_clips
from pessa_cli.models.audio import load_audio
from pessa_cli.models.inputs import clip_features
from pessa_cli.models.load import quiet_transformers

STEPS = 50  # of the bisection for the level of a rule


@dataclass(frozen=True)
class Components:
    """The mean of a layer's outputs, (out,), the variances, (out,), largest first, and directions, (out, out)."""

    mean: Tensor
    variances: Tensor
    directions: Tensor

    @classmethod
    def of(cls, total: Tensor, products: Tensor, count: int) -> Components:
        """From sums over outputs, all in float64: of the outputs, (out,), and of their products, (out, out)."""
        mean = total / count
        variances, directions = torch.linalg.eigh(products / count - torch.outer(mean, mean))
        return cls(mean, variances.flip(0).clamp(min=0), directions.flip(1))


Rule = Callable[[nn.Linear, Components, float], int]


def by_energy(_: nn.Linear, found: Components, level: float) -> int:
    """The smallest number of components that have at least a share of the variance."""
    shares = found.variances.cumsum(0) / found.variances.sum()
    return min(int((shares < level).sum()) + 1, len(shares))


def by_ratio(linear: nn.Linear, _: Components, level: float) -> int:
    """The largest number of components, and at least one, with at most a share of the layer's weights."""
    return max(1, math.floor(level * linear.weight.numel() / sum(linear.weight.shape)))


RULES: dict[str, Rule] = {"ratio": by_ratio, "energy": by_energy}


def linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers in the layers of a Whisper's encoder, by their names."""
    return {name: part for name, part in model.model.encoder.layers.named_modules() if isinstance(part, nn.Linear)}


@torch.inference_mode()
def components(model: Any, windows: Sequence[Tensor]) -> dict[str, Components]:
    """Run the encoder on windows, (1, mels, frames) each, and find the principal components of all linear layers."""
    layers = linears(model)
    sums = {name: torch.zeros(layer.out_features + 1, layer.out_features).double() for name, layer in layers.items()}
    counts = dict.fromkeys(layers, 0)

    def add(name: str, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> None:
        frames = output.reshape(-1, output.shape[-1]).double()
        sums[name][0] += frames.sum(0)
        sums[name][1:] += frames.T @ frames
        counts[name] += len(frames)

    hooks = [layer.register_forward_hook(partial(add, name)) for name, layer in layers.items()]
    for window in windows:
        model.model.encoder(window.to(model.dtype))
    for hook in hooks:
        hook.remove()
    return {name: Components.of(each[0], each[1:], counts[name]) for name, each in sums.items()}


def smaller(linear: nn.Linear, kept: int) -> bool:
    """Whether the low-rank form of a layer has fewer weights."""
    return kept * sum(linear.weight.shape) < linear.weight.numel()


@torch.no_grad()
def low_rank(linear: nn.Linear, found: Components, kept: int) -> nn.Sequential:
    """Replace a layer by the projection of its outputs on the first components."""
    directions = found.directions[:, :kept]
    bias = torch.zeros(linear.out_features).double() if linear.bias is None else linear.bias.double()
    down, up = nn.Linear(linear.in_features, kept, bias=False), nn.Linear(kept, linear.out_features)
    down.weight.copy_(directions.T @ linear.weight.double())
    up.weight.copy_(directions)
    up.bias.copy_(found.mean + directions @ (directions.T @ (bias - found.mean)))
    return nn.Sequential(down, up).to(linear.weight.dtype)


def compressed(model: Any, found: Mapping[str, Components], rule: Rule, level: float) -> Any:
    """A copy of a model with low-rank linear layers in its encoder's layers."""
    new = copy.deepcopy(model)
    for name, linear in linears(new).items():
        if smaller(linear, kept := rule(linear, found[name], level)):
            new.model.encoder.layers.set_submodule(name, low_rank(linear, found[name], kept))
    return new


def level_for(model: Any, found: Mapping[str, Components], rule: Rule, share: float) -> float:
    """The largest level of a rule that keeps at most a share of the parameters of the encoder's layers.

    Raises ValueError for a share that not even a level of 0, with one component each, reaches.
    """
    layers, whole = linears(model), layer_parameters(model)[0]

    def left(level: float) -> int:
        size = whole
        for name, linear in layers.items():
            if smaller(linear, kept := rule(linear, found[name], level)):
                size += kept * sum(linear.weight.shape) - linear.weight.numel()
                size += linear.out_features if linear.bias is None else 0  # the mean needs a bias
        return size

    low, high = 0.0, 1.0
    if left(low) > share * whole:
        raise ValueError(f"one component each leaves {left(low) / whole:.3f} of the layers, more than {share}")
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) <= share * whole else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="a folder with a Whisper")
    parser.add_argument("--calibrate", type=Path, required=True, help="JSON lines with clips to calibrate on")
    parser.add_argument("--clips", type=Path, required=True, help="JSON lines with clips to score on, {audio, text}")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.8, 0.7], help="of the encoder's layers to keep")
    parser.add_argument("--rules", nargs="+", choices=RULES, default=list(RULES))
    parser.add_argument("--no-words", action="store_true", help="do not transcribe, which takes most of the time")
    args = parser.parse_args()
    heard, scored = read_clips(args.calibrate), read_clips(args.clips)
    if common := {clip.sha256 for clip in heard} & {clip.sha256 for clip in scored}:
        parser.error(f"{len(common)} clips of --calibrate are also in --clips")
    with quiet_transformers():
        model, of = prepare(args.model, args.clips)
        processor = WhisperProcessor.from_pretrained(args.model)
        window = 2 * model.config.max_source_positions
        features = [clip_features(processor, load_audio(clip.file))["input_features"] for clip in heard]
        found = components(model, [part for each in features for part in each.split(window, -1)])
        print(row(["rule", "level", "encoder layers", *HEADINGS]))
        print("|---" * 6 + "|")
        print(row(["original", "", "1.000", *cells(score(model, of, not args.no_words))]), flush=True)
        for share in args.shares:
            for name in args.rules:
                level = level_for(model, found, RULES[name], share)
                new = compressed(model, found, RULES[name], level)
                left = layer_parameters(new)[0] / layer_parameters(model)[0]
                print(row([name, f"{level:.6f}", f"{left:.3f}", *cells(score(new, of, not args.no_words))]), flush=True)


if __name__ == "__main__":
    main()
