"""Start a service in its own process, watch it and stop it."""

from __future__ import annotations

import html
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from labkit.client.launch import state
from labkit.client.launch.request import Request
from labkit.client.launch.state import Record, State
from labkit.common.errors import LabError, LaunchError
from labkit.common.files import assets_folder
from labkit.common.process import child_environment, module_command
from labkit.common.process import start as start_process
from labkit.service.options import API_KEY_VARIABLE, ServiceOptions

START_S = 600.0
STOP_S = 45.0
LAST_LINES = 8
ANSWER_S, WAITING_ANSWER_S = 5.0, 1.0
"""A service that still loads its model takes connections, and does not answer yet."""
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
        return f"<p>{html.escape(self.state.sentence)}<br>{anchors}</p>"

    def __enter__(self) -> Service:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def state(self) -> State:
        """The current state of the service."""
        return self._state(ANSWER_S)

    def _state(self, timeout_s: float) -> State:
        if self._process is not None:
            self._process.poll()  # reaps the process if it has ended
        if not self._record.is_running:
            return State("died", f"the service on port {self.port} has ended by itself; {_end_of(self.log)}")
        status, answer = _ask(self.url, "/ready", timeout_s)
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
            raise LaunchError(f"the service at {self.url} does not answer: {self.state.sentence}")
        return facts

    def wait(self, timeout_s: float = START_S, show: Callable[[str], None] | None = None) -> Service:
        """Wait until the service is ready; ``show`` is called with each new line of its log.

        Raises:
            LaunchError: the service failed, or was not ready in time; the message quotes the end of its log.
        """
        shown, deadline = 0, time.monotonic() + timeout_s
        ready_since: float | None = None
        while True:
            now, lines = self._state(WAITING_ANSWER_S), self.lines()
            for line in lines[shown:] if show is not None else ():
                show(line)
            shown = len(lines)
            if now.name == "ready":
                ready_since = ready_since or time.monotonic()
                # The line may come a moment after the answer, and never on a full disk.
                if any(line.startswith("[SUCCESS]") for line in lines) or time.monotonic() > ready_since + 2:
                    return self
            if now.name in ("died", "unhealthy"):
                raise LaunchError(now.sentence)
            if time.monotonic() > deadline:
                raise LaunchError(f"not ready after {timeout_s:g} s; {_end_of(self.log)}")
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
        state.forget(self._record)

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
    """Start a service, or return the service that already runs with the same settings.

    Of several callers at one moment, in any process, one starts it; the others get that service, or are refused.

    Args:
        model, plan: as for `labkit.load`.
        port: the port to listen on; 0 picks a free port.
        arguments: further arguments of ``labkit serve``, such as ``["--streams", "4"]``.
        api_key: passed in the environment, so that it does not appear in process listings.
        wait: wait until the service is ready; meanwhile ``show`` is called with each line of its log (None: no output).

    Raises:
        LaunchError: the port is taken, another service runs on it (the message names what differs), or the service
            failed (the message quotes the end of its log).
        LabError: no such model, or a wrong argument.
    """
    port = check_port(port, 0) or _free_port()
    request = Request.of(model, plan, port, arguments, api_key)
    with state.claimed(port):
        service = find(port)
        is_new = service is None or not service._record.is_running
        if is_new:
            if _answers(request.host, port):
                raise LaunchError(
                    f"port {port} is used by something that was not started here: take another port"
                )
            service = _spawn(request)
        else:
            request.check_same(service._record)
    if not is_new:
        if show is not None:
            show(f"[INFO] Already there: {service._state(WAITING_ANSWER_S).sentence}")
        return service.wait(timeout_s) if wait else service
    try:
        return service.wait(timeout_s, show) if wait else service
    except LaunchError:
        service.stop(5)
        raise


def _spawn(request: Request) -> Service:
    """Start the process and store its record; without the record, nobody could stop the process."""
    log = state.log_path(request.settings["port"])
    command = [*module_command("labkit"), "serve", *request.words]
    key = {API_KEY_VARIABLE: request.key} if request.key else {}
    process = start_process(command, log=log, environment=child_environment(**key))
    try:
        record = request.record(process.pid, _created(process), str(log))
        state.write(record)
    except BaseException:
        process.kill()
        process.wait()
        raise
    service = Service(record, process)
    service._api_key = request.key or service._api_key
    return service


def check_port(port: int, least: int = 1) -> int:
    """The port, if it is a number of a port."""
    if type(port) is not int or not least <= port <= 65535:
        raise LabError(f"port is {port!r}; expected {least} to 65535")
    return port


def find(port: int = ServiceOptions.port) -> Service | None:
    """The service that was started on this port, alive or dead; None if there was none or it was stopped."""
    record = state.read(port)
    return None if record is None else Service(record)


def state_of(port: int = ServiceOptions.port) -> State:
    """The state of a port: its service's `State`, ``stopped`` or ``foreign``."""
    if (service := find(check_port(port))) is not None:
        return service.state
    if any(_answers(host, port) for host in ("127.0.0.1", "::1")):
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


def _created(process: subprocess.Popen) -> float:
    import psutil

    try:
        return psutil.Process(process.pid).create_time()
    except psutil.Error:  # the process has already ended; its log gives the reason
        return time.time()


def _ask(
    url: str, path: str, timeout_s: float = ANSWER_S, api_key: str | None = None
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


def _answers(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except (OSError, UnicodeError):  # UnicodeError: no name of a host
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _end_of(log: Path) -> str:
    """The last lines of a log, for a message."""
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
        is_full = shutil.disk_usage(log.parent).free < state.PROBE_BYTES
    except OSError as error:
        return f"its log ({log}) cannot be read: {error.strerror}"
    full = f"; the disk of {log.parent} is full" if is_full else ""
    return (
        f"the end of its log ({log}): {' | '.join(lines)}{full}"
        if lines
        else f"its log ({log}) is empty{full}"
    )
