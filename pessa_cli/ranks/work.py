"""The work of blocks at run time: multiply-adds for inputs of a stated length.

With n positions that ask (queries), m positions that are read (keys), and p pairs of the two that attention compares,
a block of matrices with these numbers of weights makes

    attention:  n (|W_Q| + |W_O|) + m (|W_K| + |W_V|) + p * sum over query heads of (Q-K rank + V-O rank)
    an MLP:     n (sum of all weights)

multiply-adds; one counts as two floating-point operations. What n, m and p are follows from the audio or text that the
model is run on:

    encoder.*:       n = m = f, p = f^2                for f positions in a window, once for each window
    decoder.*:       n = m = t, p = t (t + 1) / 2      for t tokens in a window: each sees itself and those before it
    decoder.cross:   n = t, m = f, p = t f             keys and values are computed once for each window

Whether the tokens of a decoder are read at once or generated one by one with a cache makes no difference to these
numbers. Everything else, such as biases, norms, softmax, convolutions and the output layer, is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pessa_cli.blocks.compact_format import Ranks
from pessa_cli.blocks.site import AttentionSite, Site
from pessa_cli.common.errors import UsageError
from pessa_cli.ranks.plan import RankPlan
from pessa_cli.ranks.rule import Rule
from pessa_cli.ranks.spectra import Size

STACKS = ("encoder", "decoder")
SECONDS = 30.0  # of audio, by default
TOKENS_PER_SECOND = 100 / 30  # of a decoder that writes down speech: about 150 English words a minute
TOKENS = 512  # that a text model reads, by default


class Hearing(NamedTuple):
    """How an encoder reads audio: its positions per second, and the seconds that each window is padded to, if any."""

    rate: float
    window: float | None = None


# By model type, with the strides of the published models: of 10 ms frames, or of samples at 16 kHz.
HEARING = {
    "whisper": Hearing(100 / 2, 30.0),
    "speech_to_text": Hearing(100 / 4),
    "wav2vec2": Hearing(16000 / 320),
    "hubert": Hearing(16000 / 320),
    "wavlm": Hearing(16000 / 320),
    "moonshine": Hearing(16000 / 384),
}


@dataclass(frozen=True)
class Work:
    """Inputs of a stated length, by which the work of blocks is counted.

    frames, tokens: the positions of the encoder and of the decoder in each window. windows: how many there are.
    """

    frames: float
    tokens: float
    windows: int = 1

    @staticmethod
    def of(rule: Rule, whole: Size) -> Work:
        """Return the work that a rule states by `seconds` and `tokens` for a model.

        A model that hears reads 30 seconds by default, and its decoder 100 tokens in each 30 seconds; all parts of a
        text model read `tokens`, by default 512. Raises UsageError if `seconds` is given for a model that hears no
        audio.
        """
        hearing = HEARING.get(whole.model_type)
        if hearing is None:
            if rule.seconds is not None:
                raise UsageError(
                    f"--seconds {rule.seconds:g}: the length of audio is not known for a model of type "
                    f"{whole.model_type or 'unknown'}",
                    "leave it out, and give the number of positions with --tokens",
                )
            tokens = float(rule.tokens or TOKENS)
            return Work(tokens, tokens)
        seconds = SECONDS if rule.seconds is None else rule.seconds
        windows = 1 if hearing.window is None else math.ceil(seconds / hearing.window)
        length = seconds if hearing.window is None else hearing.window
        tokens = seconds * TOKENS_PER_SECOND if rule.tokens is None else float(rule.tokens)
        return Work(hearing.rate * length, tokens / windows, windows)

    def multiply_adds(self, site: Site, ranks: Mapping[str, Ranks]) -> float:
        """Return the multiply-adds of a block with these ranks, by the name of the seam; see the module's formulas."""
        asking, read, pairs = self._positions(site.kind)
        shapes = site.shapes(ranks)
        positions = {site.module(letter): read if letter in ("k", "v") else asking for letter in site.modules}
        total = sum(math.prod(shapes[f"{module}.weight"]) * each for module, each in positions.items())
        if isinstance(site, AttentionSite):
            total += site.group * pairs * (sum(ranks["qk"]) + sum(ranks["vo"]))
        return self.windows * total

    def _positions(self, kind: str) -> tuple[float, float, float]:
        """Return the numbers of positions that ask and that are read, and of the pairs that attention compares."""
        stack, _, last = kind.rpartition(".")
        if last == "cross":
            return self.tokens, self.frames, self.tokens * self.frames
        if stack == "encoder":
            return self.frames, self.frames, self.frames**2
        return self.tokens, self.tokens, self.tokens * (self.tokens + 1) / 2


def check_work(sites: Sequence[Site], rule: Rule, whole: Size) -> None:
    """Raise UsageError for a budget of work if the inputs of the chosen blocks do not have the lengths that it states.

    That is so for `seconds` if the model hears no audio, and for models with several parts.
    """
    if rule.target_flops is None:
        return
    Work.of(rule, whole)
    parts = dict.fromkeys(site.kind.partition(".")[0] for site in sites if site.kind.partition(".")[0] not in STACKS)
    crossing = any(site.kind.endswith(".cross") for site in sites)
    if len(parts) > 1 or (parts and crossing):
        raise UsageError(
            f"--target-flops: the inputs of the parts of this model ({', '.join(parts)}) have lengths of their own",
            f"choose the blocks of one part: --sites {next(iter(parts))}.self",
        )


def work_of(sites: Sequence[Site], plan: RankPlan, rule: Rule, whole: Size) -> dict[str, float] | None:
    """Return the floating-point operations of the chosen blocks before and after, and what they are counted for.

    share: what remains of the operations, from 0 to 1. windows, frames, tokens: as in `Work`. None if the rule has no
    budget of work.
    """
    if rule.target_flops is None:
        return None
    work = Work.of(rule, whole)
    before = sum(work.multiply_adds(site, site.ranks) for site in sites)
    after = sum(work.multiply_adds(site, plan.ranks[site.name]) for site in sites)
    counted = {"windows": work.windows, "frames": work.frames, "tokens": work.tokens}
    return {"flops": 2 * before, "flops_after": 2 * after, "share": after / before, **counted}
