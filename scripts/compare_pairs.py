"""The README's table on RoPE: SmolLM2-135M without some of its frequency pairs, and directions of V-O, on a text.

Calibrated on the end of the text; the perplexity is over windows of 512 tokens from its beginning.

    python scripts/compare_pairs.py $PESSA_DATA/text/wikitext2-valid.txt [--shares 0.1:0,0.2:0] [--windows 20]
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from fetch_models import fetch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from pessa_cli.calibrate import collect
from pessa_cli.model import open_model
from pessa_cli.pipeline import prune_model
from pessa_cli.ranks import Rule
from pessa_cli.report import totals
from pessa_cli.statistics import Statistics

WINDOW = 512


def perplexity(folder: Path, windows: torch.Tensor) -> float:
    """Of a model over windows of tokens, (windows, WINDOW); in bfloat16, which halves the time."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.inference_mode():
        logits = (model(input_ids=window.unsqueeze(0)).logits[0, :-1].float() for window in windows)
        losses = [torch.nn.functional.cross_entropy(of, ids[1:]) for of, ids in zip(logits, windows, strict=True)]
    return math.exp(float(torch.stack(losses).mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--shares", default="0.1:0,0.2:0,0.3:0,0.5:0", help="of pairs and of V-O, to drop")
    parser.add_argument("--windows", type=int, default=20, help="to measure on")
    parser.add_argument("--calibration", type=int, default=45_000, help="characters to calibrate on")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = fetch("smollm2-135m")
    model, text = open_model(source), args.text.read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(source)(text[: -args.calibration], return_tensors="pt").input_ids[0]
    windows = ids[: args.windows * WINDOW].view(-1, WINDOW)
    original = perplexity(source, windows)

    with tempfile.TemporaryDirectory() as folder:
        end, file, started = Path(folder) / "end.txt", Path(folder) / "statistics.safetensors", time.perf_counter()
        end.write_text(text[-args.calibration :], encoding="utf-8")
        collect(model, model.sites, [end], file)
        print(f"perplexity {original:.2f}, calibrated in {time.perf_counter() - started:.0f} s\n")
        print("| pairs of Q-K | V-O | attention | weights alone | calibrated |\n|---|---|---|---|---|")
        for pairs, vo in (map(float, share.split(":")) for share in args.shares.split(",")):
            rule, found = Rule(rope_ratio=pairs or None, ratio=vo or None), []
            for statistics in (None, Statistics(file)):
                out = Path(tempfile.mkdtemp(dir=folder)) / "out"
                written = prune_model(model, out, rule, statistics=statistics)
                found.append(perplexity(out, windows) / original - 1)
            left = totals(model.reader.header, model.sites, model.sites, written.ranks)["attention_pruned"]
            print(f"| {pairs:.0%} | {vo:.0%} | {left:.1%} | {found[0]:+.1%} | {found[1]:+.1%} |", flush=True)


if __name__ == "__main__":
    main()
