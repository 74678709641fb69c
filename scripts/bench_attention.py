"""Measure bucketed attention: modules of the size of Whisper-large-v3, a whole Whisper model, and the cache.

Every figure is a ratio to the original's time, the median over runs that alternate with the original in one process.
The weights are random, and the ranks differ between heads and between Q-K and V-O. As in a model, decoding steps use
several blocks in turn, each with its own weights and 1500 cached frames, so that these are read from memory and not
from the processor's cache.

    python scripts/bench_attention.py [--device cpu --dtype float32 --threads 2 --rounds 9] [--model whisper-tiny.en]
    python scripts/bench_attention.py --calibrate    # the constants of runtime/bucketed_attention.py for this device
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.whisper.modeling_whisper import WhisperAttention

import pessa_cli
from pessa_cli.blocks.compact_format import Ragged, Ranks
from pessa_cli.ranks.rule import Rule
from pessa_cli.runtime.bucketed_attention import HeadRun
from pessa_cli.runtime.compact_linear import RaggedIn, RaggedOut
from pessa_cli.runtime.patched_attention import patch_attention
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model

WIDTH, HEADS, HEAD_DIM, FRAMES = 1280, 20, 64, 1500
BACKENDS = ("scatter", "bucketed", "auto")
Ratios = dict[str, float]


def uneven(mean: int, seed: int) -> Ranks:
    """Return ranks with the given mean, from an eighth of it upwards, in random order."""
    reach = 0.875 * min(mean, HEAD_DIM - mean)
    ranks = [round(mean + reach * (2 * i / (HEADS - 1) - 1)) for i in range(HEADS)]
    order = torch.randperm(HEADS, generator=torch.Generator().manual_seed(seed))
    return tuple(ranks[i] for i in order)


RANKS: dict[str, tuple[Ranks, Ranks]] = {
    "28 / 40": (uneven(28, 1), uneven(40, 2)),
    "28 / 28": (uneven(28, 1), uneven(28, 2)),
    "full": ((64,) * HEADS, (64,) * HEADS),
    "63 / 63": ((63,) * HEADS, (63,) * HEADS),
    "1 to 63, odd": (tuple(range(1, 61, 3)), tuple(range(63, 23, -2))),
    "half of the heads 0": ((0, 64) * 10, (64, 0) * 10),
    "one head whole": ((64,) + (1,) * 19, (64,) + (1,) * 19),
    "0 / 0": ((0,) * HEADS, (0,) * HEADS),
}


class Block(nn.Module):
    """One Whisper attention block with random weights, original or with these ranks."""

    def __init__(self, ranks: tuple[Ranks, Ranks] | None, decoder: bool) -> None:
        super().__init__()
        config = transformers.WhisperConfig(attn_implementation="sdpa")
        self.attention = WhisperAttention(WIDTH, HEADS, is_decoder=decoder, layer_idx=0, config=config)
        if ranks is None:
            return
        for name, kind, side, of in (
            ("q_proj", RaggedOut, "rows", ranks[0]),
            ("k_proj", RaggedOut, "rows", ranks[0]),
            ("v_proj", RaggedOut, "rows", ranks[1]),
            ("out_proj", RaggedIn, "columns", ranks[1]),
        ):
            setattr(self.attention, name, kind(getattr(self.attention, name), Ragged(side, HEAD_DIM, of)))
        patch_attention(self)


def alternating(
    runs: dict[str, Callable[[], object]], args: argparse.Namespace, times_as_many: int = 1
) -> dict[str, float]:
    """Run the functions in turns, and return the median time of each in seconds."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(times_as_many * args.rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if args.device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(taken[1:]) for name, taken in times.items()}  # the first round is a warm-up


def ratios(
    original: Callable[[], object], ours: Callable[[], object], args: argparse.Namespace, times_as_many: int = 1
) -> Ratios:
    """Return the ratio of the compact model's time to the original's, for each backend."""

    def within(backend: Any) -> Callable[[], object]:
        def run() -> object:
            pessa_cli.set_backend(backend)
            return ours()

        return run

    runs = {"original": original} | {backend: within(backend) for backend in BACKENDS}
    seconds = alternating(runs, args, times_as_many)
    pessa_cli.set_backend("auto")
    return {backend: seconds[backend] / seconds["original"] for backend in BACKENDS}


def encoding(ranks: tuple[Ranks, Ranks], args: argparse.Namespace) -> Ratios:
    """Measure an encoder's attention over 1500 frames."""
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    original, ours = (Block(r, decoder=False).eval().to(**to) for r in (None, ranks))
    x = torch.randn(args.batch, FRAMES, WIDTH, **to)
    return ratios(lambda: original.attention(x), lambda: ours.attention(x), args)


def decoding(ranks: tuple[Ranks, Ranks], args: argparse.Namespace) -> tuple[Ratios, float]:
    """Measure one step of a decoder's cross-attention to 1500 cached frames, and the ratio of the caches' bytes."""
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    original, ours = ([Block(r, decoder=True).eval().to(**to) for _ in range(args.blocks)] for r in (None, ranks))
    frames = torch.randn(args.batch, FRAMES, WIDTH, **to)
    x = torch.randn(args.batch, 1, WIDTH, **to)
    filled: dict[tuple[str, bool], list[Any]] = {}

    def step(blocks: list[Block]) -> object:
        key = (pessa_cli.get_backend(), blocks is ours)
        if key not in filled:
            filled[key] = [new_cache() for _ in blocks]
        for block, cache in zip(blocks, filled[key], strict=True):
            out = block.attention(x, key_value_states=frames, past_key_values=cache)
        return out

    found = ratios(lambda: step(original), lambda: step(ours), args, 4)
    before, after = (cached_bytes(filled[key][0]) for key in ((next(k for k in filled if not k[1])), ("auto", True)))
    return found, after / before


def new_cache() -> Any:
    return transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())


def cached_bytes(cache: Any) -> int:
    """Return the bytes of the cached keys and values of self-attention and cross-attention."""
    parts = [layer for half in (cache.self_attention_cache, cache.cross_attention_cache) for layer in half.layers]
    return sum(side.numel() * side.element_size() for layer in parts for side in (layer.keys, layer.values))


def whole_model(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Ratios], float]:
    """Measure a Whisper pruned to half of its attention: its encoder, 32 decoding steps, and the bytes of its cache."""
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    kind = transformers.WhisperForConditionalGeneration
    with tempfile.TemporaryDirectory() as scratch:
        prune_model(open_model(folder), Path(scratch) / "half", Rule(ratio=0.5))
        original, ours = (kind.from_pretrained(f).eval().to(**to) for f in (folder, Path(scratch) / "half"))
    config = original.config
    features = torch.randn(1, config.num_mel_bins, 2 * config.max_source_positions, **to).clamp(-1, 1.5)
    caches: dict[tuple[str, bool], Any] = {}

    def decode(model: Any) -> object:
        """Decode a fixed number of steps, since the greedy texts of two models may differ in length."""
        states = encoded[model]
        cache = new_cache()
        for token in range(32):
            ids = torch.full((1, 1), 1000 + token, device=args.device)
            model(encoder_outputs=(states,), decoder_input_ids=ids, past_key_values=cache)
        caches[pessa_cli.get_backend(), model is ours] = cache
        return cache

    encoded = {model: model.model.encoder(features).last_hidden_state for model in (original, ours)}
    encoders = [model.model.encoder for model in (original, ours)]
    found = {
        "encoder": ratios(lambda: encoders[0](features), lambda: encoders[1](features), args),
        "32 tokens": ratios(lambda: decode(original), lambda: decode(ours), args),
    }
    before = next(cache for (_, is_ours), cache in caches.items() if not is_ours)
    return found, cached_bytes(caches["auto", True]) / cached_bytes(before)


def calibrate(args: argparse.Namespace) -> None:
    """Fit call + heads * (head + width * w + stored * 2 s) to a grid of calls, by relative least squares."""
    to = {"device": args.device, "dtype": getattr(torch, args.dtype)}
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]
    module: Any = nn.Module().eval()
    module.is_causal = False
    for queries, copies in ((FRAMES, 1), (1, 24)):
        rows, taken = [], []
        for heads, stored, width in [
            (h, s, w) for h in (20, 10, 5, 2) for w in (16, 24, 32, 40, 48, 64) for s in {w, w // 2 // 8 * 8}
        ]:
            query = torch.randn(1, queries, heads * width, **to)
            keys = torch.randn(copies, 2, 1, 1, FRAMES, heads * stored + 1, **to)
            q, kv = HeadRun(0, heads, width, width).of_rows(query), HeadRun(0, heads, stored, width)

            def calls(q: Tensor = q, kv: HeadRun = kv, keys: Tensor = keys) -> None:
                for k, v in keys:
                    kernel(module, q, kv.of_packed(k), kv.of_packed(v), None, scaling=0.125)

            micros = alternating({"call": calls}, args, 3)["call"] * 1e6 / copies
            rows.append([1.0, heads, heads * width, heads * 2 * stored])
            taken.append(micros)
            print(f"{queries:5} queries, {heads:3} heads stored {stored:3}, computed {width:3} wide: {micros:9.1f} us")
        a, b = torch.tensor(rows).double(), torch.tensor(taken).double()
        fit = torch.linalg.lstsq(a / b[:, None], torch.ones_like(b)[:, None]).solution.flatten().tolist()
        names = ("call", "head", "width", "stored")
        print(f"{queries} queries: " + ", ".join(f"{name}={value:.3g}" for name, value in zip(names, fit, strict=True)))


def row(name: str, found: Ratios, cache: str = "") -> None:
    print(f"| {name} | " + " | ".join(f"{found[backend]:.2f}" for backend in BACKENDS) + f" | {cache} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--blocks", type=int, default=8, help="number of cross-attention blocks in a decoding step")
    parser.add_argument("--ranks", nargs="*", default=list(RANKS), help="rows of the table (default: all)")
    parser.add_argument("--model", type=Path, help="a Whisper folder, which is pruned to half of its attention")
    parser.add_argument("--cpu-time", action="store_true", help="measure CPU time with one thread, for busy machines")
    parser.add_argument("--calibrate", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with torch.no_grad():
        if args.calibrate:
            calibrate(args)
            return
        print("| time to the original's | " + " | ".join(BACKENDS) + " | cache |\n|---|---|---|---|---|")
        for name in args.ranks:
            row(f"encoder block, {name}", encoding(RANKS[name], args))
        for name in args.ranks:
            found, cache = decoding(RANKS[name], args)
            row(f"decoding step, {name}", found, f"{cache:.2f}")
        if args.model is not None:
            whole, cache = whole_model(args.model, args)
            for name, found in whole.items():
                row(f"{args.model.name} by half, {name}", found, f"{cache:.2f}" if name != "encoder" else "")


if __name__ == "__main__":
    main()
