"""Make speech data to calibrate on and to score on: short recordings, joined to windows of 2 to 28 s.

    python scripts/speech_data.py out/speech --clips $PESSA_DATA/speech/clips.jsonl
    pessa prune MODEL -o OUT --calibrate out/speech/calibrate/clips.jsonl --target-attention 0.65
    pessa eval OUT --clips out/speech/score/clips.jsonl

The recordings are the clips of --clips and the voice prompts of the Debian packages `asterisk-core-sounds-en-g722` (one
speaker, CC BY-SA 3.0) and `asterisk-core-sounds-en` (their transcripts), which `apt-get download` fetches unless
--packages names them. A recording is used if it is speech, has a transcript, and fits into a window.

A hash of its file name puts each recording either into the part for calibration or into the part for scoring. Lengths
of windows are drawn evenly on a logarithmic scale, because most recordings that people transcribe are shorter than the
30 s that Whisper reads, so that most of a window is padding. OUT then has three folders with 16 kHz WAV files and a
clips.jsonl that lists them:

- calibrate: windows with changed speed, gain and noise. A recording may be in several of them.
- calibrate_plain: the same windows, not changed.
- score: windows of the other recordings, each of which is in one window, not changed.

The speaker of the prompts is in both parts, and similar prompts may be, so scores on them are better than on the speech
of others; differences between methods on the same data are what they are for.

One seed always gives the same files.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from pessa_cli.evaluation.word_errors import read_clips
from pessa_cli.models.audio import SAMPLE_RATE, load_audio
from pessa_cli.models.augment import LONGEST, Samples, Window, augmented, windows_of

PACKAGES = ("asterisk-core-sounds-en-g722", "asterisk-core-sounds-en")
TRANSCRIPTS = "core-sounds-en.txt.gz"
NO_SPEECH = re.compile(r"[\[<(]")  # transcripts describe sounds in brackets: "[this is a simple beep tone]"


@dataclass(frozen=True)
class Recording:
    """A file of speech: 16 kHz samples, (time,), and what is said in it."""

    name: str
    text: str
    samples: Samples

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


def to_score(name: str, share: float) -> bool:
    """Whether a recording is for scoring, which a hash of its name decides for this share of all names."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") < share * 2**32


def write(folder: Path, windows: Sequence[Window[Recording]], seed: int | None = None) -> float:
    """Write windows as WAV files with a clips.jsonl; returns their seconds. seed: that of changes; None for none."""
    folder.mkdir(parents=True)
    rows, seconds = [], 0.0
    for number, window in enumerate(windows):
        samples = window.samples
        if seed is not None:
            samples = augmented(samples, np.random.default_rng((seed, number)))
        name = f"{number:03}.wav"
        soundfile.write(folder / name, samples, SAMPLE_RATE, subtype="PCM_16")
        length = len(samples) / SAMPLE_RATE
        seconds += length
        files = [recording.name for recording in window.recordings]
        rows.append({"audio": name, "text": window.text, "language": "en", "seconds": round(length, 2), "of": files})
    (folder / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return seconds


def transcripts(text: str) -> dict[str, str]:
    """Read lines such as "digits/1: one" by their names, without comments and descriptions of other sounds."""
    pairs = (line.split(": ", 1) for line in text.splitlines() if ": " in line and not line.startswith(";"))
    return {name: said.strip() for name, said in pairs if said.strip() and not NO_SPEECH.search(said)}


def prompts(folders: Sequence[Path]) -> Iterator[Recording]:
    """Read the prompts in extracted packages that have a transcript."""
    import av

    (listed,) = (file for folder in folders for file in folder.rglob(TRANSCRIPTS))
    texts = transcripts(gzip.decompress(listed.read_bytes()).decode("utf-8"))
    for folder in folders:
        for file in sorted(folder.rglob("*.g722")):
            name = f"{file.parent.name}/{file.stem}"  # the digit "digits/1", but "agent-pass" at the top
            name = name if name in texts else file.stem
            if name not in texts:
                continue
            with av.open(str(file), format="g722") as container:
                frames = [frame.to_ndarray()[0] for frame in container.decode(audio=0)]
            yield Recording(name, texts[name], (np.concatenate(frames) / 2**15).astype(np.float32))


def clips(path: Path) -> Iterator[Recording]:
    """Read the clips of JSON lines that have a text. A text in capitals is put in small letters."""
    for clip in read_clips(path):
        if clip.text:
            text = clip.text.lower() if clip.text.isupper() else clip.text
            yield Recording(clip.file.name, text, load_audio(clip.file))


def extracted(packages: Sequence[Path], work: Path) -> list[Path]:
    """The folders of packages, which are extracted into a folder, and downloaded where none are given."""
    if not packages:
        subprocess.run(["apt-get", "download", *PACKAGES], cwd=work, check=True)
        packages = sorted(work.glob("*.deb"))
    for package in packages:
        if package.is_file():
            subprocess.run(["dpkg", "-x", str(package), str(work / package.stem)], check=True)
    return [package if package.is_dir() else work / package.stem for package in packages]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument("--packages", type=Path, nargs="*", default=[], help="both .deb files, or their contents")
    parser.add_argument("--clips", type=Path, help="JSON lines with more speech, each {audio, text}")
    parser.add_argument("--windows", type=int, default=60, help="of prompts, to calibrate on")
    parser.add_argument("--clip-windows", type=int, default=20, help="of the speech in --clips, to calibrate on")
    parser.add_argument("--share", type=float, default=0.5, help="of the recordings, to score on")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        spoken = list(prompts(extracted(args.packages, Path(work))))
    calibrate, score = list[Window[Recording]](), list[Window[Recording]]()
    counts = (args.windows, args.clip_windows)
    for recordings, count in zip((spoken, list(clips(args.clips)) if args.clips else []), counts, strict=True):
        short = [recording for recording in recordings if recording.seconds <= LONGEST]
        calibrate += windows_of([each for each in short if not to_score(each.name, args.share)], args.seed, count)
        score += windows_of([each for each in short if to_score(each.name, args.share)], args.seed)
    random.Random(args.seed).shuffle(calibrate)  # so that the first windows are of both kinds
    parts = (("calibrate", calibrate, args.seed), ("calibrate_plain", calibrate, None), ("score", score, None))
    told = "Windows of speech that scripts/speech_data.py made; see its description.\n\n"
    for name, windows, seed in parts:
        seconds = write(args.out / name, windows, seed)
        names = {recording.name for window in windows for recording in window.recordings}
        told += f"- {name}: {len(windows)} windows, {seconds / 60:.1f} minutes, of {len(names)} recordings\n"
    sources = f"\nSources: the Debian packages {' and '.join(PACKAGES)} (CC BY-SA 3.0)"
    told += sources + (f", and {args.clips.name}.\n" if args.clips else ".\n")
    (args.out / "README.md").write_text(told, encoding="utf-8")
    print(told, end="")


if __name__ == "__main__":
    main()
