"""The records of started services: one small file per port, a lock for who starts one, and whether its process lives."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.common.errors import LaunchError
from labkit.common.files import atomic_path, user_path

FOLDER_VARIABLE = "LABKIT_STATE"
PROBE_BYTES = 16_384
"""What a record and the first lines of a log need."""


@dataclass(frozen=True)
class Record:
    """A service that was started.

    Attributes:
        port, url: where it listens.
        pid, created: its process id and creation time; the system may reuse an id for another process.
        arguments: the arguments of `labkit serve`, without the API key.
        log: its log file.
        key: a salted hash of its API key; empty without a key.
        plan: the SHA-256 of its plan's file; empty for a preset.
    """

    port: int
    url: str
    pid: int
    created: float
    arguments: tuple[str, ...]
    log: str
    key: str = ""
    plan: str = ""

    @property
    def is_running(self) -> bool:
        """Whether its process is alive."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(frozen=True)
class State:
    """The current state of a service.

    ``name`` is ``ready``, ``starting``, ``unhealthy``, ``died``, ``stopped``, or ``foreign``: another program
    uses the port. ``sentence`` describes the state.
    """

    name: str
    sentence: str


def folder() -> Path:
    """The folder of records and logs: ``$LABKIT_STATE``, or the system's folder for application state."""
    if override := os.environ.get(FOLDER_VARIABLE):
        return user_path(override)
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "labkit"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "labkit"


def log_path(port: int) -> Path:
    """The log of the service on a port."""
    return folder() / f"service-{port}.log"


@contextmanager
def claimed(port: int) -> Iterator[None]:
    """Let only one process at a time start or forget the service of a port. It is held for moments, never while waiting.

    Raises:
        LaunchError: the folder of records cannot be written, or its disk is full; nothing is started then.
    """
    path = folder() / f"service-{port}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("ab", buffering=0)
    except OSError as error:
        raise _unusable(error) from None
    with lock:
        try:
            _lock(lock.fileno())
            _check_space(lock)
        except OSError as error:
            raise _unusable(error) from None
        yield


def read(port: int) -> Record | None:
    """The record of a port; None if there is none, or it is damaged.

    Raises:
        LaunchError: the folder of records cannot be read, so nobody knows.
    """
    path = _path(port)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Record(**{**content, "arguments": tuple(content["arguments"])})
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _unusable(error) from None
    except (ValueError, TypeError, KeyError):
        return None


def write(record: Record) -> None:
    """Store a record. Raises LaunchError if it cannot be stored."""
    try:
        with atomic_path(_path(record.port)) as temporary:
            temporary.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise _unusable(error) from None


def forget(record: Record) -> None:
    """Delete a record, unless another service has taken its port since."""
    if read(record.port) == record:
        _path(record.port).unlink(missing_ok=True)


def hash_of(key: str | None, salt: str | None = None) -> str:
    """``salt:hash`` of an API key, which does not give the key away; empty without a key."""
    if not key:
        return ""
    salt = salt or secrets.token_hex(8)
    return f"{salt}:{hashlib.pbkdf2_hmac('sha256', key.encode(), salt.encode(), 100_000).hex()}"


def is_key(key: str | None, hashed: str) -> bool:
    """Whether `hash_of` made ``hashed`` of this key."""
    return secrets.compare_digest(hash_of(key, hashed.partition(":")[0]), hashed)


def _check_space(file: io.FileIO) -> None:
    """Find a full disk before a process is started. Raises OSError."""
    try:
        if file.write(bytes(PROBE_BYTES)) < PROBE_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(file.fileno())
    finally:
        file.truncate(0)


def _unusable(error: OSError) -> LaunchError:
    return LaunchError(
        f"the folder of services {folder()} cannot be used: {error.strerror or error}; "
        f"${FOLDER_VARIABLE} names another folder"
    )


def _lock(descriptor: int) -> None:
    """Lock an open file until it is closed, or its process ends; waits for who has it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)
    else:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _path(port: int) -> Path:
    return folder() / f"service-{port}.json"
