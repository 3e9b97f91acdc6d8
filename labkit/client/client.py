"""The blocking client and the asynchronous client; both send through the openai package.

Requests and answers are plain JSON (``cast_to=object``), which keeps the fields that a service adds to OpenAI's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from labkit.client.reply import (
    Piece,
    Reply,
    client_errors,
    list_in,
    make_request,
    make_stream_request,
    read_reply,
    trusts_environment,
)
from labkit.common.actions import Action
from labkit.common.errors import ClientError

if TYPE_CHECKING:
    import openai

BASE_URL = "http://127.0.0.1:8000/v1"
CHAT = "/chat/completions"
TIMEOUT_S = 600.0
ACTION = {"response_format": {"type": "action"}}


class _Service:
    """The settings that both clients share."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        api_key: str = "EMPTY",
        model: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        max_retries: int = 0,
    ):
        self.base_url = base_url.rstrip("/")
        self._model = model
        self._options: dict[str, Any] = {
            "base_url": self.base_url,
            "api_key": api_key or "EMPTY",
            "timeout": timeout_s,
            "max_retries": max_retries,
        }


class Client(_Service):
    """A client of one service.

    Args:
        base_url: the base URL for OpenAI clients, ending in ``/v1``.
        api_key: the service's key, if it has one.
        model: the model to request; None takes the service's first model.
        timeout_s: the longest wait for the next bytes.
        max_retries: how often to repeat a request after a failed connection, a timeout, or status 429 or 5xx; the
            service's ``Retry-After`` sets the wait.
    """

    @cached_property
    def _openai(self) -> openai.OpenAI:
        import openai

        http = openai.DefaultHttpxClient(trust_env=trusts_environment(self.base_url))
        return openai.OpenAI(**self._options, http_client=http)

    def __enter__(self) -> Client:
        self._openai.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        if "_openai" in self.__dict__:
            self._openai.close()

    @property
    def model(self) -> str:
        """The name of the model in requests."""
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def models(self) -> list[str]:
        """The names that the service answers to."""
        with client_errors(self.base_url):
            document = self._openai.get("/models", cast_to=object)
        return [entry["id"] for entry in list_in(document, "data")]

    def status(self) -> dict[str, Any]:
        """The status of a labkit service (plan, weights_bytes, modalities …); empty for other services."""
        try:
            with client_errors(self.base_url):
                facts = self._openai.get(f"{self.base_url.removesuffix('/v1')}/status", cast_to=object)
        except ClientError:
            return {}
        return facts if isinstance(facts, dict) else {}

    def ask(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        audio: Any = None,
        messages: Iterable[Mapping[str, Any]] = (),
        thinking: bool | None = None,
        **parameters: Any,
    ) -> Reply:
        """Ask for one answer.

        Args:
            text, image, audio: the user's turn; pass several images or recordings as a list.
            messages: the preceding turns, or the whole conversation.
            thinking: whether the model thinks first; its thoughts are in ``reasoning``. None keeps the service's
                default and sends no field that only some services accept.
            parameters: any parameter of the service, such as
                ``temperature=0.7, seed=1, response_format={"type": "action"}``.

        Raises:
            ClientError: the service refuses, fails, or is not there.
            MediaError: an image or a recording that cannot be sent.
        """
        turn = {"image": image, "audio": audio, "messages": messages, "thinking": thinking}
        body = make_request(self.model, text, **turn, **parameters)
        with client_errors(self.base_url):
            started = time.perf_counter()
            document = self._openai.post(CHAT, cast_to=object, body=body)
        return read_reply(document, time.perf_counter() - started)

    def act(self, text: str | None = None, **options: Any) -> Action:
        """Ask for one action on the phone; the service enforces the action grammar, so the answer always parses.

        The arguments are those of `ask`.
        """
        return self.ask(text, **{**ACTION, **options}).expect_action()

    def stream(self, text: str | None = None, **options: Any) -> Stream:
        """Ask for an answer in pieces; the arguments are those of `ask`.

        ``for piece in client.stream("你是谁?"): print(piece.text, end="")``
        """
        return Stream(self._openai, self.base_url, make_stream_request(self.model, text, options))


class Stream(Iterator[Piece]):
    """The pieces of an answer; ``reply`` holds the answer so far, and all of it once the pieces are exhausted.

    Closing early (`close`, or the end of a ``with`` block) makes the service stop.
    """

    def __init__(self, client: openai.OpenAI, url: str, body: Mapping[str, Any]):
        self.reply = Reply()
        self._pieces = self._run(client, url, body)

    def _run(self, client: openai.OpenAI, url: str, body: Mapping[str, Any]) -> Iterator[Piece]:
        import openai

        started = time.perf_counter()
        kind = {"cast_to": object, "stream": True, "stream_cls": openai.Stream[object]}
        with client_errors(url):
            events = client.post(CHAT, body=body, **kind)
        with client_errors(url, begun=True), events:
            for event in events:
                piece = self.reply.add(event, time.perf_counter() - started)
                if piece is not None:
                    yield piece
        self.reply.finished = True

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Close the stream."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class AsyncClient(_Service):
    """`Client` with ``await``; the arguments are the same."""

    @cached_property
    def _openai(self) -> openai.AsyncOpenAI:
        import openai

        http = openai.DefaultAsyncHttpxClient(trust_env=trusts_environment(self.base_url))
        return openai.AsyncOpenAI(**self._options, http_client=http)

    async def __aenter__(self) -> AsyncClient:
        await self._openai.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        if "_openai" in self.__dict__:
            await self._openai.close()

    async def models(self) -> list[str]:
        """The names that the service answers to."""
        with client_errors(self.base_url):
            document = await self._openai.get("/models", cast_to=object)
        return [entry["id"] for entry in list_in(document, "data")]

    async def ask(self, text: str | None = None, **options: Any) -> Reply:
        """Ask for one answer; see `Client.ask` for the arguments."""
        body = make_request(await self._model_name(), text, **options)
        with client_errors(self.base_url):
            started = time.perf_counter()
            document = await self._openai.post(CHAT, cast_to=object, body=body)
        return read_reply(document, time.perf_counter() - started)

    async def act(self, text: str | None = None, **options: Any) -> Action:
        """Ask for one action on the phone; see `Client.act`."""
        return (await self.ask(text, **{**ACTION, **options})).expect_action()

    async def stream(self, text: str | None = None, **options: Any) -> AsyncStream:
        """The same in pieces: ``async for piece in await client.stream("你是谁?")``."""
        body = make_stream_request(await self._model_name(), text, options)
        return AsyncStream(self._openai, self.base_url, body)

    async def _model_name(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model


class AsyncStream(AsyncIterator[Piece]):
    """The pieces of an answer; ``reply`` holds the answer so far. `aclose` makes the service stop."""

    def __init__(self, client: openai.AsyncOpenAI, url: str, body: Mapping[str, Any]):
        self.reply = Reply()
        self._pieces = self._run(client, url, body)

    async def _run(
        self, client: openai.AsyncOpenAI, url: str, body: Mapping[str, Any]
    ) -> AsyncIterator[Piece]:
        import openai

        started = time.perf_counter()
        kind = {"cast_to": object, "stream": True, "stream_cls": openai.AsyncStream[object]}
        with client_errors(url):
            events = await client.post(CHAT, body=body, **kind)
        with client_errors(url, begun=True):
            async with events:
                async for event in events:
                    piece = self.reply.add(event, time.perf_counter() - started)
                    if piece is not None:
                        yield piece
        self.reply.finished = True

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Close the stream."""
        await self._pieces.aclose()
