"""Pruning, then recovery: Whisper tiny.en's encoder cut by the plain rule, then S trained on development speech.

Every second clip with a text is for development, and the model learns what the original hears in it, in the
original's own spelling; the others are for the word error rate against their reference texts.

    python scripts/prune_recover.py $PESSA_DATA/speech/clips.jsonl [--ratio 0.35] [--epochs 12]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from compare_methods import word_error_rate
from fetch_models import fetch
from peft import PeftModel
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.utils import logging

from pessa_cli.audio import SAMPLE_RATE, load_audio
from pessa_cli.model import open_model
from pessa_cli.pipeline import prune_model
from pessa_cli.ranks import Rule
from pessa_cli.sites import select
from pessa_cli.tune import Job, tune
from pessa_cli.tuning import AdapterOptions, DataOptions, TrainOptions, Tuning


@torch.inference_mode()
def transcribe(model: Any, processor: Any, clips: Sequence[Path]) -> list[str]:
    texts = []
    for clip in clips:
        features = processor(load_audio(clip), sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
        tokens = model.generate(input_features=features, do_sample=False, num_beams=1, max_new_tokens=100)
        texts.append(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="JSONL of file and text")
    parser.add_argument("--ratio", type=float, default=0.35)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    rows = [row for row in map(json.loads, args.clips.read_text().splitlines()) if row["text"]]
    development, test = rows[::2], rows[1::2]
    source = fetch("whisper-tiny.en")
    processor = AutoProcessor.from_pretrained(source)

    def load(folder: Path) -> Any:
        return WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def errors(model: Any) -> str:
        rates = []
        for part in (development, test):
            found = transcribe(model, processor, [args.clips.parent / row["file"] for row in part])
            rates.append(word_error_rate(" ".join(row["text"] for row in part), " ".join(found)))
        return " | ".join(f"{rate:.1%}" for rate in rates)

    original = load(source)
    print(
        f"| tiny.en, {args.ratio:.0%} of encoder.self | WER, {len(development)} clips trained on | {len(test)} others |"
    )
    print("|---|---|---|")
    print(f"| original | {errors(original)} |", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder, data = Path(place) / "pruned", Path(place) / "development.jsonl"
        model = open_model(source)
        prune_model(model, folder, Rule(ratio=args.ratio), select(model.sites, ("encoder.self",)))
        print(f"| pruned | {errors(load(folder))} |", flush=True)
        heard = transcribe(original, processor, [args.clips.parent / row["file"] for row in development])
        lines = [
            {"audio": str((args.clips.parent / row["file"]).resolve()), "text": text}
            for row, text in zip(development, heard, strict=True)
        ]
        data.write_text("".join(json.dumps(line) + "\n" for line in lines))
        tuning = Tuning(
            AdapterOptions("pessa"),
            DataOptions(),
            TrainOptions(
                learning_rate=args.learning_rate, schedule="cosine", epochs=args.epochs, batch=2, save_steps=0
            ),
        )
        record = tune(Job(open_model(folder), data, Path(place) / "adapter", tuning, "tiny.en, pruned"))
        assert record is not None
        tuned = PeftModel.from_pretrained(load(folder), Path(place) / "adapter").eval()
        print(f"| and {record['trainable_parameters']:,} numbers trained | {errors(tuned)} |")


if __name__ == "__main__":
    main()
