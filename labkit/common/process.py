"""Starting one measuring process, following its progress, and ending it on Ctrl-C."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError, WorkerFailedError
from labkit.common.files import checkout_folder


def serve_request(run: Callable[[Mapping[str, Any], Callable[[dict[str, Any]], None]], Any]) -> int:
    """Call ``run(request, emit)`` with the JSON object on standard input; returns the process's exit code.

    Standard output is for events only, one JSON object a line; whatever else is printed goes to standard error.
    An error becomes the event ``{"event": "error", "message": str, "known": bool}``; ``known`` says that the message
    is the lab's own, and that no trace is needed to understand it.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    def emit(event: dict[str, Any]) -> None:
        print(json.dumps(event, ensure_ascii=False), file=channel, flush=True)

    try:
        run(json.loads(sys.stdin.read()), emit)
    except LabError as error:
        emit({"event": "error", "message": str(error), "known": True})
        return 2
    except BrokenPipeError:  # whoever asked has gone away: what is on disk is kept
        return 1
    except Exception as error:
        traceback.print_exc()
        emit({"event": "error", "message": f"{type(error).__name__}: {error}", "known": False})
        return 1
    return 0


def worker_environment(threads: int) -> dict[str, str]:
    """Our own environment, with the thread count and the folder this package was imported from."""
    package_parent = str(checkout_folder())
    paths = [package_parent, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def end_process(process: subprocess.Popen) -> None:
    """Leave no process behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    process.stdout.close()


def told_death(code: int, log: Path) -> str:
    reason = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    if code == -9:
        reason += " (often: out of memory)"
    return f"the measuring process {reason}; its last words are in {log}"


def run_workers(
    module: str,
    requests: Sequence[Mapping[str, Any]],
    on_event: Callable[[dict[str, Any]], None],
    *,
    logs: Path,
    threads: int,
) -> None:
    """Run ``python -m module`` once for each request, all at the same time, until the last has finished.

    Each process gets its request as JSON on standard input and writes events, one JSON object a line, which
    ``on_event`` sees one at a time; what else it prints goes to ``logs/worker-N.log``. The processes have
    sessions of their own: Ctrl-C reaches only us, we end them, and KeyboardInterrupt goes on to the caller.

    Raises:
        WorkerFailedError: a process reported an error or died; the others are ended too.
    """
    logs.mkdir(parents=True, exist_ok=True)
    events: queue.Queue[tuple[int, dict[str, Any] | None]] = queue.Queue()
    processes = []
    try:
        for number, request in enumerate(requests, start=1):
            log = logs / f"worker-{number}.log"
            with log.open("wb") as errors:
                process = subprocess.Popen(
                    [sys.executable, "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    env=worker_environment(threads),
                    encoding="utf-8",
                    start_new_session=True,
                )
            processes.append((process, log))
            with process.stdin as pipe:
                json.dump(request, pipe)
            follower = threading.Thread(target=_follow, args=(process, number, events), daemon=True)
            follower.start()
        running, finished = len(processes), set()
        while running:
            number, event = events.get()
            process, log = processes[number - 1]
            if event is None:
                running -= 1
                process.wait()
                if number not in finished:
                    raise WorkerFailedError(told_death(process.returncode, log))
            elif event["event"] == "error":
                raise WorkerFailedError(event["message"] + ("" if event["known"] else f" (see {log})"))
            elif event["event"] == "finished":
                finished.add(number)
            else:
                on_event(event)
    finally:
        for process, _ in processes:
            end_process(process)


def _follow(process: subprocess.Popen, number: int, events: queue.Queue) -> None:
    """Pass the process's events on, and None when it has closed its output."""
    try:
        for line in process.stdout:
            events.put((number, json.loads(line)))
    except ValueError:  # closed while we read: the caller is ending it
        pass
    events.put((number, None))
