"""Folders from which an interrupted run continues: settings, which must match, and records appended line by line.

```
results/sensitivity-pocket/         results/first/ (a comparison)
  settings.json                       settings.json
  environments.jsonl                  plans/int4.partial.jsonl  definition, cost and answers of an unfinished plan
  records.jsonl records.2.jsonl …     plans/int4.json           its finished measurement
  sensitivity.json                    plans/int4.log            output of the measuring process
                                      plans/gptq.work/          solved layers of an unfinished plan
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

from labkit.common.errors import LabError, ResultsError
from labkit.common.files import atomic_path, naming, read_json, user_path
from labkit.results.measurement import Measurement

ENVIRONMENTS = "environments.jsonl"


class RecordFolder:
    """A folder of records; the module's docstring shows its layout.

    Each line is flushed when it is appended, so a killed process loses at most the line it is writing.

    Args:
        path: the folder.
        what: its contents, for messages: ``sensitivities``, ``a search``.
    """

    OUTPUTS = "*.jsonl"
    """Files that never exist without the settings."""

    def __init__(self, path: str | os.PathLike, what: str) -> None:
        self.path, self.other = user_path(path), f"{what} of another kind"

    def check_writable(self) -> None:
        """Create the folder if needed. Raises `LabError` if that fails or it is not writable."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path / ".writable") as temporary:
                temporary.touch()
            (self.path / ".writable").unlink()
        except (FileExistsError, NotADirectoryError):
            raise LabError(
                f"{self.path} cannot be written: it is, or lies under, a file; give a folder"
            ) from None
        except OSError as error:
            raise LabError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def open(self, settings: Mapping[str, Any], grows: str | None = None) -> None:
        """Create the folder, or check that its settings are the same.

        The setting ``grows`` is a list that a later run may extend; entries that it leaves out stay in the folder.

        Raises:
            LabError: the folder has other settings (the message names each one), or is not writable.
            ResultsError: its settings are damaged.
        """
        self.check_writable()
        settings, path = json.loads(json.dumps(settings)), self.path / "settings.json"
        if not path.is_file():
            if left := next(iter(self.path.glob(self.OUTPUTS)), None):
                raise LabError(
                    f"{self.path} holds other files: {left.name} without its settings.json; give another folder"
                )
            _write(path, settings)
            return
        try:
            stored = dict(read_json(path))
        except (ResultsError, ValueError, TypeError):
            raise ResultsError(f"{path} is damaged: delete {self.path} to begin anew") from None
        if grows is not None:
            before = stored.get(grows, [])
            settings[grows] = [*before, *(entry for entry in settings[grows] if entry not in before)]
            if {**stored, grows: settings[grows]} == settings != stored:
                _write(path, settings)
                return
        if differing := [name for name in {**stored, **settings} if stored.get(name) != settings.get(name)]:
            raise LabError(
                f"{self.path} holds {self.other}: {tell_differences(differing, stored, settings)}; "
                "give another folder (--output), or delete that one to begin anew"
            )

    def append(self, record: Mapping[str, Any], stream: int | str = 1) -> None:
        """Add a record; processes that write at the same time use different streams."""
        path = self._stream(stream)
        with naming(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The records of all streams.

        Raises:
            ResultsError: a line is damaged.
        """
        return [record for path in sorted(self.path.glob("records*.jsonl")) for _, record in _lines(path)]

    def begin(self, environment: Mapping[str, Any]) -> None:
        """Store the environment of the records that follow (`labkit.common.machine.environment`)."""
        self.append(environment, "environments")

    def environments(self) -> list[dict[str, Any]]:
        """The environments of all runs in this folder, the earliest first, without incomplete lines."""
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
    """The folder of one comparison: one stream for each unfinished plan, one file for each finished plan."""

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
        """Write one plan's measurement and delete its partial files."""
        with atomic_path(self.finished_path(measurement.plan)) as temporary:
            temporary.write_text(json.dumps(measurement.to_dict(), ensure_ascii=False), encoding="utf-8")
        self.partial_path(measurement.plan).unlink(missing_ok=True)
        shutil.rmtree(self.work_path(measurement.plan), ignore_errors=True)

    def load_finished(self, plan: str, definition: Mapping[str, Any]) -> Measurement | None:
        """The finished measurement of `plan`, or None. Raises LabError if its definition has changed."""
        path = self.finished_path(plan)
        if not path.is_file():
            return None
        measurement = Measurement.from_dict(read_json(path), str(path))
        _check_definition(path, plan, measurement.plan_definition, definition)
        return measurement

    def load_partial(self, plan: str, definition: Mapping[str, Any]) -> dict[str, Any]:
        """``{"cost": {…} or None, "records": […]}`` of an unfinished plan; without entries if there is none.

        Raises:
            ResultsError: a line is damaged.
            LabError: the plan's definition has changed.
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
    """Number and record of each line. An incomplete last line, from a killed process, is removed from the file.

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


def _check_definition(path: Path, plan: str, stored: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    if stored != json.loads(json.dumps(now)):
        raise LabError(
            f"the plan {plan!r} has changed since {path} was written; "
            "delete that file to measure it anew, or give another --output"
        )


def tell_differences(names: list[str], kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """``seed was 3, now 4``; names fingerprints only if no readable setting differs."""
    readable = [name for name in names if not name.endswith("_fingerprint")]
    if readable:
        return ", ".join(
            f"{name} was {_value_text(kept.get(name))}, now {_value_text(now.get(name))}" for name in readable
        )
    return " and ".join(f"the {name.removesuffix('_fingerprint')} changed in content" for name in names)


def _value_text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "…"


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
