"""Folders that an interrupted run continues from: settings that must agree, and records appended line by line.

```
results/sensitivity-pocket/         results/first/ (a comparison)
  settings.json                       settings.json
  environments.jsonl                  plans/int4.partial.jsonl  definition, cost and answers of an unfinished plan
  records.jsonl records.2.jsonl …     plans/int4.json           its finished measurement
  sensitivity.json                    plans/int4.log            what the measuring process printed
                                      plans/gptq.work/          the layers of an unfinished plan solved so far
                                      results.json report.html  written again after every plan
```
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.common.errors import ResultsError, RunFolderError
from labkit.common.files import atomic_path, read_json
from labkit.results.measurement import Measurement

ENVIRONMENTS = "environments.jsonl"


class RecordFolder:
    """A folder of records (see the module's text for its layout).

    A line is flushed when it is appended, so a process that is killed loses at most the line it is writing.

    Args:
        path: the folder.
        what: what it holds, for messages: ``sensitivities``, ``a search``.
    """

    OUTPUTS = "*.jsonl"
    """Files that are never there before the settings."""

    def __init__(self, path: str | os.PathLike, what: str) -> None:
        self.path, self.other = Path(path), f"{what} of another kind"

    def check_writable(self) -> None:
        """Raise `RunFolderError` unless the folder is there, or can be made, and takes files."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path / ".writable") as temporary:
                temporary.touch()
            (self.path / ".writable").unlink()
        except (FileExistsError, NotADirectoryError):
            raise RunFolderError(
                f"{self.path} cannot be written: it is, or lies under, a file; give a folder"
            ) from None
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def open(self, settings: Mapping[str, Any], grows: str | None = None) -> None:
        """Make the folder, or check that it was made with the same settings.

        The setting ``grows`` is a list that a later run may add to; what it leaves out stays in the folder.

        Raises:
            RunFolderError: it holds something else, naming each setting that differs; or cannot be written.
            ResultsError: its settings are damaged.
        """
        self.check_writable()
        settings, path = json.loads(json.dumps(settings)), self.path / "settings.json"
        if not path.is_file():
            if left := next(iter(self.path.glob(self.OUTPUTS)), None):
                raise RunFolderError(
                    f"{self.path} holds other files: {left.name} without its settings.json; give another folder"
                )
            _write(path, settings)
            return
        try:
            kept = dict(read_json(path))
        except (ResultsError, ValueError, TypeError):
            raise ResultsError(f"{path} is damaged: delete {self.path} to begin anew") from None
        if grows is not None:
            before = kept.get(grows, [])
            settings[grows] = [*before, *(entry for entry in settings[grows] if entry not in before)]
            if {**kept, grows: settings[grows]} == settings != kept:
                _write(path, settings)
                return
        if differing := [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]:
            raise RunFolderError(
                f"{self.path} holds {self.other}: {tell_differences(differing, kept, settings)}; "
                "give another folder (--output), or delete that one to begin anew"
            )

    def append(self, record: Mapping[str, Any], stream: int | str = 1) -> None:
        """Add a record; processes that write at the same time use different streams."""
        with self._stream(stream).open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The records of all streams.

        Raises:
            ResultsError: a line is damaged.
        """
        return [record for path in sorted(self.path.glob("records*.jsonl")) for _, record in _lines(path)]

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Note where the records that follow are made (`labkit.common.machine.environment`)."""
        self.append(environment, "environments")

    def environments(self) -> list[dict[str, Any]]:
        """Of every run that made records here, the earliest first; a line that was cut off is left out."""
        path = self.path / ENVIRONMENTS
        environments = []
        for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
            with suppress(ValueError):
                environments.append(dict(json.loads(line)))
        return environments

    def _stream(self, stream: int | str) -> Path:
        name = stream if isinstance(stream, str) else "records" if stream == 1 else f"records.{stream}"
        return self.path / f"{name}.jsonl"


class RunFolder(RecordFolder):
    """The folder of one comparison: one stream a plan, and what is finished of it."""

    OUTPUTS = "results.json"

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(path, "a comparison")
        self.other = "another comparison"

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def finished_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.json"

    def partial_path(self, plan: str) -> Path:
        return self._stream(f"plans/{plan}.partial")

    def log_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.log"

    def work_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.work"

    def save_finished(self, measurement: Measurement) -> None:
        """Write one plan's measurement and drop what it was put together from."""
        with atomic_path(self.finished_path(measurement.plan)) as temporary:
            temporary.write_text(json.dumps(measurement.to_dict(), ensure_ascii=False), encoding="utf-8")
        self.partial_path(measurement.plan).unlink(missing_ok=True)
        shutil.rmtree(self.work_path(measurement.plan), ignore_errors=True)

    def load_finished(self, plan: str, definition: Mapping[str, Any]) -> Measurement | None:
        """The finished measurement of `plan`, or None. Refuses one that was made with another definition."""
        path = self.finished_path(plan)
        if not path.is_file():
            return None
        measurement = Measurement.from_dict(read_json(path), str(path))
        _check_definition(path, plan, measurement.plan_definition, definition)
        return measurement

    def load_partial(self, plan: str, definition: Mapping[str, Any]) -> dict[str, Any]:
        """``{"cost": {…} or None, "records": […]}`` of an unfinished plan; empty if there is none.

        Raises:
            ResultsError: a line is damaged.
            RunFolderError: the plan's definition has changed.
        """
        path = self.partial_path(plan)
        state: dict[str, Any] = {"cost": None, "records": []}
        for number, entry in _lines(path):
            kind = entry.get("kind")
            value = entry.get(str(kind))
            if not isinstance(value, dict) or (kind == "record" and "id" not in value):
                raise _damaged(path, number)
            if kind == "plan":
                _check_definition(path, plan, value, definition)
            elif kind == "cost":
                state["cost"] = value
            else:
                state["records"].append(value)
        return state

    def append_partial(self, plan: str, kind: str, value: Mapping[str, Any]) -> None:
        """Append the ``plan`` (its definition, first), the ``cost`` or one ``record``."""
        path = self.partial_path(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.append({"kind": kind, kind: value}, f"plans/{plan}.partial")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and record of each line. A last line that a killed process left unfinished is dropped, also from the file.

    Raises:
        ResultsError: another line is damaged.
    """
    if not path.is_file():
        return
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("rb+") as file:
            file.truncate(len(whole))
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield number, dict(json.loads(line))
        except (ValueError, TypeError):
            raise _damaged(path, number) from None


def _damaged(path: Path, number: int) -> ResultsError:
    return ResultsError(f"{path}: damaged in line {number}; delete the file to measure anew what is in it")


def _check_definition(path: Path, plan: str, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if kept != json.loads(json.dumps(now)):
        raise RunFolderError(
            f"the plan {plan!r} has changed since {path} was written; "
            "delete that file to measure it anew, or give another --output"
        )


def tell_differences(names: list[str], kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``seed was 3, now 4``; a fingerprint only where nothing readable explains it."""
    readable = [name for name in names if not name.endswith("_fingerprint")]
    if readable:
        return ", ".join(
            f"{name} was {_told(kept.get(name))}, now {_told(now.get(name))}" for name in readable
        )
    return " and ".join(f"the {name.removesuffix('_fingerprint')} changed in content" for name in names)


def _told(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "…"


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
