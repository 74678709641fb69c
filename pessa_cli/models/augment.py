"""More calibration data from clips of speech: clips joined to windows of all lengths, with other speed, gain and noise.

Most recordings that people transcribe are shorter than the 30 s that Whisper reads, so that lengths of windows are
drawn evenly on a logarithmic scale from SHORTEST to LONGEST. One seed always gives the same windows.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from pessa_cli.common.errors import UsageError
from pessa_cli.models.audio import SAMPLE_RATE, resampled
from pessa_cli.models.data import CalibrationData, DataItem
from pessa_cli.statistics.file import augmented_identity

SHORTEST, LONGEST = 2.0, 28.0  # seconds of a window
PAUSES = (0.1, 0.5)  # seconds of silence between two recordings
SPEEDS = (0.9, 1.1)
GAINS = (-15.0, 3.0)  # decibels
SIGNAL_TO_NOISE = (10.0, 40.0)  # decibels
SLOPES = (0.0, 2.0)  # the power of noise falls with this power of its frequency: 0 is white noise, 2 is brown noise
FLAT_BELOW = 50  # hertz; noise has no more power at lower frequencies
Samples = NDArray[np.float32]


class Recording(Protocol):
    """Speech that becomes a part of a window, with what is said in it, if that is known."""

    @property
    def seconds(self) -> float: ...

    @property
    def text(self) -> str | None: ...

    @property
    def samples(self) -> Samples:
        """The samples at 16 kHz, (time,)."""


Part = TypeVar("Part", bound=Recording, covariant=True)


@dataclass(frozen=True)
class Window(Generic[Part]):
    """Recordings in their order, and the seconds of silence before each but the first."""

    recordings: Sequence[Part]
    pauses: Sequence[float]

    @property
    def seconds(self) -> float:
        return sum(recording.seconds for recording in self.recordings) + sum(self.pauses)

    @property
    def text(self) -> str | None:
        """What is said in all recordings; None if it is not known of each."""
        texts = [recording.text for recording in self.recordings]
        return None if None in texts else " ".join(filter(None, texts))

    @property
    def samples(self) -> Samples:
        """The samples at 16 kHz, (time,)."""
        parts: list[Samples] = []
        for pause, recording in zip((0.0, *self.pauses), self.recordings, strict=True):
            parts += [np.zeros(round(pause * SAMPLE_RATE), np.float32), recording.samples]
        return np.concatenate(parts)


def windows_of(recordings: Sequence[Part], seed: int, count: int | None = None) -> list[Window[Part]]:
    """Join recordings, in a random order, to windows of random lengths from SHORTEST to LONGEST seconds.

    count: the number of windows, for which recordings are used again as often as it takes, each time in another order.
    None uses each recording once. A window is longer than drawn by a part of its last recording, and shorter where the
    next recording would not fit or where none is left.
    """
    rng = random.Random(seed)
    found: list[Window[Part]] = []
    waiting: list[Part] = []
    while recordings and (count is None or len(found) < count):
        if not waiting:
            waiting = rng.sample(recordings, len(recordings))
        wanted = _length(rng)
        chosen, pauses = [waiting.pop()], list[float]()
        length = chosen[0].seconds
        while length < wanted:
            if not waiting and count is None:
                break
            waiting = waiting or rng.sample(recordings, len(recordings))
            pause = rng.uniform(*PAUSES)
            length += pause + waiting[-1].seconds
            if length > LONGEST:
                break
            chosen.append(waiting.pop())
            pauses.append(pause)
        found.append(Window(chosen, pauses))
        if not waiting and count is None:
            break
    return found


def augmented(samples: Samples, rng: np.random.Generator) -> Samples:
    """Change the speed (and with it the pitch), add noise, and change the gain; never longer than LONGEST seconds."""
    speed = max(rng.uniform(*SPEEDS), len(samples) / SAMPLE_RATE / LONGEST)
    changed = resampled(samples, SAMPLE_RATE * speed).astype(np.float64)
    spectrum = np.fft.rfft(rng.standard_normal(len(changed)))
    lowest = len(changed) * FLAT_BELOW / SAMPLE_RATE
    spectrum *= np.maximum(np.arange(len(spectrum)), lowest) ** (-rng.uniform(*SLOPES) / 2)
    noise = np.fft.irfft(spectrum, len(changed))
    noise *= np.sqrt(np.mean(changed**2) / np.mean(noise**2)) * 10 ** (-rng.uniform(*SIGNAL_TO_NOISE) / 20)
    changed = (changed + noise) * 10 ** (rng.uniform(*GAINS) / 20)
    return np.asarray(changed / max(1.0, np.abs(changed).max()), np.float32)


@dataclass(frozen=True)
class ClipPart:
    """A part of an item of the data, from `start` to `stop` seconds; its text is known if it is the whole item."""

    item: DataItem
    start: float
    stop: float
    text: str | None

    @property
    def seconds(self) -> float:
        return self.stop - self.start

    @property
    def samples(self) -> Samples:
        """The samples at 16 kHz, (time,)."""
        return self.item.samples[round(self.start * SAMPLE_RATE) : round(self.stop * SAMPLE_RATE)]


@dataclass(frozen=True)
class AugmentedItem(DataItem):
    """A window of joined clips. seed: of the changes."""

    window: Window[ClipPart] | None = None
    seed: tuple[int, int] = (0, 0)

    @property
    def seconds(self) -> float:
        """The length of the window, before its speed is changed."""
        return 0.0 if self.window is None else self.window.seconds

    @property
    def recordings(self) -> dict[str, float]:
        parts = [] if self.window is None else self.window.recordings
        return {f"{part.item.sha256} {part.start}": part.seconds for part in parts}

    @property
    def nbytes(self) -> int:
        return round(2 * SAMPLE_RATE * self.seconds)

    @property
    def samples(self) -> Samples:
        """The changed samples at 16 kHz, (time,)."""
        assert self.window is not None
        return augmented(self.window.samples, np.random.default_rng(self.seed))


def augment(data: CalibrationData, count: int, seed: int, apart: int) -> CalibrationData:
    """Return `count` windows that are made from the clips of the data, each with other speed, gain and noise.

    Only clips of one language are joined. Recordings of more than LONGEST seconds are cut into clips, whose texts are
    then not known. apart: the first window and every one of this number after it are made from other recordings than
    the windows between them, so that these can be held out. The result does not depend on the order of the data.

    Raises UsageError for data that are text, and PessaError for audio that cannot be read.
    """
    if any(item.audio is None for item in data.items):
        raise UsageError(f"--augment {count}: these calibration data are text", "leave it out; it is for speech")
    rng = random.Random(seed)
    items_in_order = sorted(data.items, key=lambda item: (item.identity, item.text or ""))
    clips = [clip for item in items_in_order for clip in _clips(item, rng)]
    held_out, others = _apart(clips, apart, rng)
    first = -(-count // apart)
    made = iter(_joined(held_out, first, rng)), iter(_joined(others, count - first, rng))
    items: list[DataItem] = []
    for number in range(count):
        window = next(made[number % apart != 0])
        of = window.recordings[0].item
        items.append(AugmentedItem(of.audio, window.text, of.language, of.sha256, window, (seed, number)))
    how = f"{count} windows, seed {seed}"
    return CalibrationData(items, [augmented_identity(identity, how) for identity in data.identities])


def _length(rng: random.Random) -> float:
    """Draw the seconds of a window."""
    return SHORTEST * float((LONGEST / SHORTEST) ** rng.random())


def _clips(item: DataItem, rng: random.Random) -> Iterator[ClipPart]:
    """Yield an item as one clip, or cut into clips of random lengths if it is too long for a window."""
    whole = item.seconds
    if whole <= LONGEST:
        yield ClipPart(item, 0.0, whole, item.text)
        return
    start = 0.0
    while start < whole:
        stop = min(whole, start + _length(rng))
        yield ClipPart(item, start, stop, None)
        start = stop


def _apart(clips: Sequence[ClipPart], apart: int, rng: random.Random) -> tuple[list[ClipPart], list[ClipPart]]:
    """Divide clips by their recordings: one of `apart` recordings is in the first part.

    If there are fewer recordings, clips are divided, and if there are also fewer clips, both parts are all clips.
    """
    files = sorted({clip.item.sha256 for clip in clips})
    if len(files) >= apart:
        chosen = {*rng.sample(files, len(files) // apart)}
        first = [clip.item.sha256 in chosen for clip in clips]
    elif len(clips) >= apart:
        numbers = {*rng.sample(range(len(clips)), len(clips) // apart)}
        first = [number in numbers for number in range(len(clips))]
    else:
        return [*clips], [*clips]
    pairs = [*zip(clips, first, strict=True)]
    return [clip for clip, chosen_one in pairs if chosen_one], [clip for clip, chosen_one in pairs if not chosen_one]


def _joined(clips: Sequence[ClipPart], count: int, rng: random.Random) -> list[Window[ClipPart]]:
    """Return `count` windows, of each language as many as its share of the speech, in a random order."""
    languages = sorted({clip.item.language or "" for clip in clips})
    groups = [[clip for clip in clips if (clip.item.language or "") == language] for language in languages]
    sums = np.cumsum([0.0, *(sum(clip.seconds for clip in group) for group in groups)])
    ends = [round(count * float(each / sums[-1])) for each in sums]
    found: list[Window[ClipPart]] = []
    for group, (start, end) in zip(groups, pairwise(ends), strict=True):
        found += windows_of(group, rng.randrange(2**32), end - start)
    rng.shuffle(found)
    return found
