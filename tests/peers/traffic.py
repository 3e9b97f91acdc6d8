"""Traffic: requests over many connections at once to any service with OpenAI's API, and what became of each. No torch.

`soak_service.py` and `compare_servers.py` beside it measure with it. The clock of a request
starts before it is sent; its first token is the first piece of text or thinking that arrives.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from labkit.client import AsyncClient
from labkit.common.errors import ClientError

TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Request:
    """One chat request.

    Attributes:
        name: what kind it is, for whoever reads the samples.
        body: the JSON without ``model`` and ``stream``; every request is streamed.
        leave_after: go away after so many pieces of the answer; None: read it to its end.
    """

    name: str
    body: Mapping[str, Any]
    leave_after: int | None = None


@dataclass(frozen=True)
class Sample:
    """What became of a request.

    Attributes:
        name: the request's.
        status: the HTTP status; 200 and an ``error`` is an answer that broke off; None is no answer at all.
        text: thinking and answer as far as they came.
        error: what was said of it, or None.
        left: the client went away, as it was told to.
        begun_s: when it was sent, in seconds from the start of the traffic.
        ttft_s: from there to the first piece; None if there was none.
        total_s: from there to the end.
    """

    name: str
    status: int | None
    text: str
    error: str | None
    left: bool
    begun_s: float
    ttft_s: float | None
    total_s: float

    @property
    def is_whole(self) -> bool:
        """Whether an answer was read to its end."""
        return self.status == 200 and self.error is None and not self.left


def send(
    base_url: str,
    requests: Iterable[Request],
    connections: int,
    *,
    model: str,
    seconds: float | None = None,
    on_sample: Callable[[Sample], None] | None = None,
) -> list[Sample]:
    """Send requests over so many connections, each sending the next as soon as its last has ended.

    Args:
        base_url: as OpenAI's clients are told, with ``/v1`` at its end.
        requests: in this order; endless if ``seconds`` ends them.
        model: the name to ask for.
        seconds: send none after that.
        on_sample: told of each as it ends.
    """
    return asyncio.run(_send(base_url, iter(requests), connections, model, seconds, on_sample))


async def _send(
    base_url: str,
    requests: Iterator[Request],
    connections: int,
    model: str,
    seconds: float | None,
    on_sample: Callable[[Sample], None] | None,
) -> list[Sample]:
    samples: list[Sample] = []

    async def connection(client: AsyncClient) -> None:
        for request in requests:
            sample = await _ask(client, request, started)
            samples.append(sample)
            if on_sample is not None:
                on_sample(sample)
            if seconds is not None and time.monotonic() - started > seconds:
                break

    async with AsyncClient(base_url, model=model, timeout_s=TIMEOUT_S) as client:
        started = time.monotonic()
        await asyncio.gather(*(connection(client) for _ in range(connections)))
    return samples


async def _ask(client: AsyncClient, request: Request, started: float) -> Sample:
    begun = time.monotonic()
    stream = await client.stream(**request.body)
    first, pieces, status, reason, left = None, 0, 200, None, False
    try:
        async for _ in stream:
            first = first or time.monotonic()
            pieces += 1
            if request.leave_after is not None and pieces >= request.leave_after:
                left = True
                break
    except ClientError as error:
        status, reason = error.status, str(error)
    finally:
        await stream.aclose()
    ended = time.monotonic()
    return Sample(
        name=request.name,
        status=status,
        text=stream.reply.reasoning + stream.reply.text,
        error=reason,
        left=left,
        begun_s=begun - started,
        ttft_s=None if first is None else first - begun,
        total_s=ended - begun,
    )


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that at least ``share`` of them do not exceed; None of none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
