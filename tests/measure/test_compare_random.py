"""`labkit compare --weights random`: what plans cost, and that every record, table, chart and report says so."""

import json

import pytest
import tiny_models

from labkit.cli.main import main
from labkit.common.errors import LabError
from labkit.measure.job import prepare
from labkit.models.spec import ModelSpec
from labkit.results import tables
from labkit.results.charts import comparison
from labkit.results.charts.svg import comparison_svg
from labkit.results.comparison import Comparison, describe


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A real comparison of two plans on a folder that has a configuration and nothing else."""
    config = tiny_models.glm4v_config().to_dict() | {"architectures": ["Glm4vForConditionalGeneration"]}
    folder = tmp_path_factory.mktemp("only-config")
    (folder / "config.json").write_text(json.dumps(config))
    output = folder / "results"
    given = ["--weights", "random", "--plans", "int4", "--output", str(output), "--threads", "1"]
    assert main(["compare", str(folder), *given]) == 0
    return output


def test_cost_is_measured_and_nothing_is_answered(made):
    found = Comparison.load(made).measurements
    assert [m.label for m in found] == ["fp32 (random weights)", "int4 (random weights)"]
    for m in found:
        assert m.weights == "random"
        assert m.weights_bytes == m.predicted_bytes > 0
        assert m.ttft_s > 0
        assert (m.items, m.click_accuracy, m.step_success_rate, m.samples["items"]) == (0, None, None, [])


def test_every_table_chart_and_report_says_random_weights(made, capsys):
    one = Comparison.load(made)
    shown = tables.shown_tables(one.measurements)
    assert list(shown) == ["Cost"]
    assert [row[0] for row in shown["Cost"][1][:2]] == [m.label for m in one.measurements]
    assert one.conclusions()[0] == tables.RANDOM_WEIGHTS
    assert not any("claims" in line or "right steps" in line for line in one.conclusions())
    assert "with random weights" in describe(one.settings)
    for kind in ("bytes", "latency", "overview"):
        assert "int4 (random weights)" in comparison.figure(one.measurements, kind).to_json()
    assert "random weights: cost only" in comparison_svg(one.measurements)
    page = (made / "report.html").read_text()
    body = page[page.index("<body>") :]
    assert "with random weights under 2 plans" in body
    assert body.count("(random weights)") >= 6
    assert "Step success" not in body


def test_a_finished_one_is_not_measured_again_and_another_kind_is_refused(made):
    given = ["compare", str(made.parent), "--plans", "int4", "--output", str(made), "--threads", "1"]
    before = (made / "results.json").stat().st_mtime_ns
    assert main([*given, "--weights", "random"]) == 0
    assert [m.plan for m in Comparison.load(made).measurements] == ["fp32", "int4"]
    assert (made / "results.json").stat().st_mtime_ns >= before
    assert main(given) == 2  # it has no weights


def test_the_registered_9b_needs_no_hub(monkeypatch):
    monkeypatch.setattr("labkit.models.hub._ask_for", lambda *_: pytest.fail("the hub was asked"))
    monkeypatch.setattr("labkit.loading.placement.free_bytes", lambda device: 10**12)
    monkeypatch.setattr(ModelSpec, "availability", lambda self: "on the hub")
    options = {"seed": None, "split": "typed", "device": "cpu", "threads": 1, "enable_thinking": False}
    job = prepare("autoglm-phone-9b", ["bf16", "int4"], 200, batch_size=1, weights="random", **options)
    assert job.model_source == "autoglm-phone-9b"
    assert job.settings["weights"] == job.request("int4", "x")["weights"] == "random"
    assert job.settings["items"] == 8
    for plan, message in (("gptq", "calibrates, which says nothing on random weights"), ("int5", "int5")):
        with pytest.raises(LabError, match=message):
            prepare("pocket", [plan], 8, batch_size=1, weights="random", **options)
    with pytest.raises(LabError, match="'zeros'; it is 'random'"):
        prepare("pocket", ["int4"], 8, batch_size=1, weights="zeros", **options)
