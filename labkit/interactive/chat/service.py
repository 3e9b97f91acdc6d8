"""A service as the chat sees it: an OpenAI client, its models, its facts, and an answer while it comes."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from labkit.common.actions import Answer, parse_answer
from labkit.common.errors import ClientError

LOCAL = ("localhost", "127.0.0.1", "::1")
TIMEOUT_S = 300.0
HEARD = ("听到：", "I heard: ")
"""How the pocket model's thinking begins when it was spoken to."""


@dataclass(frozen=True)
class Endpoint:
    """Where a service is. ``model`` None: the first that it names."""

    base_url: str
    model: str | None = None
    api_key: str = dataclasses.field(default="EMPTY", repr=False)

    def __post_init__(self) -> None:
        place = urlsplit(self.base_url)
        if place.scheme not in ("http", "https") or not place.hostname:
            raise ClientError(f"a base URL is like http://127.0.0.1:8000/v1, not {self.base_url!r}")


@dataclass(frozen=True)
class Reply:
    """An answer so far.

    Attributes:
        content: what was written, thinking apart.
        thinking: what was thought, or "".
        ttft_s, total_s: seconds to the first piece, and so far.
        tokens: tokens written, as the service counts them; None if it does not say.
        finished: nothing comes any more.
        error: why there is no (whole) answer, or None.
    """

    content: str = ""
    thinking: str = ""
    ttft_s: float | None = None
    total_s: float = 0.0
    tokens: int | None = None
    finished: bool = False
    error: str | None = None

    @property
    def answer(self) -> Answer:
        """The content taken apart; thinking that stands in it is thinking."""
        return parse_answer(self.content)

    @property
    def thoughts(self) -> str:
        """The thinking, wherever the service has put it."""
        return self.thinking or self.answer.thinking or ""

    @property
    def heard(self) -> str | None:
        """What was heard, where the thinking begins with it."""
        for mark in HEARD:
            if self.thoughts.startswith(mark):
                told = self.thoughts.removeprefix(mark)
                end = min((at for at in (told.find("。"), told.find(". ")) if at >= 0), default=len(told))
                return told[:end].strip()
        return None


def client_of(endpoint: Endpoint) -> Any:
    """An OpenAI client; a service on this machine is asked directly, whatever proxies are set."""
    import openai

    local = urlsplit(endpoint.base_url).hostname in LOCAL
    return openai.OpenAI(
        base_url=endpoint.base_url,
        api_key=endpoint.api_key or "EMPTY",
        timeout=TIMEOUT_S,
        max_retries=0,
        http_client=openai.DefaultHttpxClient(trust_env=not local),
    )


def models_of(endpoint: Endpoint) -> list[str]:
    """Names of the models that a service offers. Raises ClientError if it does not answer."""
    import openai

    try:
        with client_of(endpoint) as client:
            return [model.id for model in client.with_options(timeout=10).models.list().data]
    except openai.OpenAIError as error:
        raise ClientError(f"{endpoint.base_url} does not answer: {_told(error)}") from None


def facts_of(endpoint: Endpoint) -> dict[str, Any]:
    """What the lab's own service says of itself (plan, weights_bytes, modalities …); of another one nothing."""
    import httpx

    base = endpoint.base_url.rstrip("/").removesuffix("/v1")
    local = urlsplit(base).hostname in LOCAL
    try:
        headers = {"Authorization": f"Bearer {endpoint.api_key}"}
        told = httpx.get(f"{base}/status", timeout=5, trust_env=not local, headers=headers)
        facts = told.json() if told.status_code == 200 else {}
    except (httpx.HTTPError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def stream(
    endpoint: Endpoint,
    messages: Sequence[Mapping[str, Any]],
    *,
    thinking: bool = False,
    temperature: float = 0.0,
    max_tokens: int = 512,
) -> Iterator[Reply]:
    """The answer to a conversation, again and again as it grows; the last one is finished, or has an error.

    Leaving early ends the request. Never raises for what the service does.
    """
    import openai

    began = time.perf_counter()
    reply = Reply()
    wishes = {"enable_thinking": True, "return_reasoning": True} if thinking else {}
    try:
        model = endpoint.model or next(iter(models_of(endpoint)), None)
        if model is None:
            raise ClientError(f"{endpoint.base_url} offers no model")
        with (
            client_of(endpoint) as client,
            client.chat.completions.create(
                model=model,
                messages=list(messages),
                stream=True,
                temperature=temperature,
                max_tokens=max_tokens,
                stream_options={"include_usage": True},
                extra_body=wishes or None,
            ) as chunks,
        ):
            for chunk in chunks:
                reply = _grown(reply, chunk, time.perf_counter() - began)
                yield reply
    except (openai.OpenAIError, ClientError) as error:
        spent = time.perf_counter() - began
        yield dataclasses.replace(reply, error=_told(error), finished=True, total_s=spent)
        return
    yield dataclasses.replace(reply, finished=True)


def _grown(reply: Reply, chunk: Any, spent_s: float) -> Reply:
    usage = getattr(chunk, "usage", None)
    if usage is not None:
        reply = dataclasses.replace(reply, tokens=usage.completion_tokens)
    if not chunk.choices:
        return reply
    delta = chunk.choices[0].delta
    thought = getattr(delta, "reasoning_content", None) or getattr(delta, "reasoning", None) or ""
    text = delta.content or ""
    if not (thought or text):
        return reply
    return dataclasses.replace(
        reply,
        content=reply.content + text,
        thinking=reply.thinking + thought,
        ttft_s=spent_s if reply.ttft_s is None else reply.ttft_s,
        total_s=spent_s,
    )


def _told(error: Exception) -> str:
    """A client's error in one line, as the service said it."""
    body = getattr(error, "body", None)
    if isinstance(body, Mapping) and body.get("message"):
        return str(body["message"])
    cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
    return f"{error}{cause}"
