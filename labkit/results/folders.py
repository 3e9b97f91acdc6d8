"""The folder of one comparison: what is finished, what is half done, and what it was made with.

```
results/first/
  settings.json             what every plan in this folder was measured with
  results.json report.html  written again after every plan
  plans/int4.json           one finished measurement
  plans/int4.partial.jsonl  the cost and the answers of a plan that is not finished
  plans/int4.log            what the measuring process printed
  plans/gptq.work/          the layers solved so far of a plan that calibrates and is not finished
```
Appended lines are flushed one by one, so a process that is killed loses at most the answers in flight.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError, ResultsError, RunFolderError
from labkit.common.files import atomic_path, read_json
from labkit.results.measurement import Measurement


class RunFolder:
    """Paths and state in one comparison's output folder (see the module's text for its layout)."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def results(self) -> Path:
        return self.path / "results.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def finished_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.json"

    def partial_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.partial.jsonl"

    def log_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.log"

    def work_path(self, plan: str) -> Path:
        return self.path / "plans" / f"{plan}.work"

    def check_writable(self) -> None:
        """Raise `RunFolderError` unless the folder is there, or can be made, and takes files."""
        try:
            (self.path / "plans").mkdir(parents=True, exist_ok=True)
            with atomic_path(self.path / ".writable") as temporary:
                temporary.touch()
            (self.path / ".writable").unlink()
        except (FileExistsError, NotADirectoryError):
            raise RunFolderError(f"{self.path} is, or lies under, a file; give a folder") from None
        except OSError as error:
            raise RunFolderError(f"{self.path} cannot be written: {error.strerror}") from None

    def check_settings(self, settings: Mapping[str, Any]) -> None:
        """Remember what this folder's plans are measured with, or refuse if it holds something else.

        Raises `RunFolderError` that names every setting that differs, with both values.
        """
        settings = json.loads(json.dumps(settings))
        path = self.path / "settings.json"
        if path.is_file():
            kept = read_json(path)
            if not isinstance(kept, dict):
                raise ResultsError(f"{path}: damaged: expected an object")
            differing = [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]
            if differing:
                told = tell_differences(differing, kept, settings)
                raise RunFolderError(
                    f"{self.path} holds another comparison: {told}; "
                    "give another --output, or delete that folder to measure anew"
                )
            return
        if self.results.exists():
            raise RunFolderError(
                f"{self.path} holds a results.json without its settings.json, so it cannot be continued; "
                "give another --output"
            )
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")

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

        A last line that a killed process left unfinished is dropped, also from the file.
        Raises `ResultsError` for any other damage, `RunFolderError` if the plan's definition has changed.
        """
        path = self.partial_path(plan)
        state: dict[str, Any] = {"cost": None, "records": []}
        if not path.is_file():
            return state
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if whole != data:
            with path.open("rb+") as file:
                file.truncate(len(whole))
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                entry = json.loads(line)
                if entry["kind"] == "plan":
                    _check_definition(path, plan, entry["plan"], definition)
                elif entry["kind"] == "cost":
                    state["cost"] = dict(entry["cost"])
                else:
                    entry["record"]["id"]
                    state["records"].append(entry["record"])
            except RunFolderError:
                raise
            except (ValueError, KeyError, TypeError):
                raise ResultsError(
                    f"{path}: damaged in line {number}; delete it to measure the plan anew"
                ) from None
        return state

    def append_partial(self, plan: str, kind: str, value: Mapping[str, Any]) -> None:
        """Append the ``plan`` (its definition, first), the ``cost`` or one ``record``."""
        path = self.partial_path(plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, kind: value}, ensure_ascii=False) + "\n")


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


ENVIRONMENTS = "environments.jsonl"


class RecordFolder:
    """See the module's text. ``what`` the folder holds is for messages: ``sensitivities``, ``a search``."""

    def __init__(self, path: str | os.PathLike, what: str) -> None:
        self.path, self.what = Path(path), what

    def open(self, settings: Mapping[str, Any], grows: str | None = None) -> None:
        """Make the folder, or check that it was made with the same settings.

        The setting ``grows`` is a list that a later run may add to; what it leaves out stays in the folder.

        Raises:
            LabError: it holds something else, naming each setting that differs; or cannot be written.
        """
        settings = json.loads(json.dumps(settings))
        record = self.path / "settings.json"
        try:
            if not record.is_file():
                if self.path.is_dir() and any(self.path.glob("*.jsonl")):
                    raise LabError(f"{self.path} holds other files: give another folder")
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
            raise LabError(f"{self.path} cannot be written: {error.strerror or error}") from None
        except (ValueError, TypeError) as error:
            if isinstance(error, LabError):
                raise
            raise LabError(f"{record} is damaged: delete {self.path} to begin anew") from None
        if differing := [name for name in {**kept, **settings} if kept.get(name) != settings.get(name)]:
            raise LabError(
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
            LabError: a line is damaged.
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
                    raise LabError(
                        f"{path}: damaged in line {number}; delete the file to make its records anew"
                    ) from None
        return found


def _write(path: Path, settings: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(settings, ensure_ascii=False, indent=1), encoding="utf-8")
