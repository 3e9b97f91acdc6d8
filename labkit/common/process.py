"""Child processes: their environment, their start, their events, and their end."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
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


def child_environment(threads: int | None = None, **more: str) -> dict[str, str]:
    """Our own environment, with the folder this package was imported from, and the thread count if one is given."""
    paths = [str(checkout_folder()), *filter(None, [os.environ.get("PYTHONPATH")])]
    if threads is not None:
        waiting = os.environ.get("OMP_WAIT_POLICY", "PASSIVE")
        more = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": waiting, **more}
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **more,
    }


def start(
    command: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    request: Mapping[str, Any] | None = None,
    heed_interrupts: bool = False,
) -> subprocess.Popen:
    """Start a process in a session of its own, so that Ctrl-C reaches only us.

    Args:
        command: the program and its words; `module_command` gives a module's.
        log: the file for what it prints.
        environment: see `child_environment`.
        request: JSON for its standard input; its standard output is then ours to read (`serve_request`).
        heed_interrupts: let SIGINT end it even where we ignore that signal, as whatever a shell starts in the
            background does.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    asked = request is not None
    with log.open("wb") as printed:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if asked else subprocess.DEVNULL,
            stdout=subprocess.PIPE if asked else printed,
            stderr=printed,
            env=dict(environment),
            encoding="utf-8",
            start_new_session=True,
            preexec_fn=_heed_interrupts if heed_interrupts else None,
        )
    if asked:
        with suppress(BrokenPipeError), process.stdin as pipe:  # it has ended already: its log says why
            json.dump(request, pipe)
    return process


def run_workers(
    command: Sequence[str],
    requests: Mapping[Path, Mapping[str, Any]],
    on_event: Callable[[dict[str, Any]], None],
    *,
    threads: int,
    timeout_s: float | None = None,
) -> None:
    """Run ``command`` once for each request, all at the same time, until the last has finished.

    Each process gets its request as JSON on standard input and writes events, one JSON object a line, which
    ``on_event`` sees one at a time (see `serve_request`). On Ctrl-C we end them, and KeyboardInterrupt goes on to
    the caller.

    Args:
        command: as `module_command` gives it.
        requests: the log file of each process, and its request.
        threads: CPU threads of each process.
        timeout_s: how long all of it may take.

    Raises:
        WorkerFailedError: a process reported an error, died, or took too long; the others are ended too.
    """
    events: queue.Queue[tuple[Path, dict[str, Any] | None]] = queue.Queue()
    processes: dict[Path, subprocess.Popen] = {}
    ends = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        for log, request in requests.items():
            process = start(command, log=log, environment=child_environment(threads), request=request)
            processes[log] = process
            threading.Thread(target=_follow, args=(process, log, events), daemon=True).start()
        running, finished = set(processes), set()
        while running:
            try:
                log, event = events.get(timeout=None if ends is None else max(ends - time.monotonic(), 0))
            except queue.Empty:
                raise WorkerFailedError(f"the measuring process took longer than {timeout_s:g} s") from None
            if event is None:
                running.remove(log)
                code = processes[log].wait()
                if log not in finished:
                    raise WorkerFailedError(_death(code, log))
            elif event["event"] == "error":
                raise WorkerFailedError(event["message"] + ("" if event["known"] else f" (see {log})"))
            elif event["event"] == "finished":
                finished.add(log)
            else:
                on_event(event)
    finally:
        for process in processes.values():
            _end(process)


def module_command(module: str) -> list[str]:
    """``python -m module``, by this Python."""
    return [sys.executable, "-m", module]


def _follow(process: subprocess.Popen, log: Path, events: queue.Queue) -> None:
    """Pass the process's events on, and None when it has closed its output."""
    try:
        for line in process.stdout:
            events.put((log, json.loads(line)))
    except ValueError:  # closed while we read: the caller is ending it
        pass
    events.put((log, None))


def _end(process: subprocess.Popen) -> None:
    """Leave no process behind."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    process.stdout.close()


def _death(code: int, log: Path) -> str:
    reason = f"was ended by signal {-code}" if code < 0 else f"ended with code {code}"
    if code == -9:
        reason += " (often: out of memory)"
    return f"the measuring process {reason}; its log is {log}"


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
