"""Measure pruning with recovery: prune Whisper tiny.en's encoder by the plain rule, then train S on development speech.

Every second clip with a text is used for training, with the original model's transcripts as targets; the others are
used to measure the word error rate against their reference texts.

    python scripts/prune_recover.py $PESSA_DATA/speech/clips.jsonl [--ratio 0.35] [--epochs 12]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from fetch_models import fetch
from peft import PeftModel
from transformers import AutoProcessor, WhisperForConditionalGeneration
from transformers.utils import logging

from pessa_cli.blocks.site import select
from pessa_cli.evaluation.measures import ScoreSettings
from pessa_cli.evaluation.word_errors import WordErrors, read_clips, transcribe
from pessa_cli.ranks.rule import Rule
from pessa_cli.surgery.model import open_model
from pessa_cli.surgery.prune import prune_model
from pessa_cli.tuning.options import AdapterOptions, DataOptions, TrainOptions, Tuning
from pessa_cli.tuning.train import Job, tune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path, help="a JSONL file with the keys file and text")
    parser.add_argument("--ratio", type=float, default=0.35)
    parser.add_argument("--epochs", type=float, default=12)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    clips = [clip for clip in read_clips(args.clips) if clip.text]
    source = fetch("whisper-tiny.en")
    processor, settings = AutoProcessor.from_pretrained(source), ScoreSettings(new_tokens=100)
    development, test = (WordErrors.of("clips", half, processor, settings) for half in (clips[::2], clips[1::2]))

    def load(folder: Path) -> Any:
        return WhisperForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()

    def errors(model: Any) -> str:
        return " | ".join(f"{part.score(model).value:.1%}" for part in (development, test))

    original = load(source)
    print(
        f"| tiny.en, {args.ratio:.0%} of encoder.self "
        f"| WER, {len(development.clips)} clips trained on | {len(test.clips)} others |"
    )
    print("|---|---|---|")
    print(f"| original | {errors(original)} |", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder, data = Path(place) / "pruned", Path(place) / "development.jsonl"
        model = open_model(source)
        prune_model(model, folder, Rule(ratio=args.ratio), select(model.attention, ("encoder.self",)))
        print(f"| pruned | {errors(load(folder))} |", flush=True)
        heard = transcribe(original, processor, development.inputs, settings)
        lines = [
            {"audio": str(clip.file.resolve()), "text": text}
            for clip, text in zip(development.clips, heard, strict=True)
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
