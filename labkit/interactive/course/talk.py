"""Exercises of notebook 07."""

from collections.abc import Mapping
from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint


def _message(answer: Any) -> None:
    """A user message in OpenAI's form with a picture, as a data URL, and a request."""
    from labkit.common.messages import LabError, normalise_messages

    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, Mapping):
        raise Hint("A message is a dictionary with role and content.")
    if answer.get("role") != "user":
        raise Hint(f"You are speaking: the role is user, not {answer.get('role')!r}.")
    content = answer.get("content")
    if not isinstance(content, list):
        raise Hint("With a picture, content is a list of parts, each a dictionary with its type.")
    kinds = [part.get("type") for part in content if isinstance(part, Mapping)]
    if "image" in kinds or "audio" in kinds:
        raise Hint("That part is for an engine in this process. A service takes image_url with a data URL.")
    for kind in ("image_url", "text"):
        if kind not in kinds:
            raise Hint(
                f"There is no part of the type {kind}; there are {', '.join(map(str, kinds)) or 'none'}."
            )
    url = next(part for part in content if part["type"] == "image_url").get("image_url")
    if not isinstance(url, Mapping) or not str(url.get("url", "")).startswith("data:image/"):
        raise Hint(
            'An image_url part is {"type": "image_url", "image_url": {"url": "data:image/png;base64,…"}}.'
        )
    try:
        normalise_messages([answer])
    except LabError as error:
        raise Hint(f"Nearly: {error}.") from None


EXERCISES = (
    Exercise(
        "07-a",
        "Write the message that sends a screen and the request “open the settings” to a service.",
        _message,
        "Any OpenAI client would send it as it is, and any service that sees pictures would understand it.",
        (
            "Two parts: one of the type image_url, one of the type text.",
            "phonetap's picture becomes a data URL by labkit.interactive.chat.data_url(screen.image).",
        ),
    ),
)
