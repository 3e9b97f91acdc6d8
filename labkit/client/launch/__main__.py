"""``python -m labkit.client.launch``: the commands of assets/run_autoglm_server.sh.

Exit codes: 0 done, or ready; 1 failed, or unhealthy; 2 wrong arguments; 3 not running.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from labkit.client.launch.request import add_serve_arguments, flags_of
from labkit.client.launch.start import find, start, state_of
from labkit.common.command import exit_code
from labkit.common.options import Kind, Parser
from labkit.models.spec import get_spec
from labkit.service.arguments import options_of
from labkit.service.options import ServiceOptions

COMMANDS = ("start", "stop", "restart", "status", "logs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the default is ``start``."""
    return exit_code(
        _run,
        arguments,
        prefix="[ERROR] ",
        warning="[WARNING] ",
        interrupted="a service that was started goes on",
    )


def _run(words: Sequence[str]) -> int:
    words = list(words)
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help")):
        words.insert(0, "start")
    options = build_parser().parse_args(words)
    return options.run(options)


def build_parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = Parser(
        prog="run_autoglm_server.sh",
        description="Start, stop and watch the service; without a command: start.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, description in (
        ("start", _start, "start it in the background, and wait until it is ready"),
        ("restart", _restart, "stop it, then start it"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument("model", nargs="?", default="pocket", help="as for `labkit serve` (pocket)")
        add_serve_arguments(command)
        command.set_defaults(run=run)
    for name, run, description in (
        ("stop", _stop, "let it finish what runs, then end it"),
        ("status", _status, "say whether it is ready"),
        ("logs", _logs, "print its log"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        port = Kind(int, least=1, most=65535)
        command.add_argument(
            "--port", type=port, default=ServiceOptions.port, metavar="N", help="which (8000)"
        )
        command.set_defaults(run=run)
        if name == "logs":
            command.add_argument(
                "--lines", type=Kind(int, least=1), default=40, metavar="N", help="how many of the last (40)"
            )
            command.add_argument("--follow", "-f", action="store_true", help="go on as they come")
    return parser


def _start(options: argparse.Namespace) -> int:
    key = options_of(options).api_key  # travels in the environment, not in the list of processes
    service = start(options.model, options.plan, port=options.port, arguments=flags_of(options), api_key=key)
    print(f"[INFO] Status page: {service.url}/   API: {service.base_url}")
    return 0


def _stop(options: argparse.Namespace) -> int:
    service = find(options.port)
    if service is None:
        print(f"[INFO] {state_of(options.port).sentence}")
        return 0
    service.stop()
    print(f"[INFO] The service on port {options.port} is stopped")
    return 0


def _restart(options: argparse.Namespace) -> int:
    options_of(options)
    get_spec(options.model)  # a wrong request leaves the running service alone
    return _stop(options) or _start(options)


def _status(options: argparse.Namespace) -> int:
    now = state_of(options.port)
    level = {"ready": "SUCCESS", "starting": "INFO", "stopped": "INFO"}.get(now.name, "ERROR")
    print(f"[{level}] {now.sentence}")
    return {"ready": 0, "starting": 0, "stopped": 3, "died": 3}.get(now.name, 1)


def _logs(options: argparse.Namespace) -> int:
    service = find(options.port)
    if service is None:
        print(f"[INFO] {state_of(options.port).sentence}")
        return 3
    for line in service.lines(options.lines):
        print(line)
    shown = len(service.lines())
    while options.follow and service.state.name != "died":
        lines = service.lines()
        for line in lines[shown:]:
            print(line, flush=True)
        shown = len(lines)
        time.sleep(0.5)
    return 0


if __name__ == "__main__":
    sys.exit(main())
