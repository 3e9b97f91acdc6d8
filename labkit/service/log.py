"""The service's log: short lines on standard output, without prompts, images or keys.

Warnings and faults of one reason take one line a second at most; the next line says how many were left out.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
import traceback
from contextlib import suppress

LIBRARIES = ("uvicorn.error", "asyncio")
"""The loggers of what runs the service."""
SECONDS_APART = 1.0
_last: dict[
    str, tuple[float, int]
] = {}  # of each reason: when it was written, and how often it was not since
_lock = threading.Lock()


def info(message: str) -> None:
    """Something happened as it should."""
    _write("INFO", message)


def success(message: str) -> None:
    """What was started is there."""
    _write("SUCCESS", message)


def warning(message: str, reason: str | None = None) -> None:
    """Something that its reader should look at; ``reason`` is what messages with other numbers have in common."""
    _write_seldom("WARNING", reason or message, message)


def fault(where: str, error: BaseException) -> None:
    """A bug, or a broken device: its kind and the lines of code; not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    lines = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    reason = f"{type(error).__name__} in {lines}"
    _write_seldom("ERROR", reason, f"{where}: {reason}")


class LibraryHandler(logging.Handler):
    """Writes what a library logs as the service's own lines: no traceback, no flood."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        line = record.getMessage().partition("\n")[0]  # asyncio's further lines quote exceptions
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            fault(line, error)
        else:
            warning(line, str(record.msg))


def take_over_libraries() -> None:
    """Let the libraries' warnings come here."""
    for name in LIBRARIES:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [LibraryHandler(logging.WARNING)], False


def _write_seldom(level: str, reason: str, message: str) -> None:
    now = time.monotonic()
    with _lock:
        written, left_out = _last.get(reason, (-SECONDS_APART, 0))
        if now - written < SECONDS_APART:
            _last[reason] = written, left_out + 1
            return
        if len(_last) > 1000:
            _last.clear()
        _last[reason] = now, 0
    _write(level, message + (f" (and {left_out:,} times more before)" if left_out else ""))


def _write(level: str, message: str) -> None:
    line = "".join(character if character.isprintable() else " " for character in message)
    with suppress(OSError):  # a full disk, or a closed pipe, ends no answer
        print(f"[{level}] {line}", file=sys.stdout, flush=True)
