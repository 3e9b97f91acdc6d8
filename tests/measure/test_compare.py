"""One process a plan; what is measured stays measured; what does not fit together is refused."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from compare_fakes import request_for

from labkit.common.errors import (
    Interrupted,
    LabError,
    ResultsError,
    WorkerFailedError,
)
from labkit.measure.compare import _measure_all, run_worker
from labkit.measure.job import Job, JobPlan
from labkit.results.comparison import Comparison
from labkit.results.folders import RunFolder

WORKER = [sys.executable, str(Path(__file__).parents[1] / "compare_fakes.py")]
SETTINGS = {
    "model": "fake",
    "device": "cpu",
    "threads": 1,
    "seed": None,
    "split": "all",
    "items": 10,
    "enable_thinking": False,
    "batch_size": 4,
}


def job(*names, **settings):
    plans = {name: JobPlan({"name": name}) for name in names}
    return Job({**SETTINGS, **settings}, "fake", plans, "fp32", None)


def measure(folder, *names, **settings):
    asked = job(*names, **settings)
    folder = RunFolder(folder)
    folder.open(asked.settings)
    return _measure_all(asked, folder, False, WORKER)


def test_every_plan_runs_in_a_process_of_its_own(tmp_path):
    comparison = measure(tmp_path, "fp32", "int8", "int4")
    pids = {m.environment["pid"] for m in comparison.measurements}
    assert len(pids) == 3
    assert os.getpid() not in pids


def test_the_table_pairs_every_plan_with_the_unquantized_one(tmp_path):
    table = measure(tmp_path, "int4", "fp32", "int8").table()
    assert list(table.index) == ["int4", "fp32", "int8"]
    assert table.loc["int4", "weights_change"] == pytest.approx(700 / 4000 - 1)
    assert table.loc["int4", "answer_change"] == pytest.approx(0.25)
    assert table.loc["int4", "step_success_rate_difference"] == pytest.approx(-0.3)
    assert table.loc["int8", "step_success_rate_difference"] == 0.0
    assert set(table["reference"]) == {"fp32"}


def test_results_and_report_are_written_and_read_again(tmp_path):
    made = measure(tmp_path, "fp32", "int4")
    assert (tmp_path / "report.html").is_file()
    read = Comparison.load(tmp_path)
    assert read.measurements == made.measurements
    assert len(read.measurements[1].samples["items"]) == 10
    assert read.settings["items"] == 10
    read.save(tmp_path / "copy.json")
    assert Comparison.load(tmp_path / "copy.json").measurements == made.measurements


def test_a_second_run_measures_only_what_is_missing(tmp_path):
    first = measure(tmp_path, "fp32", "int8")
    second = measure(tmp_path, "fp32", "int8", "int4")
    assert [m.environment["pid"] for m in second.measurements[:2]] == [
        m.environment["pid"] for m in first.measurements
    ]
    assert second.measurements[2].plan == "int4"


def test_a_half_answered_plan_continues_after_its_last_answer(tmp_path):
    folder = RunFolder(tmp_path)
    whole = measure(tmp_path / "whole", "fp32").measurements[0]
    folder.append_partial("fp32", "plan", {"name": "fp32"})
    folder.append_partial("fp32", "cost", {"weights_bytes": 123, "samples": {"ttft_s": [9.0]}})
    for record in whole.samples["items"][:7]:
        folder.append_partial("fp32", "record", {**record, "answer": "kept"})
    with folder.partial_path("fp32").open("a") as file:
        file.write('{"kind": "record", "rec')  # killed while writing

    measured = measure(tmp_path, "fp32").measurements[0]
    assert [r["answer"] == "kept" for r in measured.samples["items"]] == [True] * 7 + [False] * 3
    assert measured.weights_bytes == 123
    assert measured.samples["ttft_s"] == [9.0]
    assert measured.step_success_rate == whole.step_success_rate
    assert not folder.partial_path("fp32").exists()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"items": 20}, "items was 10, now 20"),
        ({"seed": 4}, "seed was null, now 4"),
        ({"model": "other"}, "model was fake, now other"),
        ({"version": "9"}, "version was null, now 9"),
        ({"items_fingerprint": "abc"}, "the items changed in content"),
        ({"seed": 4, "items_fingerprint": "abc"}, "comparison: seed was null, now 4;"),
    ],
)
def test_a_folder_with_another_comparison_is_refused(tmp_path, change, told):
    measure(tmp_path, "fp32")
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(LabError, match=told):
        measure(tmp_path, "fp32", **change)
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_plan_that_changed_is_refused(tmp_path):
    measure(tmp_path, "fp32")
    changed = Job(SETTINGS, "fake", {"fp32": JobPlan({"name": "fp32", "default": "fp16"})}, "fp32", None)
    with pytest.raises(LabError, match="'fp32' has changed"):
        _measure_all(changed, RunFolder(tmp_path), False, WORKER)


def test_results_of_unknown_origin_are_not_overwritten(tmp_path):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(LabError, match="without its settings"):
        measure(tmp_path, "fp32")


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(LabError, match="give a folder"):
        RunFolder(tmp_path / "file").check_writable()
    with pytest.raises(LabError, match="give a folder"):
        RunFolder(tmp_path / "file" / "below").check_writable()


def test_damaged_files_of_a_run_are_named(tmp_path):
    measure(tmp_path, "fp32")
    finished = tmp_path / "plans" / "fp32.json"
    finished.write_text(finished.read_text()[:100])
    with pytest.raises(ResultsError, match=r"fp32\.json: damaged"):
        measure(tmp_path, "fp32")
    finished.unlink()
    (tmp_path / "plans" / "fp32.partial.jsonl").write_text('{"kind": "cost"}\n')
    with pytest.raises(ResultsError, match="damaged in line 1"):
        measure(tmp_path, "fp32")


def test_a_plan_that_fails_does_not_take_the_others_along(tmp_path):
    comparison = measure(tmp_path, "fp32", "refuses", "breaks", "dies", "int4")
    assert [m.plan for m in comparison.measurements] == ["fp32", "int4"]
    assert comparison.failures["refuses"] == "this scheme needs a GPU"
    assert "RuntimeError: a bug" in comparison.failures["breaks"]
    assert "ended with code 3" in comparison.failures["dies"]
    assert "Traceback" in (tmp_path / "plans" / "breaks.log").read_text()
    assert "refuses could not be measured" in (tmp_path / "report.html").read_text()
    assert Comparison.load(tmp_path).failures == comparison.failures


def test_nothing_measured_is_an_error(tmp_path):
    with pytest.raises(LabError, match="this scheme needs a GPU"):
        measure(tmp_path, "refuses")


def test_what_libraries_print_does_not_disturb_the_events(tmp_path):
    run_worker(request_for(tmp_path), log=tmp_path / "log", progress=False, command=WORKER)
    assert "a library that prints" in (tmp_path / "log").read_text()


def test_a_process_that_cannot_start_is_an_error(tmp_path):
    with pytest.raises(WorkerFailedError, match="ended with code 1"):
        run_worker(
            request_for(tmp_path), log=tmp_path / "log", command=[sys.executable, "-c", "raise SystemExit(1)"]
        )


SCRIPT = textwrap.dedent(
    """
    import sys
    sys.path[:0] = {paths!r}
    from test_compare import measure
    from labkit.measure.compare import Interrupted
    try:
        measure({folder!r}, "fp32", "int8")
    except Interrupted as interruption:
        print(interruption)
        sys.exit(130)
    """
)


def test_ctrl_c_keeps_what_is_measured_and_ends_the_process(tmp_path):
    tests = Path(__file__).parents[1]
    script = SCRIPT.format(
        paths=[str(tests), str(tests / "measure"), str(tests.parent)], folder=str(tmp_path)
    )
    started = subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, "FAKE_PAUSE_S": "0.5"},
        stdout=subprocess.PIPE,
        text=True,
    )
    partial = tmp_path / "plans" / "int8.partial.jsonl"
    deadline = time.monotonic() + 30
    while not (
        partial.exists() and partial.read_text().count('"kind": "record"') >= 4
    ):  # a batch, written whole
        assert time.monotonic() < deadline, "the second plan never began"
        time.sleep(0.02)
    started.send_signal(signal.SIGINT)
    output, _ = started.communicate(timeout=30)
    assert started.returncode == 130
    assert "1 of 2 plans are finished" in output
    assert [m.plan for m in Comparison.load(tmp_path).measurements] == ["fp32"]
    kept = [json.loads(line) for line in partial.read_text().splitlines()]
    answers = [entry for entry in kept if entry["kind"] == "record"]
    assert 4 <= len(answers) < 10
    with pytest.raises(ProcessLookupError):
        os.kill(next(entry["cost"] for entry in kept if entry["kind"] == "cost")["environment"]["pid"], 0)

    continued = measure(tmp_path, "fp32", "int8")
    assert [m.items for m in continued.measurements] == [10, 10]
    assert continued.measurements[1].samples["items"][: len(answers)] == [
        entry["record"] for entry in answers
    ]


def test_the_interruption_is_a_keyboard_interrupt():
    assert issubclass(Interrupted, KeyboardInterrupt)


def test_a_full_disk_at_the_report_keeps_what_was_measured(tmp_path, monkeypatch):
    save = Comparison.save
    monkeypatch.setattr(Comparison, "save", full_disk)
    with pytest.raises(OSError, match="No space left on device: 1 finished measurements are kept") as caught:
        measure(tmp_path, "fp32", "int4")
    assert caught.value.filename == str(tmp_path)
    monkeypatch.setattr(Comparison, "save", save)
    (made := tmp_path / "plans" / "fp32.json").touch()
    before = made.read_bytes()
    assert [m.plan for m in measure(tmp_path, "fp32", "int4").measurements] == ["fp32", "int4"]
    assert made.read_bytes() == before  # not measured again: its samples would differ in time and process


def full_disk(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
