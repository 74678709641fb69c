"""Compare the cost of initialising PESSA adapters with PiSSA's exact SVD, on LLaMA layers with random weights.

Adapters are on q, k and v: PESSA with full d x d matrices, the others with the rank that gives the same number of
trained parameters. Each method runs in a separate process on one thread, once on a tiny model as a warm-up, then on a
new model in each round. CPU time is measured, so that other load on the machine has little effect. All figures include
the time of PEFT itself, which LoRA shows because it decomposes nothing; the last columns subtract it.

    python scripts/bench_init.py [--shapes smollm2-135m llama-2-7b] [--layers 1 --rounds 15 --seconds 60]
    python scripts/bench_init.py --hidden 4096 --heads 32 --kv-heads 8
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from typing import Any, NamedTuple

TARGETS = ["q_proj", "k_proj", "v_proj"]
METHODS = ("lora", "pessa", "pissa")


class Shape(NamedTuple):
    """The attention sizes of a LLaMA model."""

    hidden: int
    heads: int
    kv_heads: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def rank(self) -> int:
        """The rank at which LoRA and PiSSA have nearly as many parameters as PESSA's d x d matrices."""
        trained = (self.heads + 2 * self.kv_heads) * self.head_dim**2
        a_rank = 3 * self.hidden + (self.heads + 2 * self.kv_heads) * self.head_dim
        return max(1, round(trained / a_rank))


SHAPES = {
    "smollm2-135m": Shape(576, 9, 3),
    "smollm2-1.7b": Shape(2048, 32, 32),
    "llama-3-8b": Shape(4096, 32, 8),
    "llama-2-7b": Shape(4096, 32, 32),
}


def build(shape: Shape, layers: int) -> Any:
    """Build a model with these attention sizes and weights from N(0, 0.02); its other parts are small and not used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        num_hidden_layers=layers,
        intermediate_size=64,
        vocab_size=64,
        initializer_range=0.02,
    )
    return LlamaForCausalLM(config)


def one(method: str, shape: Shape, layers: int, rounds: int, seconds: float) -> dict[str, Any]:
    """Return the CPU times of a method in this process, from at most `rounds` rounds begun within `seconds`."""
    import torch

    from pessa_cli.tuning.registry import attach, build_config

    torch.set_num_threads(1)
    torch.manual_seed(0)

    def start(at: Shape) -> tuple[float, int]:
        base = build(at, layers)
        options = {"qk": "full"} if method == "pessa" else {}
        config = build_config(method, None if method == "pessa" else at.rank, TARGETS, **options)
        gc.collect()
        begin = time.process_time()
        model = attach(base, config)
        took = time.process_time() - begin
        return took, sum(p.numel() for p in model.parameters() if p.requires_grad)

    start(Shape(64, 4, 2))
    until = time.perf_counter() + seconds
    times: list[float] = []
    parameters = 0
    while len(times) < rounds and (not times or time.perf_counter() < until):
        took, parameters = start(shape)
        times.append(took)
    return {"times": times, "parameters": parameters}


def measure(method: str, shape: Shape, args: argparse.Namespace) -> tuple[float, int]:
    """Return the median CPU time of a method and its number of trained parameters, measured in a separate process."""
    command = [sys.executable, __file__, "--one", method, *map(str, shape), "--layers", str(args.layers)]
    command += ["--rounds", str(args.rounds), "--seconds", str(args.seconds)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{method} failed\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    median = statistics.median(found["times"])
    spread = f"{min(found['times']):.4f} to {max(found['times']):.4f}"
    print(f"{method}, {shape}: {median:.4f} CPU s, {spread} in {len(found['times'])}", file=sys.stderr, flush=True)
    return median, found["parameters"]


def row(name: str, shape: Shape, args: argparse.Namespace) -> str:
    cost = {method: measure(method, shape, args) for method in METHODS}
    (lora, _), (pessa, ours), (pissa, theirs) = (cost[method] for method in METHODS)
    return (
        f"| {name} | {shape.hidden} | {shape.heads} / {shape.kv_heads} | {ours:,} / {theirs:,} "
        f"| {lora:.4f} | {pessa:.4f} | {pissa:.3f} | {pessa / pissa:.2%} "
        f"| {pessa - lora:.4f} | {pissa - lora:.3f} | {(pessa - lora) / (pissa - lora):.2%} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--hidden", type=int, help="the width D of another shape, in place of --shapes")
    parser.add_argument("--heads", type=int, default=32, help="query heads of the other shape")
    parser.add_argument("--kv-heads", type=int, default=32, help="key and value heads of the other shape")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of each method; the median is reported")
    parser.add_argument(
        "--seconds", type=float, default=60, help="begin no further round of a method after this many seconds"
    )
    parser.add_argument("--one", nargs=4, metavar=("METHOD", "HIDDEN", "HEADS", "KV_HEADS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        shape = Shape(*map(int, args.one[1:]))
        print(json.dumps(one(args.one[0], shape, args.layers, args.rounds, args.seconds)))
        return
    shapes = {name: SHAPES[name] for name in args.shapes}
    if args.hidden:
        shapes = {f"D = {args.hidden}": Shape(args.hidden, args.heads, args.kv_heads)}
    rows = [row(name, shape, args) for name, shape in shapes.items()]
    print(f"CPU seconds of the start, {args.layers} layer(s), float32, 1 thread")
    print("| shape | D | heads, key/value heads | trained, PESSA / others | LoRA | PESSA | PiSSA | ratio ", end="")
    print("| PESSA less LoRA | PiSSA less LoRA | ratio |")
    print("|---" * 11 + "|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
