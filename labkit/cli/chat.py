"""``labkit chat``: the chat window, with its own services or running services."""

import argparse
import contextlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass

from labkit.cli.arguments import Commands, add_command
from labkit.common.errors import LabError
from labkit.common.options import add_options, option

URL = "http://127.0.0.1:8000/v1"


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """The services of the chat, and its window."""

    plans: tuple[str, ...] = option((), "one plan, or two for A/B", metavar="A,B", usual="bf16")
    api_key: str = option("EMPTY", "key of these services", metavar="KEY")
    host: str = option("127.0.0.1", "address to listen on", metavar="ADDRESS")
    port: int | None = option(
        None, "port of the window", least=0, most=65535, usual="7860, or the next free one"
    )
    language: str = option("en", "the window's language", ("en", "zh"))
    browser: bool = option(True, "open a browser")


def add(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "chat",
        run,
        "open the chat window",
        (
            "Open a window to talk to a phone agent: text, pictures, speech, its taps drawn on the screen; two\n"
            "services side by side. With a MODEL it starts services for it and stops them at the end."
        ),
        (
            "examples:\n"
            "  labkit chat pocket\n"
            "  labkit chat pocket --plans fp32,int4        # A/B\n"
            "  labkit chat --url http://127.0.0.1:8000/v1"
        ),
    )
    command.add_argument("model", nargs="?", help="start services for this model, as `labkit serve` does")
    command.add_argument(
        "--url", action="append", metavar="URL", help=f"a running service; twice for A/B ({URL})"
    )
    add_options(command, ChatOptions)


def run(options: argparse.Namespace) -> None:
    """Open the window, and stay until Ctrl-C."""
    plans = list(options.plans)
    if options.url and (options.model or plans):
        raise LabError("give a MODEL to start services for, or --url of running ones, not both")
    if len(plans) > 2 or len(options.url or []) > 2:
        raise LabError("the chat talks to one service or to two: give at most two plans or URLs")
    with _ended_by_any_signal():
        _open(options, plans)


@contextlib.contextmanager
def _ended_by_any_signal() -> Iterator[None]:
    """Treat SIGTERM and SIGHUP like Ctrl-C inside the block, so that its services are stopped."""
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(name, signal.default_int_handler) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _open(options: argparse.Namespace, plans: list[str]) -> None:
    """Start the services, and show the window until it ends."""
    from labkit.interactive.chat import Endpoint, build, local

    started = []
    try:
        if options.model or plans:
            for plan in plans or ["bf16"]:
                print(f"Starting {options.model or 'pocket'} in {plan} …", flush=True)
                endpoint, service = local.start(options.model or "pocket", plan)
                started.append((endpoint, service))
            endpoints = [endpoint for endpoint, _ in started]
        else:
            endpoints = [Endpoint(url, api_key=options.api_key) for url in options.url or [URL]]
        window = build(endpoints, options.language)
        window.launch(server_name=options.host, server_port=options.port, inbrowser=options.browser)
    finally:
        for _, service in started:
            service.stop()
