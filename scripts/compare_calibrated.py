"""The README's table on calibration: Whisper tiny.en pruned by the weights alone and by what real speech makes of them.

The clips are dealt into two halves; each is transcribed by models that were calibrated on the other one, so that every
clip counts and none was seen. The word error rate is against the reference texts, normalised as Whisper's papers do.

    python scripts/compare_calibrated.py ../shared/data/speech [--sites encoder.self] [--ratios 0.2,0.35] [--sequential]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from fetch_models import fetch
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.utils import logging

from pessa_cli.audio import SAMPLE_RATE, load_audio
from pessa_cli.calibrate import collect
from pessa_cli.measures import Settings
from pessa_cli.model import open_model
from pessa_cli.pipeline import prune_model
from pessa_cli.ranks import Rule
from pessa_cli.report import totals
from pessa_cli.sites import select
from pessa_cli.speech import Speech, read_clips
from pessa_cli.statistics import Statistics


def word_error_rate(folders: Sequence[Path], speech: Sequence[Speech]) -> float:
    """That of several models, each on its own clips."""
    counts = []
    for folder, clips in zip(folders, speech, strict=True):
        model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        counts.append(clips.score(model).counts)
    return sum(count["errors"] for count in counts) / sum(count["words"] for count in counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speech", type=Path, help="a folder with clips.jsonl")
    parser.add_argument("--sites", default="encoder.self", help="kinds of blocks to prune, or all")
    parser.add_argument("--ratios", default="0.2,0.35,0.5")
    parser.add_argument("--sequential", action="store_true", help="also calibrate in sequence")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = fetch("whisper-tiny.en")
    processor = AutoProcessor.from_pretrained(source)
    model = open_model(source)
    sites = select(model.sites, () if args.sites == "all" else tuple(args.sites.split(",")))
    clips = read_clips(args.speech / "clips.jsonl")
    halves = clips[0::2], clips[1::2]
    settings = Settings(new_tokens=100)
    others = [Speech.of("the other half", half, processor, settings) for half in reversed(halves)]

    with tempfile.TemporaryDirectory() as folder:
        files, started = [Path(folder) / f"{half}.safetensors" for half in range(2)], time.perf_counter()
        for half, file in zip(halves, files, strict=True):
            collect(model, sites, [clip.file for clip in half], file)
        seconds = sum(len(load_audio(clip.file)) for clip in clips) / SAMPLE_RATE
        print(f"calibrated on {seconds:.0f} s of speech in {time.perf_counter() - started:.0f} s\n")

        def pruned(ratio: float, method: str) -> str:
            """A row of the table."""
            outs = []
            for half, file in zip(halves, files, strict=True):
                outs.append(Path(tempfile.mkdtemp(dir=folder)) / "out")
                if method == "in sequence":
                    file = Path(folder) / "sequence.safetensors"
                    collect(model, sites, [clip.file for clip in half], file, Rule(ratio=ratio))
                statistics = None if method == "weights alone" else Statistics(file)
                written = prune_model(model, outs[-1], Rule(ratio=ratio), sites, statistics=statistics)
            left = totals(model.reader.header, model.sites, sites, written.ranks)["parameters_after"]
            return f"| {ratio:.0%} | {left:,} | {method} | {word_error_rate(outs, others):.1%} |"

        print(f"| pruned ({args.sites}) | parameters | by | WER |\n|---|---|---|---|")
        print(f"| 0% | {model.parameters:,} | | {word_error_rate([source, source], others):.1%} |")
        methods = ["weights alone", "calibrated", *(["in sequence"] if args.sequential else [])]
        for ratio in map(float, args.ratios.split(",")):
            for method in methods:
                print(pruned(ratio, method), flush=True)


if __name__ == "__main__":
    main()
