"""A folder of records that are made one by one: what they are made with, and each as soon as it exists.

```
folder/
  settings.json        what every record in it is made with: another run is refused
  records.jsonl        one record a line; records.2.jsonl and so on of processes beside the first
  environments.jsonl   where they were made: a line for each run that made any
```
Lines are flushed one by one, so a run that is killed at any moment loses what was under way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError
from labkit.common.files import atomic_path
from labkit.runfolder import tell_differences

ENVIRONMENTS = "environments.jsonl"


class RecordFolderError(LabError):
    """The folder cannot be used; the message says why and what to do."""


class RecordFolder:
    """See the module's text. ``what`` the folder holds is for messages: ``sensitivities``, ``a search``."""

    def __init__(self, path: str | os.PathLike, what: str) -> None:
        self.path, self.what = Path(path), what

    def open(self, settings: Mapping[str, Any], grows: str | None = None) -> None:
        """Make the folder, or check that it was made with the same settings.

        The setting ``grows`` is a list that a later run may add to; what it leaves out stays in the folder.

        Raises:
            RecordFolderError: it holds something else, naming each setting that differs; or cannot be written.
        """
        settings = json.loads(json.dumps(settings))
        record = self.path / "settings.json"
        try:
            if not record.is_file():
                if self.path.is_dir() and any(self.path.glob("*.jsonl")):
                    raise RecordFolderError(f"{self.path} holds other files: give another folder")
                _write(record, settings)
                return
            kept = dict(json.loads(record.read_text(encoding="utf-8")))
            if grows is not None:
                before = kept.get(grows, [])
                settings[grows] = [*before, *(one for one in settings[grows] if one not in before)]
                if {**kept, grows: settings[grows]} == settings != kept:
                    _write(record, settings)
                    return
        except OSError as error:
            raise RecordFolderError(f"{self.path} cannot be written: {error.strerror or error}") from None
        except (ValueError, TypeError) as error:
            if isinstance(error, LabError):
                raise
            raise RecordFolderError(f"{record} is damaged: delete {self.path} to begin anew") from None
        if differing := [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]:
            raise RecordFolderError(
                f"{self.path} holds {self.what} of another kind: {tell_differences(differing, kept, settings)}; "
                "give another folder, or delete that one to begin anew"
            )

    def append(self, record: Mapping[str, Any], stream: int = 1) -> None:
        """Add a record; processes that write at the same time use different streams."""
        path = self.path / ("records.jsonl" if stream == 1 else f"records.{stream}.jsonl")
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Note where the records that follow are made (`labkit.common.machine.environment`)."""
        with (self.path / ENVIRONMENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(environment, ensure_ascii=False) + "\n")

    def environments(self) -> list[dict[str, Any]]:
        """Of every run that made records here, the earliest first; a line that was cut off is left out."""
        path = self.path / ENVIRONMENTS
        found = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):
                found.append(dict(json.loads(line)))
        return found

    def records(self) -> list[dict[str, Any]]:
        """All records. A last line that a killed process left unfinished is dropped, also from the file.

        Raises:
            RecordFolderError: a line is damaged.
        """
        found = []
        for path in sorted(self.path.glob("records*.jsonl")):
            data = path.read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if whole != data:
                with path.open("rb+") as file:
                    file.truncate(len(whole))
            for number, line in enumerate(whole.splitlines(), start=1):
                try:
                    found.append(dict(json.loads(line)))
                except (ValueError, TypeError):
                    raise RecordFolderError(
                        f"{path}: damaged in line {number}; delete the file to make its records anew"
                    ) from None
        return found


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
