"""``python -m labkit.client.launch``: the commands of assets/run_autoglm_server.sh.

Exit codes: 0 done, or ready; 1 failed, or unhealthy; 2 wrong arguments; 3 not running.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from labkit.client.launch.start import find, start, state_of
from labkit.common.errors import LabError
from labkit.service.arguments import add_service_arguments, options_of
from labkit.service.options import ServiceOptions

COMMANDS = ("start", "stop", "restart", "status", "logs")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the default is ``start``."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or (words[0] not in COMMANDS and words[0] not in ("-h", "--help")):
        words.insert(0, "start")
    try:
        options = build_parser().parse_args(words)
        return options.run(options)
    except LabError as error:
        print(f"[ERROR] {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\n[INFO] Interrupted; a service that was started goes on", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The script's arguments."""
    parser = argparse.ArgumentParser(
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
        command.add_argument("--plan", help="a name from `labkit plans`, or a YAML file")
        command.add_argument("--device", help="auto, cpu, cuda or cuda:N (auto)")
        command.add_argument("--threads", help="CPU threads (all cores)")
        add_service_arguments(command)
        command.set_defaults(run=run)
    for name, run, description in (
        ("stop", _stop, "let it finish what runs, then end it"),
        ("status", _status, "say whether it is ready"),
        ("logs", _logs, "print its log"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        command.add_argument(
            "--port", type=int, default=ServiceOptions.port, metavar="N", help="which (8000)"
        )
        command.set_defaults(run=run)
        if name == "logs":
            command.add_argument(
                "--lines", type=int, default=40, metavar="N", help="how many of the last (40)"
            )
            command.add_argument("--follow", "-f", action="store_true", help="go on as they come")
    return parser


def _start(options: argparse.Namespace) -> int:
    settings = options_of(options)
    start(
        options.model,
        options.plan,
        port=options.port,
        arguments=_arguments(options),
        api_key=settings.api_key,
    )
    print(f"[INFO] Status page: http://127.0.0.1:{options.port}/   API: http://127.0.0.1:{options.port}/v1")
    return 0


def _arguments(options: argparse.Namespace) -> list[str]:
    """The `labkit serve` flags that differ from the defaults; the API key travels in the environment."""
    probe = argparse.ArgumentParser()
    add_service_arguments(probe)
    words = []
    for action in probe._actions:
        value = getattr(options, action.dest, None)
        if action.dest in ("help", "port", "api_key") or value == action.default:
            continue
        flag = action.option_strings[0]
        words.append(flag if value is True else f"{flag}={value}")
    for name in ("device", "threads"):
        if getattr(options, name):
            words.append(f"--{name}={getattr(options, name)}")
    return words


def _stop(options: argparse.Namespace) -> int:
    service = find(options.port)
    if service is None:
        print(f"[INFO] {state_of(options.port).told}")
        return 0
    service.stop()
    print(f"[INFO] The service on port {options.port} is stopped")
    return 0


def _restart(options: argparse.Namespace) -> int:
    return _stop(options) or _start(options)


def _status(options: argparse.Namespace) -> int:
    now = state_of(options.port)
    level = {"ready": "SUCCESS", "starting": "INFO", "stopped": "INFO"}.get(now.name, "ERROR")
    print(f"[{level}] {now.told}")
    return {"ready": 0, "starting": 0, "stopped": 3, "died": 3}.get(now.name, 1)


def _logs(options: argparse.Namespace) -> int:
    service = find(options.port)
    if service is None:
        print(f"[INFO] {state_of(options.port).told}")
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
