"""Charts show the numbers they are given, with intervals, in one colour a plan, readable on any page."""

import pytest
from compare_fakes import measurements

from labkit.common.errors import LabError
from labkit.results.charts import comparison, marks


@pytest.fixture
def rows():
    return measurements("fp32", "int8", "int4")


@pytest.mark.parametrize("kind", comparison.KINDS)
def test_every_chart_is_transparent_with_titled_axes(rows, kind):
    figure = comparison.figure(rows, kind)
    assert figure.layout.paper_bgcolor == figure.layout.plot_bgcolor == "rgba(0,0,0,0)"
    axes = [axis for axis in figure.select_xaxes() if axis.title.text]
    assert axes, "no axis says what it shows"


def test_an_unknown_chart_or_no_rows_are_refused(rows):
    with pytest.raises(LabError, match=r"known are overview, bytes"):
        comparison.figure(rows, "pie")
    with pytest.raises(LabError, match="nothing to draw"):
        comparison.figure([])


def test_bars_of_bytes_add_up_to_the_weights(rows):
    figure = comparison.figure(rows, "bytes")
    for index, m in enumerate(rows):
        assert sum(bar.x[index] for bar in figure.data) == pytest.approx(m.weights_bytes / 1e6)
    assert "−82 %" in {text.text.split("  ")[-1] for text in figure.layout.annotations}


def test_accuracy_has_its_interval_and_a_panel_a_split(rows):
    figure = comparison.figure(rows, "accuracy")
    titles = [text.text for text in figure.layout.annotations]
    assert titles == ["all items", "typed", "spoken", "hard"]
    point = next(trace for trace in figure.data if trace.name == "int4" and trace.xaxis == "x")
    int4 = rows[2]
    assert point.y[0] == pytest.approx(int4.click_accuracy * 100)
    assert point.y[0] + point.error_y.array[0] == pytest.approx(int4.click_accuracy_high * 100)
    assert point.y[0] - point.error_y.arrayminus[0] == pytest.approx(int4.click_accuracy_low * 100)


def test_times_show_medians_quartiles_and_raw_samples(rows):
    bars = comparison.figure(rows, "latency").data[0]
    assert list(bars.x) == pytest.approx([200.0] * 3)
    assert bars.error_x.array[0] == pytest.approx(75.0)
    assert "2 samples: 0.2, 0.3" in bars.customdata[0]


def test_paired_differences_leave_out_the_reference(rows):
    figure = comparison.figure(rows, "paired")
    steps = [trace for trace in figure.data if trace.xaxis == "x2"]
    assert [trace.y[0] for trace in steps] == ["int8", "int4"]
    assert steps[1].x[0] == pytest.approx(-30.0)


def test_drift_has_the_sign_of_the_error(rows):
    figure = comparison.figure(rows, "drift")
    assert next(t for t in figure.data if t.name == "int4").x[0] == pytest.approx(rows[2].bias_x * 100)
    assert rows[2].bias_x > 0
    assert figure.layout.yaxis.autorange == "reversed"  # down is down, as on the screen


def test_a_plan_has_one_colour_everywhere(rows):
    for kind in ("accuracy", "drift", "paired"):
        colours = {
            t.marker.color
            for t in comparison.figure(rows, kind).data
            if "int4" in (t.name, (t.y or [None])[0])
        }
        assert colours == {marks.plan_colour("int4")}
    bars = comparison.figure(rows, "latency").data[0]
    assert bars.marker.color[2] == marks.plan_colour("int4")


def test_unknown_plans_keep_their_colour():
    assert marks.plan_colour("my-plan") == marks.plan_colour("my-plan")
    assert marks.plan_colour("my-plan") in marks.OTHER_COLOURS


@pytest.mark.parametrize("colour", [*marks.PLAN_COLOURS.values(), *marks.OTHER_COLOURS, marks.TEXT])
def test_marks_stand_out_on_white_and_on_dark(colour):
    def luminance(code):
        channels = [int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    def contrast(a, b):
        light, dark = sorted((luminance(a), luminance(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    assert contrast(colour, "#FFFFFF") >= 2.0
    assert contrast(colour, "#15181C") >= 3.0


def test_measurements_without_numbers_can_be_drawn():
    from labkit.results.measurement import Measurement

    bare = [
        Measurement(model="m", plan="fp32", device="cpu"),
        Measurement(model="m", plan="int4", device="cpu"),
    ]
    for kind in comparison.KINDS:
        comparison.figure(bare, kind)
