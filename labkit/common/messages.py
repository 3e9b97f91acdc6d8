"""Messages of users in the form that the processors take: images and recordings loaded, each part checked. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from labkit.common.errors import LabError, MediaError
from labkit.common.images import image_format, load_image
from labkit.common.media import Encoded, name_of, read_bytes
from labkit.common.recordings import is_recording, load_audio


def load_media(source: Encoded) -> Image.Image | np.ndarray:
    """An image as from `load_image`, or a recording as from `load_audio`, whichever the content is.

    Raises:
        MediaError: neither of them, or one that cannot be used.
    """
    data, name = read_bytes(source, "file"), name_of(source, "file")
    if image_format(data) is not None:
        return load_image(data, name)
    if is_recording(data):
        return load_audio(data, name=name)
    raise MediaError(
        f"{name} is neither an image (PNG, JPEG, WebP, TIFF, ...) nor a recording (wav, flac, ogg, mp3) "
        f"that can be read ({len(data)} bytes)"
    )


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
