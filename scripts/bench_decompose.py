"""Compare the decomposition of one attention block of the size of Whisper-large-v3 by pessa and by the dense product.

The dense route is that of the research code: the D x D product of every head, then its full SVD. Both run on the same
float32 weights, in one process and on one thread. CPU time is measured, so that other load on the machine has little
effect. The error is that of the full-rank factors against the product of the float32 weights in float64.

    python scripts/bench_decompose.py [--width 1280 --heads 20 --head-dim 64 --rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pessa_cli.algebra.absorb import Pair
from pessa_cli.algebra.decompose import decompose

T = TypeVar("T")


def ours(pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Decompose as pessa does: thin QR and a d x d SVD in float64; returns balanced factors in float32."""
    found = [decompose(Pair(pair.left.double(), pair.right.double())) for pair in pairs]
    return [(factors.left.float(), factors.right.float()) for factors in found]


def dense(pairs: list[Pair]) -> list[tuple[Tensor, Tensor]]:
    """Decompose head by head with the full SVD of the D x D product in the weights' dtype, truncated and balanced."""
    found = []
    for pair in pairs:
        width = pair.left.shape[-1]
        left, right = [], []
        for a, b in zip(pair.left, pair.right, strict=True):
            u, s, vh = torch.linalg.svd(a @ b.T, full_matrices=False)
            left.append(u[:, :width] * s[:width].sqrt())
            right.append(vh[:width].T * s[:width].sqrt())
        found.append((torch.stack(left), torch.stack(right)))
    return found


def error(pairs: list[Pair], factors: list[tuple[Tensor, Tensor]]) -> float:
    """Return the largest relative Frobenius error of a head's product."""
    worst = 0.0
    for pair, (left, right) in zip(pairs, factors, strict=True):
        for head in range(left.shape[0]):
            product = pair.left[head].double() @ pair.right[head].double().T
            found = left[head].double() @ right[head].double().T
            worst = max(worst, float((found - product).norm() / product.norm()))
    return worst


def timed(route: Callable[[], T]) -> tuple[float, T]:
    """Return the CPU seconds of all threads of the process, and the function's result."""
    start = time.process_time()
    result = route()
    return time.process_time() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1280, help="D, the model's width")
    parser.add_argument("--heads", type=int, default=20)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5, help="repetitions of pessa's route; the median is reported")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = (args.heads, args.width, args.head_dim)
    scale = args.width**-0.5
    pairs = [Pair(torch.randn(shape) * scale, torch.randn(shape) * scale) for _ in ("Q-K", "V-O")]
    ours(pairs)  # the first call is not timed, because it loads the linear algebra library
    runs = [timed(lambda: ours(pairs)) for _ in range(args.rounds)]
    our_time, our_error = statistics.median(seconds for seconds, _ in runs), error(pairs, runs[-1][1])
    dense_time, found = timed(lambda: dense(pairs))
    print(f"one attention block, D = {args.width}, {args.heads} heads of {args.head_dim}, float32, 1 thread")
    print(f"{'route':24}{'CPU seconds':>14}{'relative error':>18}")
    print(f"{'pessa (QR + d x d SVD)':24}{our_time:14.3f}{our_error:18.2e}")
    print(f"{'dense product + SVD':24}{dense_time:14.3f}{error(pairs, found):18.2e}")
    print(f"ratio {dense_time / our_time:.0f}")


if __name__ == "__main__":
    main()
