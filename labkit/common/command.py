"""How every command ends: what went wrong in one line on standard error, and an exit code.

Exit codes: 0 done; 1 a plan, the machine or the lab failed; 2 a wrong request; 130 interrupted.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO, TypeVar

from labkit.common.errors import LabError, LaunchError, WorkerFailedError
from labkit.common.files import naming, reason_of, shortened

T = TypeVar("T")

FAILURES = (LaunchError, WorkerFailedError)
"""Errors that come from a process of the lab, not from the request."""
MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE, None)
"""OSErrors that are no fault of the request."""


def exit_code(
    run: Callable[[Sequence[str]], int],
    arguments: Sequence[str] | None = None,
    *,
    prefix: str = "labkit: ",
    warning: str = "labkit: warning: ",
    interrupted: str = "",
) -> int:
    """The exit code of ``run(arguments)``; None takes the arguments of the process.

    A bug still ends in its traceback; a request that is wrong, a full disk and a closed pipe end in one line.
    """
    try:
        with _output() as output, _short_warnings(warning):
            try:
                code = run(_readable(sys.argv[1:] if arguments is None else arguments))
            except SystemExit as stop:  # --help and --version
                code = int(stop.code or 0)
            output.finish()
            return code
    except KeyboardInterrupt as interruption:
        return _end(f"\n{prefix}{str(interruption) or interrupted or 'interrupted'}", 130)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        return _end("", 0)
    except LabError as error:
        return _end(f"{prefix}{' '.join(str(error).split())}", 1 if isinstance(error, FAILURES) else 2)
    except MemoryError:
        return _end(f"{prefix}the memory is full", 1)
    except OSError as error:
        return _end(f"{prefix}{reason_of(error)}", 1 if error.errno in MACHINE else 2)


class _Output:
    """Standard output that names itself in its errors, and remembers those that a library swallows (argparse)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._named(self._stream.write, text)

    def flush(self) -> None:
        self._named(self._stream.flush)

    def finish(self) -> None:
        """Write what is left. Raises the first error, even one that was swallowed."""
        self.flush()
        if self._error is not None:
            raise self._error

    def _named(self, function: Callable[..., T], *arguments: str) -> T:
        try:
            with naming("standard output"):
                return function(*arguments)
        except OSError as error:
            self._error = error
            raise


@contextmanager
def _output() -> Iterator[_Output]:
    """Put an `_Output` in the place of standard output.

    Raises:
        LabError: it is closed. The next file that is opened would take its place, and all that is printed.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - stands until the process ends
    if (stream := sys.stdout) is None:
        raise LabError("standard output is closed: send it to a file, or to /dev/null")
    if isinstance(stream, io.TextIOWrapper):  # a terminal of another encoding gets an escape, not an error
        stream.reconfigure(errors="backslashreplace")
    sys.stdout = output = _Output(stream)
    try:
        yield output
    finally:
        sys.stdout = stream


def _readable(words: Sequence[str]) -> Sequence[str]:
    """The arguments. Raises LabError for bytes that are no text in the system's encoding."""
    for word in words:
        if any("\ud800" <= character <= "\udfff" for character in word):
            raise LabError(f"the argument {shortened(ascii(word))} is no {sys.getfilesystemencoding()} text")
    return words


def _end(message: str, code: int) -> int:
    """Print the message; what standard output cannot take is dropped, or the interpreter fails at it again."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if message:
        with suppress(OSError):  # standard error may be full as well
            print(message, file=sys.stderr, flush=True)
    return code


@contextmanager
def _short_warnings(prefix: str) -> Iterator[None]:
    """Show warnings in one line, without the path and the code that `warnings` adds."""
    shown = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{prefix}{' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = shown
