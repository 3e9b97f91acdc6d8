"""A request's messages made into the lab's: pictures and recordings decoded, tool results as text."""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from PIL import Image

from labkit.common.errors import ApiError, MediaError
from labkit.common.images import IMAGE_FORMATS, load_image
from labkit.common.media import read_bytes
from labkit.common.recordings import load_audio
from labkit.service.messages import ImagePart, Message, Part, RefusalPart, TextPart
from labkit.service.options import ServiceOptions
from labkit.service.remote import RemoteImages

_ROLES = {"developer": "system", "tool": "user"}


def check_media(messages: list[Message], options: ServiceOptions) -> None:
    """Refuse too many images or recordings, and those that no user sent, before any is decoded.

    Raises:
        ApiError: with the place.
    """
    counts = {"image_url": 0, "input_audio": 0}
    limits = {
        "image_url": (options.max_images, "images"),
        "input_audio": (options.max_recordings, "recordings"),
    }
    for index, message in enumerate(messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            where = f"messages.{index}.content.{place}"
            if part.type == "refusal" and message.role != "assistant":
                raise ApiError(f"{where}: only an assistant refuses", param=where)
            if part.type in ("text", "refusal"):
                continue
            if message.role != "user":
                raise ApiError(f"{where}: only user messages take images and recordings", param=where)
            counts[part.type] += 1
            limit, name = limits[part.type]
            if counts[part.type] > limit:
                raise ApiError(f"{where}: at most {limit} {name} are accepted in one request", param=where)


def remote_urls(messages: list[Message]) -> dict[str, str]:
    """``{url: place}`` of every image that would have to be fetched."""
    return {
        part.image_url.url: f"messages.{index}.content.{place}.image_url"
        for index, message in enumerate(messages)
        for place, part in enumerate(message.content if isinstance(message.content, list) else ())
        if isinstance(part, ImagePart) and not part.image_url.url.startswith("data:")
    }


async def fetch_images(messages: list[Message], remote: RemoteImages | None) -> dict[str, bytes]:
    """The bytes behind every image address that is no data URL.

    Raises:
        ApiError: remote images are off, or one cannot be had.
    """
    fetched = {}
    for url, where in remote_urls(messages).items():
        if remote is None or not url.startswith(("http://", "https://")):
            more = "" if remote is None else " or an http(s) address"
            raise ApiError(f"{where}: an image is a data: URL (data:image/png;base64,…){more}", param=where)
        try:
            fetched[url] = await remote.fetch(url)
        except MediaError as error:
            raise ApiError(f"{where}: {error}", param=where) from None
    return fetched


def pixels_by_place(messages: list[Message], fetched: Mapping[str, bytes]) -> Iterator[tuple[str, int]]:
    """``(place, pixels)`` of every image, as its header says; nothing is decoded."""
    for index, message in enumerate(messages):
        for place, part in enumerate(message.content if isinstance(message.content, list) else ()):
            if isinstance(part, ImagePart):
                url = part.image_url.url
                yield f"messages.{index}.content.{place}.image_url", _pixels(fetched.get(url, url))


def _pixels(source: str | bytes) -> int:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            width, height = Image.open(io.BytesIO(read_bytes(source, "image")), formats=IMAGE_FORMATS).size
    except Exception:  # Pillow raises many kinds; `load_image` refuses the image in its own words
        return 0
    return width * height


def lab_messages(messages: list[Message], fetched: Mapping[str, bytes]) -> list[dict[str, Any]]:
    """Messages as `labkit.common.messages.normalise_messages` gives them. Decoding takes a while: not for the event loop.

    Raises:
        ApiError: an image or a recording that cannot be used, with its place.
    """
    return [_message(message, index, fetched) for index, message in enumerate(messages)]


def _message(message: Message, index: int, fetched: Mapping[str, bytes]) -> dict[str, Any]:
    role = _ROLES.get(message.role, message.role)
    if message.role == "tool":
        return {"role": role, "content": f"Result of {message.tool_call_id}: {_text(message.content)}"}
    if message.role == "assistant" and message.tool_calls:
        calls = [
            json.dumps({"name": call.function.name, "arguments": call.function.arguments}, ensure_ascii=False)
            for call in message.tool_calls
        ]
        text = [_text(message.content)] if message.content else []
        return {"role": role, "content": "\n".join([*text, *calls])}
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts = [
        _part(part, f"messages.{index}.content.{place}", fetched)
        for place, part in enumerate(message.content)
    ]
    return {"role": role, "content": parts}


def _part(part: Part, where: str, fetched: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        if isinstance(part, TextPart):
            return {"type": "text", "text": part.text}
        if isinstance(part, RefusalPart):
            return {"type": "text", "text": part.refusal}
        if isinstance(part, ImagePart):
            url = part.image_url.url
            return {"type": "image", "image": load_image(fetched.get(url, url))}
        return {"type": "audio", "audio": load_audio(_data_url(part.input_audio.data))}
    except MediaError as error:
        code = "invalid_image" if isinstance(part, ImagePart) else "invalid_audio"
        raise ApiError(f"{where}: {error}", param=where, code=code) from None


def _data_url(data: str) -> str:
    return data if data.startswith("data:") else f"data:audio;base64,{data}"


def _text(content: str | list[Part] | None) -> str:
    if isinstance(content, str):
        return content
    texts = (
        part.refusal if isinstance(part, RefusalPart) else part.text
        for part in content or ()
        if isinstance(part, TextPart | RefusalPart)
    )
    return "\n".join(texts)
