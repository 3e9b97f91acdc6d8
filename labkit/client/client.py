"""The client that waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import httpx

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
from labkit.common.actions import Action
from labkit.common.errors import ClientError

BASE_URL = "http://127.0.0.1:8000/v1"
TIMEOUT_S = 600.0


class Client:
    """Asks one service.

    Args:
        base_url: as OpenAI's clients are told, with ``/v1`` at its end.
        api_key: the service's key, if it has one.
        model: the name to ask for; the service's first one if None.
        timeout_s: longest wait for the next bytes.
    """

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
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {api_key}"},
            timeout=timeout_s,
            trust_env=trusts_environment(base_url),
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._http.close()

    @property
    def model(self) -> str:
        """The name that is asked for."""
        if self._model is None:
            self._model = self.models()[0]
        return self._model

    def models(self) -> list[str]:
        """The names that the service answers to."""
        return [card["id"] for card in self._send("GET", "/models")["data"]]

    def ask(
        self,
        text: str | None = None,
        *,
        image: Any = None,
        audio: Any = None,
        messages: Iterable[Mapping[str, Any]] = (),
        thinking: bool = False,
        **parameters: Any,
    ) -> Reply:
        """One answer.

        Args:
            text, image, audio: a user's turn; several images or recordings as a list.
            messages: the turns before it, or all of them.
            thinking: let the model think first; its thoughts are in ``reasoning``.
            parameters: any of the service's, as ``temperature=0.7, seed=1, response_format={"type": "action"}``.

        Raises:
            ClientError: what the service says, or that there is none.
            MediaError: an image or a recording that cannot be sent.
        """
        turn = {"image": image, "audio": audio, "messages": messages, "thinking": thinking}
        body = make_request(self.model, text, **turn, **parameters)
        return read_reply(self._send("POST", "/chat/completions", body))

    def act(self, text: str | None = None, **asked: Any) -> Action:
        """One action on the phone; the service keeps the answer to the grammar, so it always parses.

        The arguments are those of `ask`.
        """
        reply = self.ask(text, **{"response_format": {"type": "action"}, **asked})
        if reply.action is None:
            raise ClientError(f"the answer holds no action: {reply.answer.error}")
        return reply.action

    def stream(self, text: str | None = None, **asked: Any) -> Stream:
        """In pieces what `ask` gives, for the same arguments.

        ``for piece in client.stream("你是谁?"): print(piece.text, end="")``
        """
        body = make_stream_request(self.model, text, asked)
        return Stream(self._http, f"{self.base_url}/chat/completions", body)

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        try:
            response = self._http.request(method, self.base_url + path, json=body)
        except httpx.HTTPError as error:
            raise unreachable(self.base_url, error) from None
        if response.status_code != 200:
            raise error_of(response.status_code, response.content, response.headers)
        return response.json()


class Stream(Iterator[Piece]):
    """Pieces of an answer; ``reply`` is what has come so far, whole once they are exhausted.

    Leaving early (`close`, or the end of a ``with`` block) tells the service to stop.
    """

    def __init__(self, http: httpx.Client, url: str, body: Mapping[str, Any]):
        self.reply = Reply()
        self._pieces = self._run(http, url, body)

    def _run(self, http: httpx.Client, url: str, body: Mapping[str, Any]) -> Iterator[Piece]:
        try:
            with http.stream("POST", url, json=body) as response:
                if response.status_code != 200:
                    raise error_of(response.status_code, response.read(), response.headers)
                for line in response.iter_lines():
                    event = event_of(line)
                    piece = None if event is None else self.reply.add(event)
                    if piece is not None:
                        yield piece
        except httpx.HTTPError as error:
            raise unreachable(url, error) from None

    def __next__(self) -> Piece:
        return next(self._pieces)

    def close(self) -> None:
        """Leave."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
