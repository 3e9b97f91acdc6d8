"""The service's log: short lines on standard output, without prompts, images or keys."""

from __future__ import annotations

import sys
import traceback
from contextlib import suppress


def info(message: str) -> None:
    """Something happened as it should."""
    _write("INFO", message)


def success(message: str) -> None:
    """What was started is there."""
    _write("SUCCESS", message)


def warning(message: str) -> None:
    """Something that its reader should look at."""
    _write("WARNING", message)


def fault(where: str, error: BaseException) -> None:
    """A bug, or a broken device: its kind and the lines of code; not its message, which may quote a prompt."""
    frames = traceback.extract_tb(error.__traceback__)[-8:]
    lines = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(frames))
    _write("ERROR", f"{where}: {type(error).__name__} in {lines}")


def _write(level: str, message: str) -> None:
    line = "".join(character if character.isprintable() else " " for character in message)
    with suppress(OSError):  # a full disk, or a closed pipe, ends no answer
        print(f"[{level}] {line}", file=sys.stdout, flush=True)
