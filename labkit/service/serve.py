"""``labkit serve``: load a model, listen, warm up, and say so in the article's four lines."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from labkit.common.errors import LabError
from labkit.common.formats import format_bytes, format_seconds
from labkit.service import log
from labkit.service.app import build_app
from labkit.service.backend import Backend, EngineBackend
from labkit.service.connections import ACCEPTED_AT_ONCE, with_limits
from labkit.service.options import ServiceOptions

BACKLOG = 1024
"""Connections that may wait to be accepted."""


def serve(
    model: str,
    plan: str | None,
    options: ServiceOptions,
    *,
    device: str = "auto",
    threads: int | None = None,
) -> None:
    """Serve a model until the process is told to stop (Ctrl-C or SIGTERM); running answers are finished.

    Raises:
        LabError: the model, the plan or the port cannot be had.
    """
    with listening(options) as listener:
        import torch

        from labkit.loading.load import load
        from labkit.models.spec import get_spec

        if threads:
            torch.set_num_threads(threads)
        warn(options)
        spec = get_spec(model)
        log.info(f"Loading {spec.name} with {f'plan {plan}' if plan else 'its plan'}...")
        engine = load(model, plan, device, progress=False)
        used = engine.resolved.predicted_bytes
        log.info(
            f"Model loaded on {engine.device} in {format_seconds(engine.load_s)}: plan {engine.plan.name}, "
            f"{format_bytes(used)} of weights"
        )
        backend = EngineBackend(
            engine, options, lambda: log.success(f"{spec.name} service is ready for inference!")
        )
        run(backend, options, listener)


def run(backend: Backend, options: ServiceOptions, listener: socket.socket) -> None:
    """Serve a backend at a socket that is bound already."""

    log.take_over_libraries()
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn stops, and then raises the signal once more
    with contextlib.suppress(KeyboardInterrupt):
        Server(backend, options, listener).run(sockets=[listener])
    log.info("The service has stopped")


class Server(uvicorn.Server):
    """uvicorn before a backend, at a socket that is bound already, with the service's limits."""

    def __init__(self, backend: Backend, options: ServiceOptions, listener: socket.socket):
        self._listener = listener
        super().__init__(
            uvicorn.Config(
                build_app(backend, options),
                http=with_limits(options),
                ws="none",
                loop="asyncio",
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="on",
                server_header=False,
                backlog=ACCEPTED_AT_ONCE,
                timeout_graceful_shutdown=max(int(options.grace_s), 1),
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        await super().startup(sockets)
        # asyncio has one number for what it accepts at once and for what the system lets wait; more may wait.
        self._listener.listen(BACKLOG)
        log.info(f"FastAPI server started at {url_of(self._listener)}")


@contextlib.contextmanager
def listening(options: ServiceOptions) -> Iterator[socket.socket]:
    """The service's socket, bound before anything takes long; connections wait in it until the server runs.

    Raises:
        LabError: the port is taken, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM
        )[0]
    except (OSError, UnicodeError):
        raise LabError(f"the address {options.host} is unknown") from None
    with socket.socket(
        family, kind, protocol
    ) as listener:  # with its protocol: asyncio then sends small pieces at once
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen()  # with SO_REUSEADDR, two sockets that only bind get the same port
        except OSError as error:
            raise LabError(
                f"port {options.port} of {options.host} cannot be used: {error.strerror}; "
                "another --port can, or end what uses it"
            ) from None
        yield listener


def url_of(listener: socket.socket) -> str:
    """The service's address, as a browser on this machine takes it."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host if ":" not in host else f"[{host}]")
    return f"http://{host}:{port}"


def warn(options: ServiceOptions) -> None:
    """Say so if everybody can use the service."""
    if not options.is_local and not options.api_key:
        log.warning(
            f"Listening on {options.host} without an API key: whoever reaches this machine can use the model. "
            "Set one by --api-key or $LABKIT_API_KEY"
        )
