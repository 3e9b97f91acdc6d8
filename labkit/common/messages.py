"""Images and recordings from users in the form that the processors take, without torch.

Broken, empty or oversized input is refused here, before a model sees it. Web addresses are not fetched.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from labkit.common.errors import LabError, MediaError
from labkit.common.files import user_path

SAMPLING_RATE = 16_000
"""Samples per second that all speech encoders here expect."""
MAX_AUDIO_S = 30.0
"""The longest accepted recording, in seconds."""
MIN_AUDIO_S = 0.1
"""The shortest accepted recording, in seconds: the encoders need a few frames."""
MAX_PIXELS = 50_000_000
"""The largest accepted image (a phone's screenshot has 2 to 5 million pixels)."""
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "ICO", "PPM")
"""The formats that Pillow decodes itself; for PostScript it starts another program."""
MAX_ASPECT = 100
"""The largest ratio of an image's sides; the processors refuse more than 200."""


def read_bytes(source: str | Path | bytes, what: str) -> bytes:
    """The content of a path, a ``data:`` URL or bytes.

    Raises:
        MediaError: no such file, a web address, a broken data URL, or no content.
    """
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        name = f"the {what}"
    elif isinstance(source, str) and source.startswith("data:"):
        data = _decode_data_url(source, what)
        name = f"the data URL of the {what}"
    elif isinstance(source, str) and source.startswith(("http://", "https://", "file:", "ftp:")):
        raise MediaError(
            f"the {what} is a web address ({source[:60]}), which is not fetched: "
            "give a path, a data: URL or bytes"
        )
    else:
        name = f"the {what} {source}"
        try:
            data = user_path(source).read_bytes()
        except LabError as error:
            raise MediaError(f"the {what} {error}") from None
        except FileNotFoundError:
            raise MediaError(f"{name} does not exist") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise MediaError(f"{str(name)[:200]} cannot be read: {reason}") from None
    if not data:
        raise MediaError(f"{name} is empty (0 bytes)")
    return data


def _decode_data_url(url: str, what: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma:
        raise MediaError(f"the data URL of the {what} has no comma: expected data:{what}/...;base64,...")
    if not header.endswith(";base64"):
        return unquote_to_bytes(body)
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except (binascii.Error, ValueError):
        raise MediaError(f"the data URL of the {what} is not valid base64") from None


def load_image(source: Image.Image | str | Path | bytes) -> Image.Image:
    """An image (PIL, path, encoded bytes, ``data:`` URL) as an upright PIL image in RGB; transparency becomes white.

    Raises:
        MediaError: not an image, broken, larger than ``MAX_PIXELS``, or a strip beyond ``MAX_ASPECT`` : 1.
    """
    if isinstance(source, Image.Image):
        image, name = source, "the image"
    elif isinstance(source, str | Path | bytes | bytearray | memoryview):
        name = f"the image {source}" if isinstance(source, str | Path) else "the image"
        name = "the image" if name.startswith("the image data:") else name
        data = read_bytes(source, "image")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except Image.DecompressionBombError:
            raise MediaError(
                f"{name} has too many pixels; at most {MAX_PIXELS:,} are accepted: scale it down"
            ) from None
        except UnidentifiedImageError:
            raise MediaError(
                f"{name} is not an image that can be read ({len(data)} bytes; PNG, JPEG, WebP, ... can)"
            ) from None
        except Exception as error:  # Pillow's decoders raise many kinds on broken headers
            raise MediaError(f"{name} is broken: {error}") from None
    else:
        raise MediaError(
            f"an image is a PIL image, a path, bytes or a data: URL, not {type(source).__name__}"
        )

    width, height = image.size
    if width * height == 0:
        raise MediaError(f"{name} has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"{name} has {width} x {height} pixels; at most {MAX_PIXELS:,} are accepted: scale it down"
        )
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise MediaError(
            f"{name} is a strip of {width} x {height}; sides may differ {MAX_ASPECT} times at most"
        )
    try:
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:
        raise MediaError(f"{name} is broken: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    return image.convert("RGB")


def load_audio(source: np.ndarray | str | Path | bytes, max_s: float = MAX_AUDIO_S) -> np.ndarray:
    """A recording (array, path to wav, flac, ogg or mp3, bytes, ``data:`` URL) as ``float32 [samples]``, 16 kHz, mono.

    Arrays must be at 16 kHz: ``[samples]`` or ``[samples, channels]``, floats in -1..1 or integers over their full
    range; the result is in about -1..1. Files are mixed to mono and resampled (soxr).

    Raises:
        MediaError: broken, empty, silent to the last sample, not finite, under 0.1 s or over ``max_s``.
    """
    if isinstance(source, str | Path | bytes | bytearray | memoryview):
        samples, name = _decode_audio(source, max_s)
    elif isinstance(source, np.ndarray | Sequence):
        samples, name = _as_mono(np.asarray(source), "the recording"), "the recording"
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


def _decode_audio(source: str | Path | bytes, max_s: float) -> tuple[np.ndarray, str]:
    import soundfile

    is_path = isinstance(source, str | Path) and not str(source).startswith("data:")
    name = f"the recording {source}" if is_path else "the recording"
    data = read_bytes(source, "audio")
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            rate = file.samplerate
            # One second beyond the limit shows that the recording is too long, whatever the header claims.
            frames = file.read(frames=math.ceil((max_s + 1) * rate), dtype="float32", always_2d=True)
            total = max(len(frames), file.frames if file.frames < 2**40 else 0)
    except (soundfile.LibsndfileError, RuntimeError, ValueError, TypeError) as error:
        reason = getattr(error, "error_string", None) or error
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
    return samples, name


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
        array = array.mean(axis=1)
    elif array.ndim != 1:
        raise MediaError(f"{name} has {array.ndim} dimensions; expected [samples] or [samples, channels]")
    return np.ascontiguousarray(array, dtype=np.float32)


def normalise_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Load all images and recordings in messages, and bring all parts into one form.

    Takes ``{"role", "content"}`` with a string or a list of parts; parts may be ``text``, ``image``,
    ``audio``, or the OpenAI forms ``image_url`` (``{"url": "data:..."}``) and ``input_audio`` (``{"data":
    base64}``). All resulting parts are ``{"type": "text"|"image"|"audio", <type>: value}``.

    Raises:
        MediaError: an unusable image or recording.
        LabError: a message or part of the wrong form.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise LabError("messages is a list such as [{'role': 'user', 'content': 'Open the settings'}]")
    if not messages:
        raise LabError("messages is empty: at least one user message is needed")
    return [_normalise_message(message, index) for index, message in enumerate(messages)]


def _normalise_message(message: Any, index: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
        raise LabError(f"message {index} needs 'role' and 'content'")
    role, content = message["role"], message["content"]
    if role not in ("system", "user", "assistant"):
        raise LabError(f"message {index} has the role {role!r}; known roles: system, user, assistant")
    if isinstance(content, str):
        return {"role": role, "content": content}
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise LabError(f"the content of message {index} is a string or a list of parts")
    if not content:
        raise LabError(f"the content of message {index} is an empty list")
    return {"role": role, "content": [_normalise_part(part, index) for part in content]}


def _normalise_part(part: Any, index: int) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    try:
        if kind == "text":
            if not isinstance(part["text"], str):
                raise LabError(f"a text part of message {index} holds a {type(part['text']).__name__}")
            return {"type": "text", "text": part["text"]}
        if kind == "image":
            return {"type": "image", "image": load_image(part["image"])}
        if kind == "audio":
            return {"type": "audio", "audio": load_audio(part["audio"])}
        if kind == "image_url":
            url = part["image_url"]["url"] if isinstance(part["image_url"], Mapping) else part["image_url"]
            if not str(url).startswith("data:"):
                raise MediaError(
                    "an image_url part takes a data: URL (data:image/png;base64,...); nothing is fetched"
                )
            return {"type": "image", "image": load_image(url)}
        if kind == "input_audio":
            data = part["input_audio"]["data"]
            url = data if str(data).startswith("data:") else f"data:audio;base64,{data}"
            return {"type": "audio", "audio": load_audio(url)}
    except (KeyError, TypeError) as error:
        raise LabError(f"a part of message {index} of type {kind!r} lacks {error}") from None
    raise LabError(f"a part of message {index} has the type {kind!r}; known types: text, image, audio")
