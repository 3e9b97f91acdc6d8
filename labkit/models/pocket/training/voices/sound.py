"""Sample rates and silence of recordings."""

from __future__ import annotations

import numpy as np

from labkit.common.errors import LabError

SAMPLE_RATE = 16_000


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """float32 [n] at `rate` Hz → float32 at 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    import soxr

    return soxr.resample(samples, rate, SAMPLE_RATE).astype(np.float32)


def trim(samples: np.ndarray, threshold: float = 0.01, margin: int = 800) -> np.ndarray:
    """Samples without the silence at both ends (below `threshold` of the peak), `margin` samples of it kept.

    The result's peak is 0.9.
    """
    level = np.abs(samples)
    peak = float(level.max(initial=0.0))
    if peak <= 0:
        raise LabError("a synthesizer returned silence")
    loud = np.flatnonzero(level > threshold * peak)
    return samples[max(0, loud[0] - margin) : loud[-1] + margin] * np.float32(0.9 / peak)
