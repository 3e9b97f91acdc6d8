"""The records of started services: one small file per port, and a check that the process is still alive."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from labkit.common.files import atomic_path

FOLDER_VARIABLE = "LABKIT_STATE"


@dataclass(frozen=True)
class Record:
    """A service that was started.

    Attributes:
        port, url: where it listens.
        pid, created: its process id and creation time; the system may reuse an id for another process.
        arguments: the arguments of `labkit serve`, without the API key.
        log: its log file.
    """

    port: int
    url: str
    pid: int
    created: float
    arguments: tuple[str, ...]
    log: str

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
    uses the port. ``told`` describes the state in a sentence.
    """

    name: str
    told: str


def folder() -> Path:
    """The folder of records and logs: ``$LABKIT_STATE``, or the system's folder for application state."""
    if override := os.environ.get(FOLDER_VARIABLE):
        return Path(override).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "labkit"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "labkit"


def log_path(port: int) -> Path:
    """The log of the service on a port."""
    return folder() / f"service-{port}.log"


def read(port: int) -> Record | None:
    """The record of a port; None if it is missing or unreadable."""
    try:
        content = json.loads(_path(port).read_text(encoding="utf-8"))
        return Record(**{**content, "arguments": tuple(content["arguments"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(record: Record) -> None:
    """Store a record."""
    with atomic_path(_path(record.port)) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def forget(port: int) -> None:
    """Delete the record of a port."""
    _path(port).unlink(missing_ok=True)


def _path(port: int) -> Path:
    return folder() / f"service-{port}.json"
