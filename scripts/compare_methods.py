"""Make the README's table of Whisper tiny.en pruned by pessa and by the vanilla baseline, on one clip at equal ratios.

Vanilla ranks the original dimensions of each head by the product of their L2 norms. The reference is the original
model's own transcript; the word error rate counts words that differ from it, normalised as Whisper's papers do.

    python scripts/compare_methods.py [--sites encoder.self] [--ratios 0.05,0.1] [--clip FILE]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.utils import logging

from pessa_cli.blocks.site import select
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.word_errors import compare_words, transcribe
from pessa_cli.models.audio import load_audio
from pessa_cli.models.inputs import Inputs, clip_features
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.surgery.totals import totals


def heard(folder: Path, clip: Inputs, processor: Any) -> str:
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    return transcribe(model, processor, [clip], ScoreSettings(new_tokens=100))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", default="encoder.self", help="kinds of blocks to prune, or all")
    parser.add_argument("--ratios", default="0.02,0.05,0.1,0.15,0.2")
    parser.add_argument("--clip", type=Path, help="an audio file; default: the clip of fetch_models.py")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = fetch("whisper-tiny.en")
    clip = args.clip or fetch("speech") / "beckett.wav"
    processor = AutoProcessor.from_pretrained(source)
    inputs = clip_features(processor, load_audio(clip))
    model = open_model(source)
    sites = select(model.attention, () if args.sites == "all" else tuple(args.sites.split(",")))
    original = heard(source, inputs, processor)
    print(f"| pruned ({args.sites}) | parameters | method | WER | transcript of {clip.name} |")
    print("|---|---|---|---|---|")
    print(f"| 0% | {model.parameters:,} | original | 0% | {original} |")
    for ratio in (float(ratio) for ratio in args.ratios.split(",")):
        for method in ("svd", "vanilla"):
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                written = prune_model(model, out, Rule(ratio=ratio), sites, method)
                said = heard(out, inputs, processor)
            counts = totals(model.reader.header, model.attention, sites, written.ranks)
            rate, left = compare_words([original], [said]).rate, counts["parameters_after"]
            said = said if len(said) <= 80 else said[:80] + " ..."
            name = "pessa" if method == "svd" else method
            print(f"| {ratio:.0%} | {left:,} | {name} | {rate:.0%} | {said} |", flush=True)


if __name__ == "__main__":
    main()
