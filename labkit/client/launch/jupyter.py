"""The service through JupyterLab's own address: ``…/labkit/`` and a tile in the launcher.

In a pod only Jupyter's port is open. jupyter-server-proxy finds `setup` by its entry point, shows the tile, and at the
first visit runs this module, which stands for the service on port 8000: one that runs already, or a new one.
Services on other ports are at ``…/proxy/PORT/``; `proxied` says so from inside a kernel. Where port 8000 is taken,
``LABKIT_PORT`` in Jupyter's environment names another, and ``LABKIT_MODEL`` another model than the pocket model.
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

from labkit.client.launch.start import Service, find, start
from labkit.common.errors import LabError
from labkit.service.options import ServiceOptions

ICON = Path(__file__).with_name("icon.svg")
WATCH_S = 1.0


def setup() -> dict[str, Any]:
    """What jupyter-server-proxy is told."""
    port = int(os.environ.get("LABKIT_PORT") or ServiceOptions.port)
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
        "timeout": 120,
        "new_browser_tab": True,
        "launcher_entry": {"title": "labkit service", "icon_path": str(ICON), "category": "Notebook"},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the service unless it runs, and stay as long as it does; one that was started here ends with this."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=ServiceOptions.port)
    parser.add_argument("--model", default="pocket")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    found = find(options.port)
    mine: Service | None = None
    try:
        if found is None or found.state.name == "died":
            found = mine = start(options.model, port=options.port, wait=False)
            mine.wait(show=print)
        while found.state.name != "died":
            time.sleep(WATCH_S)
    except LabError as error:
        print(f"[ERROR] {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(
            signal.SIGTERM, signal.SIG_IGN
        )  # Jupyter says it twice; the service must be ended whole
        if mine is not None:
            mine.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
