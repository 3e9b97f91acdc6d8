"""Start a service in its own process, watch it and stop it."""

from __future__ import annotations

import html
import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from labkit.client.launch import state
from labkit.client.launch.state import Record, State
from labkit.common.errors import LaunchError
from labkit.common.files import assets_folder
from labkit.common.process import child_environment, module_command
from labkit.common.process import start as start_process
from labkit.service.options import API_KEY_VARIABLE, ServiceOptions

START_S = 600.0
STOP_S = 45.0
LAST_LINES = 8
SCRIPT = "run_autoglm_server.sh"


class Service:
    """A started service. As a context manager it stops the service when the block ends.

    Attributes:
        port, url: where it listens.
        pid: its process id.
        base_url: the base URL for OpenAI clients.
        log: the path of its log.
    """

    def __init__(self, record: Record, process: subprocess.Popen | None = None):
        self._record, self._process = record, process
        self.port, self.url, self.pid = record.port, record.url, record.pid
        self.base_url = f"{record.url}/v1"
        self.log = Path(record.log)
        self._api_key = os.environ.get(API_KEY_VARIABLE)

    def __repr__(self) -> str:
        return f"<Service {self.url}: {self.state.name}>"

    def _repr_html_(self) -> str:
        from labkit.client.launch.proxy import proxied

        links = {"status page": f"{self.url}/"}
        if path := proxied(self.port):
            links["through JupyterLab"] = path
        anchors = " · ".join(f'<a href="{url}" target="_blank">{name}</a>' for name, url in links.items())
        return f"<p>{html.escape(self.state.told)}<br>{anchors}</p>"

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def state(self) -> State:
        """The current state of the service."""
        if self._process is not None:
            self._process.poll()  # reaps the process if it has ended
        if not self._record.is_running:
            return State(
                "died", f"the service on port {self.port} has ended by itself; {_last_words(self.log)}"
            )
        status, answer = _ask(self.url, "/ready")
        if status == 200:
            return State("ready", f"ready at {self.url}, process {self._record.pid}")
        if status is None or answer.get("code") == "not_ready":
            return State("starting", f"starting on port {self.port}, process {self._record.pid}")
        return State("unhealthy", f"unhealthy at {self.url}: {answer.get('message', f'status {status}')}")

    def facts(self) -> dict[str, Any]:
        """The facts on its status page: model, plan, bytes, tokens per second.

        Raises:
            LaunchError: the service does not answer.
        """
        status, facts = _ask(self.url, "/status", api_key=self._api_key)
        if status != 200:
            raise LaunchError(f"the service at {self.url} does not answer: {self.state.told}")
        return facts

    def wait(self, timeout_s: float = START_S, show: Callable[[str], None] | None = None) -> Service:
        """Wait until the service is ready; ``show`` is called with each new line of its log.

        Raises:
            LaunchError: the service failed, or was not ready in time; the message quotes the end of its log.
        """
        shown, deadline = 0, time.monotonic() + timeout_s
        while True:
            now = self.state
            lines = self.lines()
            for line in lines[shown:]:
                if show is not None:
                    show(line)
            shown = len(lines)
            if now.name == "ready" and any(line.startswith("[SUCCESS]") for line in lines):
                return self
            if now.name in ("died", "unhealthy"):
                raise LaunchError(now.told)
            if time.monotonic() > deadline:
                raise LaunchError(f"not ready after {timeout_s:g} s; {_last_words(self.log)}")
            time.sleep(0.1)

    def stop(self, timeout_s: float = STOP_S) -> None:
        """Let it finish its running requests, then end it and its child processes."""
        import psutil

        if self._record.is_running:
            process = psutil.Process(self._record.pid)
            family = [process, *process.children(recursive=True)]
            process.terminate()
            psutil.wait_procs([process], timeout=timeout_s)
            _, survivors = psutil.wait_procs(family, timeout=2)
            for survivor in survivors:
                survivor.kill()
            psutil.wait_procs(survivors, timeout=5)
        if self._process is not None:
            self._process.wait()
        state.forget(self.port)

    def lines(self, count: int | None = None) -> list[str]:
        """The last ``count`` lines of its log, or all lines."""
        try:
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return []
        return lines if count is None else lines[-count:]


def start(
    model: str = "pocket",
    plan: str | None = None,
    *,
    port: int = ServiceOptions.port,
    arguments: Sequence[str] = (),
    api_key: str | None = None,
    wait: bool = True,
    timeout_s: float = START_S,
    show: Callable[[str], None] | None = print,
) -> Service:
    """Start a service, or return the service that already runs with the same arguments.

    Args:
        model, plan: as for `labkit.load`.
        port: the port to listen on; 0 picks a free port.
        arguments: further arguments of ``labkit serve``, such as ``["--streams", "4"]``.
        api_key: passed in the environment, so that it does not appear in process listings.
        wait: wait until the service is ready; meanwhile ``show`` is called with each line of its log (None: no output).

    Raises:
        LaunchError: the port is taken, or the service failed; the message quotes the end of its log.
    """
    port = port or _free_port()
    serve_arguments = (model, *(("--plan", plan) if plan else ()), "--port", str(port), *arguments)
    if (previous := find(port)) is not None:
        if previous._record.is_running:
            if previous._record.arguments != serve_arguments:
                running_arguments = " ".join(previous._record.arguments)
                raise LaunchError(
                    f"port {port} serves something else (labkit serve {running_arguments}): stop it first"
                )
            if show is not None:
                show(f"[INFO] Already there: {previous.state.told}")
            return previous.wait(timeout_s) if wait else previous
        state.forget(port)
    if _answers(port):
        raise LaunchError(f"port {port} is used by something that was not started here: take another port")
    log = state.log_path(port)
    key = {API_KEY_VARIABLE: api_key} if api_key else {}
    process = start_process(
        [*module_command("labkit"), "serve", *serve_arguments], log=log, environment=child_environment(**key)
    )
    record = Record(port, _url(arguments, port), process.pid, _created(process), serve_arguments, str(log))
    state.write(record)
    service = Service(record, process)
    service._api_key = api_key or service._api_key
    try:
        return service.wait(timeout_s, show) if wait else service
    except LaunchError:
        service.stop(5)
        raise


def find(port: int = ServiceOptions.port) -> Service | None:
    """The service that was started on this port, alive or dead; None if there was none or it was stopped."""
    record = state.read(port)
    return None if record is None else Service(record)


def state_of(port: int = ServiceOptions.port) -> State:
    """The state of a port: its service's `State`, ``stopped`` or ``foreign``."""
    if (service := find(port)) is not None:
        return service.state
    if _answers(port):
        return State("foreign", f"port {port} is used by something that was not started here")
    return State("stopped", f"no service on port {port}")


def script(*words: str) -> str:
    """The output of ``sh run_autoglm_server.sh WORDS``, run with this interpreter."""
    path = assets_folder() / SCRIPT
    completed = subprocess.run(
        ["sh", str(path), *words],
        env=child_environment(LABKIT_PYTHON=sys.executable),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return completed.stdout


def _url(arguments: Sequence[str], port: int) -> str:
    """The service's address as this machine reaches it."""
    words = [part for argument in arguments for part in argument.split("=", 1)]
    host = dict(pairwise(words)).get("--host", ServiceOptions.host)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _created(process: subprocess.Popen) -> float:
    import psutil

    try:
        return psutil.Process(process.pid).create_time()
    except psutil.Error:  # the process has already ended; its log gives the reason
        return time.time()


def _ask(
    url: str, path: str, timeout_s: float = 5.0, api_key: str | None = None
) -> tuple[int | None, dict[str, Any]]:
    """Status and JSON body of the answer; the status is None without an answer. Ignores proxy variables."""
    address = urlsplit(url)
    with closing(http.client.HTTPConnection(address.hostname, address.port, timeout=timeout_s)) as connection:
        try:
            connection.request("GET", path, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
            response = connection.getresponse()
            answer = json.loads(response.read())
        except (OSError, http.client.HTTPException, ValueError):
            return None, {}
    answer = answer if isinstance(answer, dict) else {}
    return response.status, answer.get("error", answer)


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(2)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _last_words(log: Path) -> str:
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    except OSError:
        lines = []
    return f"the end of its log ({log}): " + (" | ".join(lines) or "nothing")
