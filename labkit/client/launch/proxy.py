"""The address of a service through JupyterLab's own server."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path


def proxied(port: int) -> str | None:
    """Where a page of this kernel's Jupyter reaches a port of this machine: a path on Jupyter's own address.

    None where no Jupyter server with the proxy is the kernel's parent: in VS Code, in a script, in a test.
    """
    base = os.environ.get("JUPYTERHUB_SERVICE_PREFIX") or _base_url(os.environ.get("JPY_PARENT_PID", ""))
    return f"{base}proxy/{port}/" if base and find_spec("jupyter_server_proxy") else None


def _base_url(server: str) -> str | None:
    """The base URL of the Jupyter server with this process id, as the file says that it keeps while it runs."""
    from jupyter_core.paths import jupyter_runtime_dir

    try:
        told = json.loads(
            (Path(jupyter_runtime_dir()) / f"jpserver-{server}.json").read_text(encoding="utf-8")
        )
        return str(told["base_url"])
    except (OSError, ValueError, KeyError):
        return None
