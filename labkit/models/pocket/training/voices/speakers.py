"""Many speakers from one natural voice: pitch and vocal-tract length changed apart with the WORLD vocoder.

WORLD (Morise et al. 2016, package `pyworld`) takes speech apart into pitch, spectral envelope and
aperiodicity. Multiplying the pitch and stretching the envelope along frequency gives another speaker who says
the same words.
"""

from __future__ import annotations

import functools
import importlib.machinery
import importlib.util
import math
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from labkit.common.errors import LabError

SAMPLE_RATE = 16_000
TRAIN_PITCH = (0.58, 1.40)
TRAIN_FORMANT = (0.86, 1.16)


@dataclass(frozen=True)
class Speaker:
    """A warp: `pitch` multiplies the voice's pitch, `formant` its resonances (above 1: a shorter throat)."""

    pitch: float
    formant: float

    @property
    def name(self) -> str:
        return f"p{self.pitch:.2f}f{self.formant:.2f}"

    @classmethod
    def from_name(cls, name: str) -> Speaker:
        """The speaker called "p0.70f1.05"; other names raise LabError."""
        try:
            pitch, formant = name.removeprefix("p").split("f")
            return cls(float(pitch), float(formant))
        except ValueError:
            raise LabError(f"unknown speaker {name!r}; names look like p0.70f1.05") from None


SAME = Speaker(1.0, 1.0)


def random_speaker(rng: random.Random) -> Speaker:
    """A speaker drawn evenly from the training region."""
    pitch = math.exp(rng.uniform(*(math.log(value) for value in TRAIN_PITCH)))
    return Speaker(round(pitch, 3), round(rng.uniform(*TRAIN_FORMANT), 3))


@functools.cache
def _world():
    """The pyworld extension, loaded past its package, whose first line needs a setuptools older than 81."""
    spec = importlib.util.find_spec("pyworld")
    if spec is None or not spec.submodule_search_locations:
        raise LabError("pyworld was not found: pip install pyworld==0.3.5")
    file = next(Path(spec.submodule_search_locations[0]).glob("pyworld.*.so"), None)
    if file is None:
        raise LabError("pyworld has no compiled part: pip install --force-reinstall pyworld==0.3.5")
    loader = importlib.machinery.ExtensionFileLoader("pyworld", str(file))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("pyworld", loader))
    loader.exec_module(module)
    return module


class Analysis:
    """One utterance taken apart; `.speak(speaker, speed)` puts it together again as someone else.

    `samples` float32 [n] at 16 kHz. Taking apart costs several times what one putting together does.
    """

    frame_ms = 5.0

    def __init__(self, samples: np.ndarray) -> None:
        world = _world()
        wave = samples.astype(np.float64)
        pitch, times = world.dio(wave, SAMPLE_RATE, frame_period=self.frame_ms)
        self.pitch = world.stonemask(wave, pitch, times, SAMPLE_RATE)
        # WORLD's transform reaches down to 3 x 16000 / bins Hz: 94 Hz does for all but low voices
        voiced = self.pitch[self.pitch > 0]
        bins = 512 if len(voiced) == 0 or np.percentile(voiced, 5) > 95 else 1024
        floor = 3 * SAMPLE_RATE / bins + 1
        # [frames, bins / 2 + 1]; the aperiodicity, the slowest part, is taken at every other frame
        self.envelope = world.cheaptrick(wave, self.pitch, times, SAMPLE_RATE, f0_floor=floor, fft_size=bins)
        sparse = world.d4c(wave, self.pitch[::2].copy(), times[::2].copy(), SAMPLE_RATE, fft_size=bins)
        self.aperiodicity = np.repeat(sparse, 2, axis=0)[: len(times)]

    def speak(self, speaker: Speaker, speed: float = 1.0) -> np.ndarray:
        """The utterance in another voice, `speed` times as fast: float32 [n / speed] at 16 kHz."""
        bins = self.envelope.shape[1]
        source = np.minimum(np.arange(bins) / speaker.formant, bins - 1)
        below = source.astype(int)
        above, part = np.minimum(below + 1, bins - 1), source - below

        def stretch(spectra: np.ndarray) -> np.ndarray:
            return np.ascontiguousarray(spectra[:, below] * (1 - part) + spectra[:, above] * part)

        wave = _world().synthesize(
            self.pitch * speaker.pitch,
            stretch(self.envelope),
            stretch(self.aperiodicity),
            SAMPLE_RATE,
            self.frame_ms / speed,
        )
        return wave.astype(np.float32)
