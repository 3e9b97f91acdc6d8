"""The browser that tests look with: Debian's Chromium through Playwright; only continuous integration must have it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
browser_needed = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="no Chromium here: apt-get install chromium"
)
IDLE = (
    "() => { const w = jupyterapp.shell.currentWidget; const k = w?.sessionContext?.session?.kernel;"
    " return k?.status === 'idle' }"
)
"""JavaScript: the open notebook's kernel waits for work."""


@contextlib.contextmanager
def page(width=1400, height=1000, flags=(), **options):
    """A tab of a fresh browser; ``tab.trouble`` collects errors, ``tab.asked`` every address that was asked.

    flags: of Chromium's command line. options: of Playwright's ``new_page``.
    """
    from playwright.sync_api import sync_playwright

    assert CHROMIUM is not None, "continuous integration needs a Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", *flags])
        try:
            tab = browser.new_page(viewport={"width": width, "height": height}, **options)
            tab.trouble, tab.asked = [], []
            tab.on("pageerror", lambda error: tab.trouble.append(str(error)))
            tab.on("console", lambda said: tab.trouble.append(said.text) if said.type == "error" else None)
            tab.on("request", lambda request: tab.asked.append(request.url))
            yield tab
        finally:
            browser.close()


@contextlib.contextmanager
def jupyter(folder, *, dark=False, base="/", **environment):
    """JupyterLab on ``folder``; its address, which ends without a slash."""
    settings = folder / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    theme = {"theme": f"JupyterLab {'Dark' if dark else 'Light'}"}
    (settings / "themes.jupyterlab-settings").write_text(json.dumps(theme))
    news = {"fetchNews": "false", "checkForUpdates": False}
    (settings / "notification.jupyterlab-settings").write_text(json.dumps(news))
    port = free_port()
    command = [
        sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={folder}", f"--ServerApp.port={port}",
        "--ServerApp.open_browser=False", "--ServerApp.allow_root=True", "--IdentityProvider.token=",
        "--LabApp.expose_app_in_browser=True", f"--ServerApp.base_url={base}",
    ]  # fmt: skip
    environ = {
        **os.environ, "PYTHONPATH": str(ROOT), "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"), "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "LABKIT_STATE": str(folder / "services"), **environment,
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}{base.rstrip('/')}"
    with running(command, environ, folder / "log.txt", f"{url}/api"):
        yield url


@contextlib.contextmanager
def running(command, environ, log, address):
    """A server in a process group of its own, from when it answers at ``address`` on; what it says goes to ``log``."""
    with log.open("wb") as told:
        server = subprocess.Popen(command, env=environ, stdout=told, stderr=told, start_new_session=True)
    try:
        for _ in range(400):
            assert server.poll() is None, log.read_text()
            with contextlib.suppress(OSError), urllib.request.urlopen(address):
                break
            time.sleep(0.25)
        else:
            pytest.fail(f"nothing answered at {address} within 100 seconds")
        yield
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def write_notebook(path, cells):
    """A notebook of code cells."""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code) for code in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, path)
