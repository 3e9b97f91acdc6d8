"""HTTP/1.1 connections that nobody can hold for nothing: a time for headers, a limit on their number, errors as JSON."""

from __future__ import annotations

import asyncio

import h11
import psutil
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from labkit.common.errors import ApiError
from labkit.service import log
from labkit.service.options import ServiceOptions
from labkit.service.replies import error_text

ACCEPTED_AT_ONCE = 4
"""Connections that asyncio accepts in one turn of its loop: others close in the turns between, as the limit asks."""
SPARE_DESCRIPTORS = 32
"""File descriptors that connections leave free: for those accepted before others have closed, files, the status page."""
LEAST_CONNECTIONS = 4


class Connection(H11Protocol):
    """uvicorn's connection; `with_limits` makes a class of it with a service's limits.

    At the limit, the connection that has waited longest for a request's headers, or else for a body, makes room for a
    new one: so /health is reachable while others are held open.
    """

    headers_s = 10.0
    limit = 512
    _timer: asyncio.TimerHandle | None = None
    _since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:
        """A client has connected."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.limit:
            self._make_room()

    def data_received(self, data: bytes) -> None:
        """A client has sent something."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """A response is written."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        super().connection_lost(exc)
        self._unset_timer()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        self._refuse(ApiError("this is no valid HTTP request", code="invalid_http"))

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def _is_sending_body(self) -> bool:
        return self._is_answering and self.cycle.more_body

    def _watch(self) -> None:
        """Let the time for headers run exactly while a request is waited for."""
        if self._is_answering:
            self._unset_timer()
        elif self._timer is None and not self.transport.is_closing():
            self._since = self.loop.time()
            self._timer = self.loop.call_later(self.headers_s, self._too_slow)

    def _unset_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        begun = self.conn.our_state is h11.IDLE and self.conn.trailing_data[0]
        if begun:
            self._refuse(
                ApiError(f"the headers were not there within {self.headers_s:g} s", 408, code="timeout")
            )
        self.transport.close()

    def _make_room(self) -> None:
        log.warning(f"{self.limit} connections are open: the one that waits longest is closed")
        waiting = [other for other in self.connections if not other._is_answering]
        if waiting == [self]:
            waiting = [other for other in self.connections if other._is_sending_body] or waiting
        oldest = min(waiting, key=lambda other: other._since)
        self.connections.discard(
            oldest
        )  # it counts no more, though the transport closes in the loop's next turn
        if oldest is self:
            self._refuse(
                ApiError(
                    f"the service has {self.limit} connections; try again later",
                    503,
                    code="too_many_connections",
                    headers={"Retry-After": "1"},
                )
            )
        else:
            oldest.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer without a request; h11 is not asked, for it may be in any state."""
        content = error_text(error.body()).encode()
        headers = {"Content-Type": "application/json", "Content-Length": len(content), "Connection": "close"}
        lines = [f"{name}: {value}" for name, value in {**headers, **error.headers}.items()]
        status = f"HTTP/1.1 {error.status} {STATUS_PHRASES[error.status].decode()}"
        self.transport.write("\r\n".join([status, *lines, "", ""]).encode() + content)
        self.transport.close()


def with_limits(options: ServiceOptions) -> type[Connection]:
    """The class of a service's connections."""
    limits = {"headers_s": options.headers_s, "limit": connection_limit(options.max_connections)}
    return type("LimitedConnection", (Connection,), limits)


def connection_limit(most: int) -> int:
    """``most``, or fewer where the process may not open so many files."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return most
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return most
    free = allowed - psutil.Process().num_fds() - SPARE_DESCRIPTORS
    return max(min(most, free), LEAST_CONNECTIONS)
