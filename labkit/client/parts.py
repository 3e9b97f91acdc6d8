"""Images and recordings as the parts of a message.

Files and bytes are sent unchanged; PIL images as PNG and samples as 32-bit WAV, read by the loaders of the engine and
without loss, so answers equal `labkit ask`.
"""

from __future__ import annotations

import base64
import math
from pathlib import Path
from typing import Any

from labkit.common.errors import MediaError


def image_part(image: Any) -> dict[str, Any]:
    """An image part: a PIL image, a PhoneTap screen, a path, bytes, or a ``data:`` or web address.

    Raises:
        MediaError: not an image, or a file that cannot be read.
    """
    image = getattr(image, "image", image)
    is_address = isinstance(image, str) and image.startswith(("data:", "http://", "https://"))
    return {"type": "image_url", "image_url": {"url": image if is_address else data_url(image)}}


def data_url(image: Any) -> str:
    """A PIL image, a PhoneTap screen, a path or bytes as a ``data:`` URL.

    Raises:
        MediaError: not an image, or a file that cannot be read.
    """
    from labkit.common.images import image_format

    data = _encoded_image(getattr(image, "image", image))
    kind = (image_format(data) or "png").lower()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def audio_part(audio: Any) -> dict[str, Any]:
    """A recording part: samples at 16 kHz, a path to wav, flac, ogg or mp3, or bytes of such a file.

    Raises:
        MediaError: not a recording, or a file that cannot be read.
    """
    import numpy as np

    from labkit.common.media import read_bytes
    from labkit.common.recordings import load_audio, to_wav

    if isinstance(audio, str | Path | bytes | bytearray):
        data = read_bytes(audio, "audio")
    elif isinstance(audio, np.ndarray | list | tuple):
        data = to_wav(load_audio(audio, math.inf))  # how long a recording may be is the service's to say
    else:
        raise MediaError(f"a recording is an array, a path or bytes, not {type(audio).__name__}")
    marks = {b"RIFF": "wav", b"RIFX": "wav", b"RF64": "wav", b"fLaC": "flac", b"OggS": "ogg"}
    kind = next((name for mark, name in marks.items() if data.startswith(mark)), "mp3")
    return {"type": "input_audio", "input_audio": {"data": base64.b64encode(data).decode(), "format": kind}}


def user_message(text: str | None = None, image: Any = None, audio: Any = None) -> dict[str, Any]:
    """A user turn: images, then recordings, then the text; a list holds several images or recordings.

    Raises:
        MediaError: no content, or content that cannot be used.
    """
    parts = [image_part(item) for item in _several(image)]
    parts += [audio_part(item) for item in _several(audio, is_list=_is_list_of_recordings)]
    if text:
        parts.append({"type": "text", "text": text})
    if not parts:
        raise MediaError("nothing is asked: give a text, an image or a recording")
    return {"role": "user", "content": text if len(parts) == 1 and text else parts}


def as_openai(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages with the lab's ``image`` and ``audio`` parts (``item.messages()``) as OpenAI's."""
    converters = {
        "image": lambda part: image_part(part["image"]),
        "audio": lambda part: audio_part(part["audio"]),
    }
    return [
        {**message, "content": [converters.get(part.get("type"), dict)(part) for part in message["content"]]}
        if isinstance(message.get("content"), list)
        else message
        for message in messages
    ]


def _encoded_image(image: Any) -> bytes:
    from PIL import Image

    from labkit.common.images import to_png
    from labkit.common.media import read_bytes

    if isinstance(image, Image.Image):
        return to_png(image)
    if isinstance(image, str | Path | bytes | bytearray):
        return read_bytes(image, "image")
    raise MediaError(f"an image is a PIL image, a screen, a path or bytes, not {type(image).__name__}")


def _is_list_of_recordings(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and not isinstance(value[0], int | float)


def _several(value: Any, is_list: Any = lambda value: isinstance(value, list | tuple)) -> list[Any]:
    if value is None:
        return []
    return list(value) if is_list(value) else [value]
