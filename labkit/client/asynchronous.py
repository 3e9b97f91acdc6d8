"""The client for ``async`` code: `labkit.client.Client` with ``await``."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import httpx

from labkit.client.client import BASE_URL, TIMEOUT_S
from labkit.client.reply import (
    Piece,
    Reply,
    error_of,
    event_of,
    make_request,
    make_stream_request,
    read_reply,
    trusts_environment,
    unreachable,
)


class AsyncClient:
    """Asks one service; see `labkit.client.Client` for the arguments."""

    def __init__(
        self,
        base_url: str = BASE_URL,
        api_key: str = "EMPTY",
        model: str | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ):
        self.base_url = base_url.rstrip("/")
        self._model = model
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=timeout_s,
            trust_env=trusts_environment(base_url),
        )

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def models(self) -> list[str]:
        """The names that the service answers to."""
        return [card["id"] for card in (await self._send("GET", "/models"))["data"]]

    async def ask(self, text: str | None = None, **asked: Any) -> Reply:
        """One answer; see `labkit.client.Client.ask` for the arguments."""
        body = make_request(await self._named(), text, **asked)
        return read_reply(await self._send("POST", "/chat/completions", body))

    async def stream(self, text: str | None = None, **asked: Any) -> AsyncStream:
        """The same in pieces: ``async for piece in await client.stream("你是谁?")``."""
        body = make_stream_request(await self._named(), text, asked)
        return AsyncStream(self._http, f"{self.base_url}/chat/completions", body)

    async def _named(self) -> str:
        if self._model is None:
            self._model = (await self.models())[0]
        return self._model

    async def _send(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = await self._http.request(method, self.base_url + path, json=body)
        except httpx.HTTPError as error:
            raise unreachable(self.base_url, error) from None
        if response.status_code != 200:
            raise error_of(response.status_code, response.content, response.headers)
        return response.json()


class AsyncStream(AsyncIterator[Piece]):
    """Pieces of an answer; ``reply`` is what has come so far. `aclose` tells the service to stop."""

    def __init__(self, http: httpx.AsyncClient, url: str, body: Mapping[str, Any]):
        self.reply = Reply()
        self._pieces = self._run(http, url, body)

    async def _run(self, http: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> AsyncIterator[Piece]:
        try:
            async with http.stream("POST", url, json=body) as response:
                if response.status_code != 200:
                    raise error_of(response.status_code, await response.aread(), response.headers)
                async for line in response.aiter_lines():
                    event = event_of(line)
                    piece = None if event is None else self.reply.add(event)
                    if piece is not None:
                        yield piece
        except httpx.HTTPError as error:
            raise unreachable(url, error) from None

    async def __anext__(self) -> Piece:
        return await anext(self._pieces)

    async def aclose(self) -> None:
        """Leave."""
        await self._pieces.aclose()
