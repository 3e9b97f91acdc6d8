"""The compare widget runs a comparison beside the kernel, follows it, stops it so that it continues, and loads it."""

import json
import sys
import time
from pathlib import Path

import pytest

from labkit.cli.main import build_parser
from labkit.common.formats import format_bytes
from labkit.interactive.widgets import compare
from labkit.interactive.widgets.running import ComparisonRun, PlanProgress
from labkit.measure.anatomy import dissect
from labkit.models import get_spec
from labkit.plans.plan import QuantizationPlan
from labkit.results.measurement import Measurement

pytestmark = pytest.mark.skipif(
    get_spec("pocket").availability() != "here", reason="the pocket model is not in assets"
)


FAKES = (sys.executable, str(Path(__file__).parents[1] / "compare_fakes_cli.py"))


def until(condition, seconds=90):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def line(widget, plan):
    [found] = [one for one in widget.plans.children if one.children[0].description == plan]
    return found


def test_every_plan_is_offered_with_its_predicted_bytes():
    widget = compare(plans=["fp32", "int4"])
    assert widget.chosen == ["fp32", "int4"]
    for plan in ("fp32", "int8", "nf4"):
        assert format_bytes(dissect("pocket").under(plan).bytes) in line(widget, plan).children[1].value


def test_labels_have_the_help_of_the_command_line():
    widget = compare()
    assert widget.items.tooltip == "How many test items (200)"
    commands = next(a for a in build_parser()._actions if hasattr(a, "choices") and a.choices)
    helps = {a.dest: a.help for a in commands.choices["compare"]._actions}
    for name in ("items", "split", "device", "thinking", "output"):
        assert getattr(widget, name).tooltip.lower() == helps[name].lower()


def test_a_plan_that_cannot_be_is_offered_with_the_reason():
    wrong = QuantizationPlan.from_dict({"name": "wrong", "rules": [{"match": "nothing", "scheme": "int8"}]})
    widget = compare(plans=["fp32", wrong])
    box, told = line(widget, "wrong").children
    assert box.disabled
    assert "matches no" in told.value
    assert widget.chosen == ["fp32"]
    box, told = line(compare(plans=["fp32", "int44"]), "int44").children
    assert box.disabled
    assert "int44" in told.value


def test_settings_name_the_folder_until_one_is_given():
    widget = compare(items=20)
    assert widget.output.value == "results/pocket-20-all-auto"
    widget.split.value = "typed"
    assert widget.output.value == "results/pocket-20-typed-auto"
    widget.output.value = "results/mine"
    widget.items.value = 40
    assert widget.output.value == "results/mine"


def test_nothing_ticked_is_said():
    widget = compare(plans=[])
    widget.start_button.click()
    assert "tick at least one plan" in widget.status.value


def test_run_stop_continue_and_load(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_PAUSE_S", "1")
    mine = QuantizationPlan.from_dict({"name": "mine", "rules": [{"role": "decoder", "scheme": "int4"}]})
    widget = compare(plans=["bf16", mine], items=10, output=str(tmp_path / "run"))
    widget.command = FAKES
    widget.split.value = "typed"
    widget.start_button.click()
    assert (widget.start_button.disabled, widget.stop_button.disabled) == (True, False)
    until(lambda: "of 10 answers" in widget.progress.value)
    widget.stop_button.click()
    until(lambda: "Run continues" in widget.status.value and not widget.start_button.disabled)
    assert not widget.run.is_running
    widget.start_button.click()
    until(lambda: "finished" in widget.status.value and not widget.start_button.disabled)
    assert [m.plan for m in widget.comparison.measurements] == ["bf16", "mine"]
    assert widget.results.titles[:2] == ("Table", "Conclusions")
    assert widget.results.layout.display == "flex"

    other = compare(output=str(tmp_path / "run"))
    other.load_button.click()
    assert [m.items for m in other.comparison.measurements] == [10, 10]
    assert ">mine</th>" in other.results.children[0].value
    other.results.selected_index = other.results.titles.index("Bytes")
    [chart] = other.results.children[other.results.selected_index].children
    assert set(chart.figure.data[0].y) == {"bf16", "mine"}
    other.items.value = 5
    other.start_button.click()
    until(lambda: "holds another comparison" in other.status.value and not other.start_button.disabled)


def test_loading_an_empty_folder_says_what_is_missing(tmp_path):
    widget = compare(output=str(tmp_path))
    widget.load_button.click()
    assert "no such file" in widget.status.value


def test_progress_is_read_from_the_folder(tmp_path):
    run = ComparisonRun("pocket", ["fp32", "int8", "int4", "my/own.yaml"], tmp_path, items=4)
    run.folder.check_writable()
    run.folder.save_finished(Measurement(model="pocket", plan="fp32", device="cpu"))
    run.folder.append_partial("int8", "plan", {})
    run.folder.append_partial("int4", "cost", {})
    for success in (True, False):
        run.folder.append_partial("int4", "record", {"id": "a", "success": success})
    with run.folder.partial_path("int4").open("a") as file:
        file.write(json.dumps({"kind": "record"})[:9])  # a line that is being written
    assert run.progress() == [
        PlanProgress("fp32", "finished", 4, 0),
        PlanProgress("int8", "measuring", 0, 0),
        PlanProgress("int4", "answering", 2, 1),
        PlanProgress("own", "waiting", 0, 0),
    ]
