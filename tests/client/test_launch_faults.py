"""Starting services when something is in the way: another start, other settings, a full disk, an unusable folder."""

import errno
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import import_module
from types import SimpleNamespace

import psutil
import pytest

from labkit.client import launch
from labkit.client.launch import state
from labkit.client.launch.__main__ import main
from labkit.common.errors import LabError
from labkit.common.process import start as start_process

starting = import_module("labkit.client.launch.start")

SERVICE = """
import http.server, sys, time
words = sys.argv[1:]
port = int(words[words.index("--port") + 1])
host = next((w.split("=")[1] for w in words if w.startswith("--host=")), "127.0.0.1")
time.sleep(0.3)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers(); self.wfile.write(b"{}")
    def log_message(self, *_): pass
class Server(http.server.HTTPServer):
    address_family = 10 if ":" in host else 2
server = Server((host, port), Handler)
print("[SUCCESS] ready", flush=True)
server.serve_forever()
"""
"""Stands for ``labkit serve``: it is ready after a moment."""


@pytest.fixture(autouse=True)
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "service.py").write_text(SERVICE)
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "state"))
    monkeypatch.delenv("LABKIT_API_KEY", raising=False)
    monkeypatch.setattr(
        starting, "module_command", lambda module: [sys.executable, str(tmp_path / "service.py")]
    )
    yield
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "state"))
    for path in (tmp_path / "state").glob("service-*.json"):
        launch.find(int(path.stem.split("-")[1])).stop(1)


@pytest.fixture
def port():
    return starting._free_port()


def test_of_two_starts_at_one_moment_one_starts_and_the_other_says_so(port):
    shown = {0: [], 1: []}
    with ThreadPoolExecutor(2) as pool:
        services = list(
            pool.map(lambda n: launch.start("pocket", "int8", port=port, show=shown[n].append), (0, 1))
        )
    assert services[0].pid == services[1].pid
    told = sorted(lines[0] for lines in shown.values())
    assert told[0].startswith("[INFO] Already there: starting on port")
    assert told[1] == "[SUCCESS] ready"
    assert launch.find(port).state.name == "ready"
    services[0].stop(2)
    assert not psutil.pid_exists(services[0].pid)
    assert launch.find(port) is None


def test_other_settings_than_the_running_services_are_named_and_refused(port, tmp_path, monkeypatch):
    start = partial(launch.start, port=port, show=None)
    start("pocket", "int8", arguments=["--streams", "4"])
    assert (
        start("pocket", "int8", arguments=["--streams=4"]).state.name == "ready"
    )  # the same, in other words
    refused = {
        "plan is 'int8' there and 'int4' here": ("pocket", "int4"),
        "model is 'pocket' there and 'autoglm-phone-9b' here": ("autoglm-phone-9b", "int8"),
        "streams is 4 there and 8 here": ("pocket", "int8"),
    }
    for reason, (model, plan) in refused.items():
        with pytest.raises(launch.LaunchError, match=reason):
            start(model, plan, arguments=[] if "streams" in reason else ["--streams=4"])
    with pytest.raises(launch.LaunchError, match=r"no API key, and one is given here.*restart"):
        start("pocket", "int8", arguments=["--streams=4"], api_key="sesame")
    monkeypatch.setenv("LABKIT_API_KEY", "sesame")
    with pytest.raises(launch.LaunchError, match="no API key, and one is given here"):
        start("pocket", "int8", arguments=["--streams=4"])


def test_another_key_is_refused_and_no_key_is_stored(port, tmp_path):
    start = partial(launch.start, "pocket", port=port, show=None)
    start(api_key="sesame")
    assert "sesame" not in (tmp_path / "state" / f"service-{port}.json").read_text()
    assert start(api_key="sesame").state.name == "ready"
    with pytest.raises(launch.LaunchError, match="the API key differs"):
        start(api_key="other")
    with pytest.raises(launch.LaunchError, match="it has an API key, and none is given here"):
        start()


def test_a_plans_file_that_changed_is_another_plan(port, tmp_path):
    plan = tmp_path / "mine.yaml"
    plan.write_text("name: mine\nrules: []\n")
    start = partial(launch.start, "pocket", str(plan), port=port, show=None)
    assert start().pid == start().pid
    plan.write_text("name: mine\nrules: []\ndefault: fp32\n")
    with pytest.raises(launch.LaunchError, match="the plan's file has changed since"):
        start()


def test_restart_takes_the_new_settings_and_a_wrong_request_stops_nothing(port, capsys):
    service = launch.start("pocket", "int8", port=port, show=None)
    assert main(["restart", "nobody", "--port", str(port)]) == 2
    assert main(["restart", "pocket", "--streams", "0", "--port", str(port)]) == 2
    assert launch.find(port).pid == service.pid
    assert main(["restart", "pocket", "--plan", "int4", "--port", str(port)]) == 0
    assert launch.find(port).pid != service.pid
    assert main(["start", "pocket", "--plan", "int4", "--port", str(port)]) == 0


def test_an_ipv6_address_is_asked_and_shown(port, capsys):
    assert main(["start", "pocket", "--host", "::1", "--port", str(port)]) == 0
    assert f"API: http://[::1]:{port}/v1" in capsys.readouterr().out
    assert launch.find(port).state.name == "ready"


def test_port_0_is_shown_as_the_port_that_was_taken(capsys):
    assert main(["start", "pocket", "--port", "0"]) == 0
    out = capsys.readouterr().out
    port = int(out.rpartition("http://127.0.0.1:")[2].partition("/")[0])
    assert launch.find(port).state.name == "ready"


def test_a_full_disk_starts_nothing(port, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(starting, "start_process", None)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(launch.LaunchError, match=r"No space left on device; \$LABKIT_STATE"):
        launch.start("pocket", port=port, show=None)


def test_a_service_without_a_record_is_not_left_behind(port, monkeypatch):
    processes = []

    def started(*arguments, **options):
        processes.append(start_process(*arguments, **options))
        return processes[-1]

    def fail(record):
        raise launch.LaunchError("the record cannot be stored")

    monkeypatch.setattr(starting, "start_process", started)
    monkeypatch.setattr(state, "write", fail)
    with pytest.raises(launch.LaunchError, match="cannot be stored"):
        launch.start("pocket", port=port, show=None)
    assert processes[0].poll() is not None


def test_an_empty_log_on_a_full_disk_says_so(tmp_path, monkeypatch):
    (tmp_path / "service.log").touch()
    assert starting._end_of(tmp_path / "service.log").endswith("is empty")
    monkeypatch.setattr(starting.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert "is empty; the disk of" in starting._end_of(tmp_path / "service.log")


@pytest.mark.parametrize("words", [["status"], ["stop"], ["logs"], ["start"], ["restart"]])
def test_a_port_that_is_none_is_refused_in_one_line(capsys, words):
    assert main([*words, "--port", "99999"]) == 2
    err = capsys.readouterr().err
    assert "must be at most 65535, not 99999" in err
    assert err.count("\n") == 1
    with pytest.raises(LabError, match="port is 99999"):
        starting.state_of(99999)


@pytest.mark.parametrize("folder", ["file", "~nosuchuser/state", "a" * 300])
@pytest.mark.parametrize("words", [["status"], ["start", "pocket"]])
def test_an_unusable_folder_of_records_is_said(capsys, monkeypatch, tmp_path, port, folder, words):
    (tmp_path / "file").touch()
    monkeypatch.setenv(state.FOLDER_VARIABLE, str(tmp_path / "file") if folder == "file" else folder)
    monkeypatch.setattr(starting, "start_process", None)
    assert main([*words, "--port", str(port)]) in (1, 2)
    err = capsys.readouterr().err
    assert err.startswith("[ERROR] ")
    assert err.count("\n") == 1


def test_a_stop_leaves_the_record_of_the_next_service(port):
    old = launch.start("pocket", port=port, show=None)
    psutil.Process(old.pid).kill()
    while old.state.name != "died":
        time.sleep(0.02)
    new = launch.start("pocket", port=port, show=None)
    old.stop(1)
    assert launch.find(port).pid == new.pid
