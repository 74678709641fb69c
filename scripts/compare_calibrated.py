"""The README's table on calibration: Whisper tiny.en pruned by the weights alone and by what real speech makes of them.

The clips are dealt into two halves; each is transcribed by models that were calibrated on the other one, so that every
clip counts and none was seen. The word error rate is against the reference texts, normalised as Whisper's papers do.

    python scripts/compare_calibrated.py ../shared/data/speech [--sites encoder.self] [--ratios 0.2,0.35] [--sequential]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.utils import logging

from pessa_cli.audio import SAMPLE_RATE, load_audio
from pessa_cli.calibrate import collect
from pessa_cli.model import open_model
from pessa_cli.pipeline import prune_model
from pessa_cli.ranks import Rule
from pessa_cli.report import totals
from pessa_cli.sites import select
from pessa_cli.statistics import Statistics

Clip = tuple[Path, str | None]


def read_clips(folder: Path) -> list[Clip]:
    rows = [json.loads(line) for line in (folder / "clips.jsonl").read_text(encoding="utf-8").splitlines()]
    return [(folder / row["file"], row["text"]) for row in rows]


def transcribe(folder: Path, clips: Sequence[Clip], processor: Any) -> list[tuple[str, str]]:
    """Reference and transcript of each clip that has a reference, normalised."""
    model = WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    normal, pairs = EnglishTextNormalizer({}), []
    for path, text in clips:
        if text is not None:
            features = processor(load_audio(path), sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
            tokens = model.generate(features, do_sample=False, num_beams=1, max_new_tokens=100)
            pairs.append((normal(text), normal(processor.batch_decode(tokens, skip_special_tokens=True)[0])))
    return pairs


def word_error_rate(pairs: Sequence[tuple[str, str]]) -> float:
    from jiwer import wer

    return float(wer([reference for reference, _ in pairs], [found for _, found in pairs]))


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
    clips = read_clips(args.speech)
    halves = [(clips[0::2], clips[1::2]), (clips[1::2], clips[0::2])]  # calibrated on, transcribed

    with tempfile.TemporaryDirectory() as folder:
        files, started = [Path(folder) / f"{half}.safetensors" for half in range(2)], time.perf_counter()
        for (calibration, _), file in zip(halves, files, strict=True):
            collect(model, sites, [path for path, _ in calibration], file)
        seconds = sum(len(load_audio(path)) for path, _ in clips) / SAMPLE_RATE
        print(f"calibrated on {seconds:.0f} s of speech in {time.perf_counter() - started:.0f} s\n")

        def pruned(ratio: float, method: str) -> str:
            """A row of the table."""
            pairs: list[tuple[str, str]] = []
            for half, (calibration, evaluation) in enumerate(halves):
                out, file = Path(tempfile.mkdtemp(dir=folder)) / "out", files[half]
                if method == "in sequence":
                    file = Path(folder) / "sequence.safetensors"
                    collect(model, sites, [path for path, _ in calibration], file, Rule(ratio=ratio))
                statistics = None if method == "weights alone" else Statistics(file)
                written = prune_model(model, out, Rule(ratio=ratio), sites, statistics=statistics)
                pairs += transcribe(out, evaluation, processor)
            left = totals(model.reader.header, model.sites, sites, written.ranks)["parameters_after"]
            return f"| {ratio:.0%} | {left:,} | {method} | {word_error_rate(pairs):.1%} |"

        print(f"| pruned ({args.sites}) | parameters | by | WER |\n|---|---|---|---|")
        print(f"| 0% | {model.parameters:,} | | {word_error_rate(transcribe(source, clips, processor)):.1%} |")
        methods = ["weights alone", "calibrated", *(["in sequence"] if args.sequential else [])]
        for ratio in map(float, args.ratios.split(",")):
            for method in methods:
                print(pruned(ratio, method), flush=True)


if __name__ == "__main__":
    main()
