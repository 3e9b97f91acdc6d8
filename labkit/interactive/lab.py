"""Opens JupyterLab at the first notebook (``make lab``); unknown arguments are passed on to Jupyter.

On a desktop a browser opens; over SSH, or without a display, the address is printed.
"""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from labkit.common.files import checkout_folder

ROOT = checkout_folder()
CONTAINER_FILES = (Path("/.dockerenv"), Path("/run/.containerenv"))
CONTAINER_VARIABLES = ("KUBERNETES_SERVICE_HOST", "RUNPOD_POD_ID", "container")


def first_notebook(root: Path = ROOT) -> Path:
    """``notebooks/00_….ipynb``. Raises SystemExit with a message if there is none."""
    notebooks = sorted((root / "notebooks").glob("00_*.ipynb"))
    if not notebooks:
        raise SystemExit(
            f"no notebook {root / 'notebooks'}/00_*.ipynb: the notebooks need a checkout of the lab"
        )
    return notebooks[0]


def in_container(environ: Mapping[str, str]) -> bool:
    """Does this process run in a container, judged by environment variables and marker files?"""
    return any(environ.get(name) for name in CONTAINER_VARIABLES) or any(f.exists() for f in CONTAINER_FILES)


def has_display(environ: Mapping[str, str], platform: str = sys.platform) -> bool:
    """Can the user see a browser window that this machine opens?"""
    if any(environ.get(name) for name in ("SSH_CONNECTION", "SSH_TTY")):
        return False
    return not platform.startswith("linux") or any(environ.get(n) for n in ("DISPLAY", "WAYLAND_DISPLAY"))


def jupyter_arguments(
    port: int, rest: Sequence[str], environ: Mapping[str, str], *, root_user: bool, container: bool
) -> list[str]:
    """The command line after ``python -m jupyterlab``; the user's own arguments come last, so they win."""
    notebook = first_notebook().relative_to(ROOT).as_posix()
    arguments = [
        f"--ServerApp.root_dir={ROOT}",
        f"--LabApp.default_url=/lab/tree/{notebook}",
        f"--ServerApp.port={port}",
    ]
    if root_user:
        arguments.append("--ServerApp.allow_root=True")
    if container:  # localhost in a container is not the user's; Jupyter's token still protects the server
        arguments.append("--ServerApp.ip=0.0.0.0")
    if not has_display(environ):
        arguments.append("--ServerApp.open_browser=False")
    return [*arguments, *rest]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Open JupyterLab at the first notebook.")
    parser.add_argument(
        "--port", type=int, default=8888, help="where it listens (8888), or the next free one"
    )
    options, rest = parser.parse_known_args(words)
    arguments = jupyter_arguments(
        options.port,
        rest,
        os.environ,
        root_user=hasattr(os, "geteuid") and os.geteuid() == 0,
        container=in_container(os.environ),
    )
    if not has_display(os.environ):
        print(
            "No browser here: open the address that Jupyter prints below. Over SSH, forward the port first:"
        )
        print(f"  ssh -L {options.port}:localhost:{options.port} this-machine", flush=True)
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *arguments])


if __name__ == "__main__":
    main()
