"""The service behind JupyterLab's own address: ``…/labkit/`` and a tile in the launcher.

Only Jupyter's port is open in a pod, so jupyter-server-proxy calls `setup` and runs this module at the first visit.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from labkit.client.launch.start import Service, check_port, find, start
from labkit.common.errors import LabError
from labkit.service.options import ServiceOptions

ICON = Path(__file__).with_name("icon.svg")
WATCH_S = 1.0


def setup() -> dict[str, Any]:
    """The configuration for jupyter-server-proxy, which finds this function by its entry point.

    ``LABKIT_PORT`` and ``LABKIT_MODEL`` in Jupyter's environment replace port 8000 and the pocket model. Services on
    other ports are at ``…/proxy/PORT/`` (`proxied`).
    """
    text = os.environ.get("LABKIT_PORT") or str(ServiceOptions.port)
    port = check_port(int(text) if text.isdecimal() else text)
    model = os.environ.get("LABKIT_MODEL") or "pocket"
    return {
        "command": [
            sys.executable,
            "-m",
            "labkit.client.launch.jupyter",
            "--port",
            str(port),
            "--model",
            model,
        ],
        "port": port,
        "request_headers_override": {"Host": f"localhost:{port}"},  # not the name that Jupyter is called by
        "timeout": 120,
        "new_browser_tab": True,
        "launcher_entry": {"title": "labkit service", "icon_path": str(ICON), "category": "Notebook"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the service unless it already runs, and stay until it ends; a service started here ends with this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=ServiceOptions.port)
    parser.add_argument("--model", default="pocket")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    service = find(options.port)
    started: Service | None = None
    try:
        if service is None or service.state.name == "died":
            service = started = start(options.model, port=options.port, wait=False)
            started.wait(show=print)
        while service.state.name != "died":
            time.sleep(WATCH_S)
    except LabError as error:
        print(f"[ERROR] {error}", file=sys.stderr)
        return 1
    finally:
        # Jupyter sends SIGTERM twice; nothing may interrupt the stop of the service.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if started is not None:
            started.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
