"""What is asked, as OpenAI messages: pictures as data URLs, recordings as wav."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from labkit.common.actions import SAMPLE_RATE


def data_url(picture: Image.Image) -> str:
    """A picture as a ``data:`` URL, PNG: what an ``image_url`` part of a message takes."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def wav(samples: np.ndarray) -> str:
    """A recording, float32 [samples] at 16 kHz, as base64 of a wav file: for an ``input_audio`` part."""
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()


def user_message(
    text: str = "", picture: Image.Image | None = None, recording: np.ndarray | None = None
) -> dict[str, Any]:
    """A user message of what is given: picture, then recording, then text, as the models are used to."""
    parts: list[dict[str, Any]] = []
    if picture is not None:
        parts.append({"type": "image_url", "image_url": {"url": data_url(picture)}})
    if recording is not None:
        parts.append({"type": "input_audio", "input_audio": {"data": wav(recording), "format": "wav"}})
    if text:
        parts.append({"type": "text", "text": text})
    return {"role": "user", "content": text if [part["type"] for part in parts] == ["text"] else parts}


def without_media(message: Mapping[str, Any]) -> str:
    """A message as text, for an export: pictures and recordings are named, not written out."""
    if isinstance(message["content"], str):
        return message["content"]
    names = {"image_url": "[picture]", "input_audio": "[recording]"}
    return " ".join(part.get("text") or names.get(part["type"], "") for part in message["content"])
