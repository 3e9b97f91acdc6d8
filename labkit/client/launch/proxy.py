"""The address of a service through JupyterLab's own server."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path


def proxied(port: int) -> str | None:
    """The path on Jupyter's own address that leads to a port of this machine.

    None unless the kernel's parent is a Jupyter server with the proxy: in VS Code, scripts and tests it is not.
    """
    base = os.environ.get("JUPYTERHUB_SERVICE_PREFIX") or _base_url(os.environ.get("JPY_PARENT_PID", ""))
    return f"{base}proxy/{port}/" if base and find_spec("jupyter_server_proxy") else None


def _base_url(server: str) -> str | None:
    """The base URL of the Jupyter server with this process id, from the file that it keeps while it runs."""
    from jupyter_core.paths import jupyter_runtime_dir

    try:
        content = json.loads(
            (Path(jupyter_runtime_dir()) / f"jpserver-{server}.json").read_text(encoding="utf-8")
        )
        return str(content["base_url"])
    except (OSError, ValueError, KeyError):
        return None
