"""Starting one measuring process, following its progress, and ending it on Ctrl-C."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from labkit.errors import LabError
from labkit.files import checkout_folder

STAGES = {"loading": "loading and quantizing", "measuring": "measuring latency", "answering": "answering"}


class WorkerFailedError(LabError):
    """The measuring process failed; the message is its own, or points to its log."""


def run_worker(
    request: Mapping[str, Any],
    *,
    log: Path,
    title: str = "",
    progress: bool = True,
    command: Sequence[str] | None = None,
) -> None:
    """Run ``python -m labkit._worker`` on `request` (see there) until its measurement is on disk.

    Its standard error goes to the file `log`; a progress bar shows stage, answers and right steps. The
    process has a session of its own, so Ctrl-C reaches only us: we end it, and KeyboardInterrupt goes on to
    the caller.
    Raises `WorkerFailedError` if it reports an error or dies.
    """
    from tqdm.auto import tqdm

    command = list(command or (sys.executable, "-m", "labkit._worker"))
    log.parent.mkdir(parents=True, exist_ok=True)
    failure: str | None = None
    finished = False
    with (
        log.open("wb") as errors,
        tqdm(
            total=request["items"],
            desc=title,
            unit=" answers",
            mininterval=0,
            disable=not progress,
            file=sys.stderr,
        ) as bar,
    ):
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            env=worker_environment(request["threads"]),
            encoding="utf-8",
            start_new_session=True,
        )
        try:
            with process.stdin as pipe:
                json.dump(request, pipe)
            for line in process.stdout:
                event = json.loads(line)
                if event["event"] == "stage":
                    bar.set_description(f"{title}: {STAGES[event['stage']]}")
                elif event["event"] == "answers":
                    _show(bar, event)
                elif event["event"] == "error":
                    failure = event["message"] + ("" if event["known"] else f" (see {log})")
                elif event["event"] == "finished":
                    finished = True
            process.wait()
        except BrokenPipeError:
            process.wait()
        finally:
            end_process(process)
        bar.set_description(f"{title}: {'done' if finished else 'failed'}")
    if not finished:
        raise WorkerFailedError(failure or told_death(process.returncode, log))


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


def _show(bar: Any, event: Mapping[str, Any]) -> None:
    bar.update(event["done"] - bar.n)
    if event["done"]:
        bar.set_postfix_str(f"right steps {event['hits'] / event['done']:.1%}", refresh=False)


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
