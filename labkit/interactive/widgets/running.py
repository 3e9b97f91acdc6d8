"""Runs ``labkit compare`` in a process of its own, reads its progress from its folder, and stops it resumably.

The notebook's kernel holds no model and is never blocked.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from labkit.common.errors import LabError, ResultsError
from labkit.common.files import atomic_path
from labkit.common.process import child_environment, start
from labkit.results.comparison import Comparison
from labkit.results.folders import RunFolder

LABKIT = (sys.executable, "-m", "labkit")
"""The command line of this lab."""


@dataclass(frozen=True)
class PlanProgress:
    """How far one plan is: ``waiting``, ``measuring``, ``answering``, ``finished`` or ``failed``;
    answers given, and how many of them are right."""

    plan: str
    state: str
    answers: int = 0
    right: int = 0


class ComparisonRun:
    """``labkit compare`` with these arguments, and its progress. Nothing runs before `start`."""

    def __init__(
        self,
        model: str,
        plans: Sequence[str],
        output: str | os.PathLike,
        *,
        items: int,
        split: str = "all",
        device: str = "auto",
        thinking: bool = False,
        command: Sequence[str] = LABKIT,
    ) -> None:
        self.folder, self.plans, self.items = RunFolder(output), list(plans), items
        self.arguments = [
            *command, "compare", model, "--plans", ",".join(plans), "--items", str(items),
            "--split", split, "--device", device, "--thinking" if thinking else "--no-thinking",
            "--output", str(output),
        ]  # fmt: skip
        self._process: subprocess.Popen | None = None

    @property
    def log(self) -> Path:
        """File with the process's output."""
        return self.folder.path / "compare.log"

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def code(self) -> int | None:
        """Exit code; None while it runs, 130 if it was stopped."""
        return None if self._process is None else self._process.poll()

    def start(self) -> None:
        """Start the process; it continues what an earlier run left in the folder.

        Raises LabError if it runs already, or if the folder cannot be written.
        """
        if self.is_running:
            raise LabError("this comparison is running already")
        self.folder.check_writable()
        self._process = start(
            self.arguments, log=self.log, environment=child_environment(COLUMNS="120"), heed_interrupts=True
        )

    def stop(self, timeout_s: float = 20.0) -> None:
        """Interrupt it, as Ctrl-C does, and wait for its end. Measured results are kept, and `start` continues."""
        if not self.is_running:
            return
        self._process.send_signal(signal.SIGINT)
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait(self, timeout_s: float | None = None) -> int:
        """Wait for its end; return its exit code."""
        return self._process.wait(timeout_s)

    def progress(self) -> list[PlanProgress]:
        """How far each plan is, read from the folder."""
        return [self._progress(plan) for plan in self.plans]

    def comparison(self) -> Comparison | None:
        """The finished plans; None before the first."""
        try:
            return Comparison.load(self.folder.path)
        except ResultsError:
            return None

    def last_words(self) -> str:
        """The last line of the log that is no progress bar, which says why it failed."""
        try:
            text = self.log.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
        lines = [line.rsplit("\r", 1)[-1].strip() for line in text.splitlines()]
        messages = [line for line in lines if line.startswith("labkit: ")] or [line for line in lines if line]
        return messages[-1].removeprefix("labkit: ") if messages else ""

    def _progress(self, plan: str) -> PlanProgress:
        name = Path(plan).stem if plan.endswith((".yaml", ".yml")) else plan
        if self.folder.finished_path(name).is_file():
            return PlanProgress(name, "finished", self.items)
        path = self.folder.partial_path(name)
        if not path.is_file():
            return PlanProgress(name, "waiting" if self.code in (None, 130) else "failed")
        entries = list(_entries(path))
        records = [entry["record"] for entry in entries if entry.get("kind") == "record"]
        state = "answering" if any(entry.get("kind") == "cost" for entry in entries) else "measuring"
        return PlanProgress(name, state, len(records), sum(bool(record.get("success")) for record in records))


def write_plan(plan: Any, folder: Path) -> str:
    """Write a plan that is no preset into ``folder`` and return its path, which names it for a comparison."""
    with atomic_path(folder / f"{plan.name}.yaml") as temporary:
        plan.to_yaml(temporary)
    return str(folder / f"{plan.name}.yaml")


def _entries(path: Path) -> Any:
    """The complete JSON lines of a file that is still being written."""
    for line in path.read_bytes().splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
