"""The address of a service, and its streamed answers."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from labkit.client import Client, Reply
from labkit.common.errors import ClientError
from labkit.common.formats import format_bytes

TIMEOUT_S = 300.0


@dataclass(frozen=True)
class Endpoint:
    """The address of a service. ``model`` None: the first model that it lists."""

    base_url: str
    model: str | None = None
    api_key: str = dataclasses.field(default="EMPTY", repr=False)

    def __post_init__(self) -> None:
        place = urlsplit(self.base_url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ClientError(f"a base URL is like http://127.0.0.1:8000/v1, not {self.base_url!r}")

    def client(self, timeout_s: float = TIMEOUT_S) -> Client:
        """A client of the service."""
        return Client(self.base_url, self.api_key, self.model, timeout_s=timeout_s)

    def models(self) -> list[str]:
        """Names of the models that the service offers. Raises ClientError if it does not answer."""
        with self.client(timeout_s=10) as client:
            return client.models()

    def facts(self) -> dict[str, Any]:
        """The status of a lab service; see `labkit.client.Client.status`."""
        with self.client(timeout_s=5) as client:
            return client.status()


def stream(
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    temperature: float = 0.0,
    max_tokens: int = 512,
) -> Iterator[Reply]:
    """Yield the answer to a conversation as it grows; the last reply is finished, or has an error.

    Closing the iterator ends the request. Errors of the service are in ``Reply.error``, never raised.
    """
    reply = Reply()
    options = {"thinking": thinking or None, "temperature": temperature, "max_tokens": max_tokens}
    try:
        with endpoint.client() as client, client.stream(messages=messages, **options) as pieces:
            reply = pieces.reply
            for _ in pieces:
                yield dataclasses.replace(reply)
    except ClientError as error:
        reply = dataclasses.replace(reply, error=str(error), finished=True)
    yield reply


def describe(endpoint: Endpoint, model: str | None, words: Mapping[str, str]) -> str:
    """Model, plan, bytes and device, as far as the service reports them."""
    facts = endpoint.facts()
    loaded = facts.get("model") or model
    parts = [model or "–"] if model != loaded or not facts.get("plan") else []
    if facts.get("plan"):
        parts.append(words["under"].format(model=loaded, plan=facts["plan"]))
    if facts.get("weights_bytes"):
        parts.append(format_bytes(facts["weights_bytes"]))
    if facts.get("device"):
        parts.append(str(facts["device"]))
    return ", ".join(dict.fromkeys(parts))
