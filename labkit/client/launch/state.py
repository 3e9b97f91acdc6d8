"""What is known of a started service: one small file a port, and whether its process is still the same one."""

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
        pid, created: its process, and when that was made; a number alone may be another process's by now.
        arguments: what `labkit serve` was told, without the key.
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
        """Whether its process lives."""
        import psutil

        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 1
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False


@dataclass(frozen=True)
class State:
    """What a service is doing now.

    ``name`` is ``ready``, ``starting``, ``unhealthy``, ``died``, ``stopped``, or ``foreign``: the port is used by
    something else. ``told`` says it in a sentence.
    """

    name: str
    told: str


def folder() -> Path:
    """Where records and logs are: ``$LABKIT_STATE``, or where this system keeps such things."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "labkit"
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state") / "labkit"


def log_path(port: int) -> Path:
    """The log of the service on a port."""
    return folder() / f"service-{port}.log"


def read(port: int) -> Record | None:
    """The record of a port, or None; one that cannot be read counts as none."""
    try:
        known = json.loads(_path(port).read_text(encoding="utf-8"))
        return Record(**{**known, "arguments": tuple(known["arguments"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def write(record: Record) -> None:
    """Keep a record."""
    with atomic_path(_path(record.port)) as temporary:
        temporary.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")


def forget(port: int) -> None:
    """Drop a port's record."""
    _path(port).unlink(missing_ok=True)


def _path(port: int) -> Path:
    return folder() / f"service-{port}.json"
