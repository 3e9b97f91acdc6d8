"""``labkit chat``: its arguments, and what it does."""

import argparse
import contextlib
import signal
from collections.abc import Iterator

from labkit.common.errors import LabError

URL = "http://127.0.0.1:8000/v1"


def add_chat(commands: "argparse._SubParsersAction") -> None:
    """Add the command to the command line."""
    command = commands.add_parser(
        "chat",
        help="open the chat window",
        description=(
            "Open a window to talk to a phone agent: text, pictures, speech, its taps drawn on the screen; two\n"
            "services side by side. With a MODEL it starts services for it and stops them at the end."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(
            "examples:\n"
            "  labkit chat pocket\n"
            "  labkit chat pocket --plans fp32,int4        # A/B\n"
            "  labkit chat --url http://127.0.0.1:8000/v1"
        ),
    )
    command.add_argument("model", nargs="?", help="start services for this model, as `labkit serve` does")
    command.add_argument("--plans", metavar="A,B", help="one plan, or two for A/B (bf16)")
    command.add_argument(
        "--url", action="append", metavar="URL", help=f"a running service; twice for A/B ({URL})"
    )
    command.add_argument("--api-key", default="EMPTY", metavar="KEY", help="key of these services (EMPTY)")
    command.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="listen here (127.0.0.1)")
    command.add_argument(
        "--port", type=int, metavar="N", help="port of the window (7860, or the next free one)"
    )
    command.add_argument("--language", choices=("en", "zh"), default="en", help="the window's language (en)")
    command.add_argument(
        "--browser", action=argparse.BooleanOptionalAction, default=True, help="open a browser (--browser)"
    )
    command.set_defaults(run=chat)


def chat(options: argparse.Namespace) -> None:
    """Open the window, and stay until Ctrl-C."""
    plans = options.plans.split(",") if options.plans else []
    if options.url and (options.model or plans):
        raise LabError("give a MODEL to start services for, or --url of running ones, not both")
    if len(plans) > 2 or len(options.url or []) > 2:
        raise LabError("the chat talks to one service or to two: give at most two plans or URLs")
    with _ended_by_any_signal():
        _open(options, plans)


@contextlib.contextmanager
def _ended_by_any_signal() -> Iterator[None]:
    """A closed terminal, or a polite kill, ends the block as Ctrl-C does: what was started in it is stopped."""
    names = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.signal(name, signal.default_int_handler) for name in names}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def _open(options: argparse.Namespace, plans: list[str]) -> None:
    """Start what is asked for, and show the window until it is ended."""
    from labkit.interactive.chat import Endpoint, build, local

    started = []
    try:
        if options.model or plans:
            for plan in plans or ["bf16"]:
                print(f"Starting {options.model or 'pocket'} in {plan} …", flush=True)
                endpoint, service = local.start(options.model or "pocket", plan.strip())
                started.append((endpoint, service))
            endpoints = [endpoint for endpoint, _ in started]
        else:
            endpoints = [Endpoint(url, api_key=options.api_key) for url in options.url or [URL]]
        window = build(endpoints, options.language)
        window.launch(server_name=options.host, server_port=options.port, inbrowser=options.browser)
    finally:
        for _, service in started:
            service.stop()
