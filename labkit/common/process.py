"""Child processes: environment, start, events and end."""

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
from labkit.common.files import checkout_folder, reason_of


def serve_request(run: Callable[[Mapping[str, Any], Callable[[dict[str, Any]], None]], Any]) -> int:
    """Call ``run(request, emit)`` with the JSON object from standard input; returns the process's exit code.

    Standard output carries only events, one JSON object per line; all other output goes to standard error.
    An error becomes the event ``{"event": "error", "message": str, "known": bool}``; ``known`` marks a `LabError` or an
    `OSError`, whose message needs no traceback.
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
    except BrokenPipeError:  # the parent process is gone; the files on disk stay
        return 1
    except OSError as error:
        with suppress(OSError):  # the log may be on the disk that is full
            traceback.print_exc()
        emit({"event": "error", "message": reason_of(error), "known": True})
        return 1
    except Exception as error:
        traceback.print_exc()  # first: whoever reads the event ends this process
        emit({"event": "error", "message": f"{type(error).__name__}: {error}", "known": False})
        return 1
    return 0


def child_environment(threads: int | None = None, **more: str) -> dict[str, str]:
    """This process's environment, plus the package's folder in PYTHONPATH and an optional thread count."""
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
    """Start a process in its own session, so that Ctrl-C reaches only the parent.

    Args:
        command: the program and its arguments; `module_command` builds it for a module.
        log: the file for its output.
        environment: see `child_environment`.
        request: JSON for its standard input; its standard output is then a pipe (`serve_request`).
        heed_interrupts: let SIGINT end the process even if this process ignores it, as background processes of a
            shell do.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    has_request = request is not None
    with log.open("wb") as log_file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE if has_request else subprocess.DEVNULL,
            stdout=subprocess.PIPE if has_request else log_file,
            stderr=log_file,
            env=dict(environment),
            encoding="utf-8",
            start_new_session=True,
            preexec_fn=_heed_interrupts if heed_interrupts else None,
        )
    if has_request:
        # A broken pipe: the process has already ended; its log gives the reason.
        with suppress(BrokenPipeError), process.stdin as pipe:
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
    """Run ``command`` for all requests in parallel, until the last process finishes.

    Each process reads its request as JSON from standard input and writes events, one JSON object per line;
    ``on_event`` receives them in turn (see `serve_request`). Ctrl-C ends the processes and raises KeyboardInterrupt
    in the caller.

    Args:
        command: a command from `module_command`.
        requests: log file -> request, for each process.
        threads: CPU threads of each process.
        timeout_s: the time limit for all processes together.

    Raises:
        WorkerFailedError: a process reported an error, died, or took too long; the other processes are ended too.
    """
    events: queue.Queue[tuple[Path, dict[str, Any] | None]] = queue.Queue()
    processes: dict[Path, subprocess.Popen] = {}
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    try:
        for log, request in requests.items():
            process = start(command, log=log, environment=child_environment(threads), request=request)
            processes[log] = process
            threading.Thread(target=_follow, args=(process, log, events), daemon=True).start()
        running, finished = set(processes), set()
        while running:
            try:
                log, event = events.get(
                    timeout=None if deadline is None else max(deadline - time.monotonic(), 0)
                )
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
    """``python -m module``, with this interpreter."""
    return [sys.executable, "-m", module]


def _follow(process: subprocess.Popen, log: Path, events: queue.Queue) -> None:
    """Put the process's events into the queue, and None when it closes its output."""
    try:
        for line in process.stdout:
            events.put((log, json.loads(line)))
    except ValueError:  # the caller closed the pipe while ending the process
        pass
    events.put((log, None))


def _end(process: subprocess.Popen) -> None:
    """End the process if it still runs, and close its output."""
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
