"""Recordings in every form as 16 kHz mono: the one loader of engine, service, client, chat and commands."""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence

import numpy as np

from labkit.common.errors import MediaError
from labkit.common.media import Encoded, name_of, read_bytes

SAMPLING_RATE = 16_000
"""Samples per second that all speech encoders here expect."""
MAX_AUDIO_S = 30.0
"""The longest accepted recording, in seconds."""
MIN_AUDIO_S = 0.1
"""The shortest accepted recording, in seconds: the encoders need a few frames."""
CANCELLED = 0.25
"""Channels cancel out if their mean has less than this share of the power that independent channels' mean has."""


def load_audio(
    source: np.ndarray | Sequence[float] | Encoded, max_s: float = MAX_AUDIO_S, name: str | None = None
) -> np.ndarray:
    """A recording (array, path to wav, flac, ogg or mp3, bytes, ``data:`` URL) as ``float32 [samples]``, 16 kHz, mono.

    Arrays must be at 16 kHz: ``[samples]`` or ``[samples, channels]``, floats in -1..1 or integers over their full
    range; the result is in about -1..1, and floats beyond that are kept as they are. Channels are mixed to mono,
    except where they are out of phase and would cancel out: then the loudest is taken. Files are resampled (soxr).
    ``name`` stands for the recording in messages.

    Raises:
        MediaError: broken, empty, silent to the last sample, not finite, under 0.1 s or over ``max_s``.
    """
    name = name or name_of(source, "recording")
    if isinstance(source, Encoded):
        samples = _decode_audio(read_bytes(source, "audio"), name, max_s)
    elif isinstance(source, np.ndarray | Sequence):
        samples = _as_mono(np.asarray(source), name)
    else:
        raise MediaError(
            "a recording is a NumPy array at 16 kHz, a path, bytes or a data: URL, "
            f"not {type(source).__name__}"
        )
    seconds = len(samples) / SAMPLING_RATE
    if len(samples) == 0:
        raise MediaError(f"{name} is empty: it has no samples")
    if seconds < MIN_AUDIO_S:
        raise MediaError(f"{name} lasts {seconds:.3f} s; at least {MIN_AUDIO_S} s are needed")
    if seconds > max_s:
        raise MediaError(f"{name} lasts {seconds:.1f} s; at most {max_s:g} s are accepted: cut it")
    if not np.isfinite(samples).all():
        raise MediaError(f"{name} has samples that are not numbers (NaN or infinite)")
    if not samples.any():
        raise MediaError(f"{name} is silent: every sample is 0. Is the microphone on?")
    return samples


def to_wav(samples: np.ndarray) -> bytes:
    """Samples float32 [n] at 16 kHz as a WAV file of floats, without loss."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLING_RATE, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def is_recording(data: bytes) -> bool:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(data)):
            return True
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError):
        return data.startswith((b"RIFF", b"fLaC", b"OggS", b"ID3"))  # broken: `load_audio` says how


def _decode_audio(data: bytes, name: str, max_s: float) -> np.ndarray:
    import soundfile

    try:
        with soundfile.SoundFile(io.BytesIO(_with_sizes(data))) as file:
            rate = file.samplerate
            # One second beyond the limit shows that the recording is too long, whatever the header claims.
            frames = file.read(frames=math.ceil((max_s + 1) * rate), dtype="float32", always_2d=True)
            total = max(len(frames), file.frames if file.frames < 2**40 else 0)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        reason = error.error_string if isinstance(error, soundfile.LibsndfileError) else error
        raise MediaError(
            f"{name} is not a recording that can be read "
            f"({len(data)} bytes; wav, flac, ogg and mp3 can): {reason}"
        ) from None
    if total > max_s * rate:
        raise MediaError(f"{name} lasts {total / rate:.1f} s; at most {max_s:g} s are accepted: cut it")
    samples = _as_mono(frames, name)
    if rate != SAMPLING_RATE and len(samples):
        import soxr

        samples = soxr.resample(samples, rate, SAMPLING_RATE).astype(np.float32)
    return samples


def _with_sizes(data: bytes) -> bytes:
    """A WAV file that a program wrote into a pipe, with "until the end" for a data size of 0; else unchanged.

    Such a program cannot go back to fill in the size. libsndfile knows 0xFFFFFFFF for that, and takes 0 at its word.
    """
    order = {b"RIFF": "<", b"RIFX": ">"}.get(data[:4])
    if order is None or data[8:12] != b"WAVE":
        return data
    place = 12
    while (chunk := _chunk_at(data, place, order)) is not None:
        kind, size = chunk
        if kind == b"data":
            rest = place + 8
            empty = size == 0 and (rest == len(data) or _is_whole_chunk(data, rest, order))
            return data if size or empty else data[: place + 4] + b"\xff" * 4 + data[rest:]
        place += 8 + size + size % 2
    return data


def _chunk_at(data: bytes, place: int, order: str) -> tuple[bytes, int] | None:
    if place + 8 > len(data):
        return None
    return struct.unpack_from(f"{order}4sI", data, place)


def _is_whole_chunk(data: bytes, place: int, order: str) -> bool:
    """Whether a further chunk (LIST, id3 …) stands there, not samples."""
    chunk = _chunk_at(data, place, order)
    return chunk is not None and chunk[0].strip().isalnum() and place + 8 + chunk[1] <= len(data)


def _as_mono(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind in "iu" and array.dtype.itemsize <= 4 and array.size:
        span = 2.0 ** (8 * array.dtype.itemsize - 1)
        array = array.astype(np.float32) / span - (1.0 if array.dtype.kind == "u" else 0.0)
    elif array.dtype.kind != "f" and array.size:
        raise MediaError(
            f"{name} has samples of type {array.dtype}; floats or 8 to 32 bit integers are accepted"
        )
    if array.ndim == 2:
        if array.shape[1] > 8:
            raise MediaError(
                f"{name} has the shape {list(array.shape)}; expected [samples] or [samples, channels]"
            )
        array = _mix(array)
    elif array.ndim != 1:
        raise MediaError(f"{name} has {array.ndim} dimensions; expected [samples] or [samples, channels]")
    return np.ascontiguousarray(array, dtype=np.float32)


def _mix(channels: np.ndarray) -> np.ndarray:
    """The mean of channels [samples, channels], or the loudest where they cancel out."""
    mean = channels.mean(axis=1)
    if channels.size == 0 or channels.shape[1] == 1:
        return mean
    power = np.square(channels, dtype=np.float64).mean(axis=0)
    if np.square(mean, dtype=np.float64).mean() < CANCELLED * power.mean() / len(power):
        return channels[:, power.argmax()]
    return mean
