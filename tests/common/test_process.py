"""Child processes: started in one way, with our package, followed by their events, and ended with us."""

import os
import sys
import time

import pytest

from labkit.common.errors import WorkerFailedError
from labkit.common.files import checkout_folder
from labkit.common.process import child_environment, run_workers, start

WORKER = """
import os, time
from labkit.common.errors import LabError
from labkit.common.process import serve_request

def run(request, emit):
    print("a library prints")
    emit({"event": "threads", "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()})
    time.sleep(request.get("pause_s", 0))
    if request.get("wrong"):
        raise LabError("this cannot be had")
    emit({"event": "finished"})

raise SystemExit(serve_request(run))
"""
COMMAND = [sys.executable, "-c", WORKER]


def test_a_child_finds_our_package_and_gets_its_threads(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    environment = child_environment(threads=3, COLUMNS="120")
    assert environment["PYTHONPATH"] == os.pathsep.join([str(checkout_folder()), "/elsewhere"])
    assert (environment["OMP_NUM_THREADS"], environment["COLUMNS"]) == ("3", "120")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert child_environment()["OMP_NUM_THREADS"] == "7"


def test_workers_run_side_by_side_and_each_has_its_log(tmp_path):
    events = []
    run_workers(COMMAND, {tmp_path / "a.log": {}, tmp_path / "b.log": {}}, events.append, threads=2)
    assert [event["threads"] for event in events] == ["2", "2"]
    assert len({event["pid"] for event in events}) == 2
    assert "a library prints" in (tmp_path / "a.log").read_text()


def test_an_error_of_a_worker_is_ours_and_the_others_end(tmp_path):
    events = []
    requests = {tmp_path / "a.log": {"pause_s": 60}, tmp_path / "b.log": {"wrong": True}}
    with pytest.raises(WorkerFailedError, match=r"^this cannot be had$"):
        run_workers(COMMAND, requests, events.append, threads=1)
    for event in events:
        with pytest.raises(ProcessLookupError):
            os.kill(event["pid"], 0)


def test_a_worker_that_takes_too_long_is_ended(tmp_path):
    events, began = [], time.monotonic()
    with pytest.raises(WorkerFailedError, match="longer than 5 s"):
        run_workers(COMMAND, {tmp_path / "a.log": {"pause_s": 60}}, events.append, threads=1, timeout_s=5)
    assert time.monotonic() - began < 30
    for event in events:
        with pytest.raises(ProcessLookupError):
            os.kill(event["pid"], 0)


def test_a_worker_that_dies_points_to_its_log(tmp_path):
    command = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    with pytest.raises(WorkerFailedError, match=r"ended by signal 9 \(often: out of memory\).*a\.log"):
        run_workers(command, {tmp_path / "a.log": {}}, print, threads=1)


def test_without_a_request_all_that_is_printed_goes_to_the_log(tmp_path):
    code = "import sys; print('out', flush=True); print('err', file=sys.stderr, flush=True); print(sys.stdin.read())"
    log = tmp_path / "deep" / "log"
    process = start([sys.executable, "-c", code], log=log, environment=child_environment())
    assert process.wait(30) == 0
    assert log.read_text().split() == ["out", "err"]
    assert process.stdout is None
