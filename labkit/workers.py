"""Several measuring processes side by side: started, followed by their events, and ended on Ctrl-C."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.process import WorkerFailedError, end_process, told_death, worker_environment


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
