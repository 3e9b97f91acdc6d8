"""The picture of a comparison: bars as long as their numbers, the same bytes for the same results."""

from xml.etree import ElementTree

import pytest

from labkit.cli.main import main
from labkit.common.errors import LabError
from labkit.results.charts.svg import comparison_svg
from labkit.results.comparison import Comparison
from labkit.results.measurement import Measurement

SVG = "{http://www.w3.org/2000/svg}"


def row(plan, size, seconds, rate):
    return Measurement(
        model="m",
        plan=plan,
        device="cpu",
        weights_bytes=size,
        answer_s=seconds,
        step_success_rate=rate,
        step_success_rate_low=None if rate is None else rate - 0.1,
        step_success_rate_high=None if rate is None else rate + 0.05,
    )


ROWS = [row("fp32", 4_000_000, 0.5, 0.9), row("int4", 1_000_000, 0.25, 0.7)]


def drawn(measurements, caption=""):
    return ElementTree.fromstring(comparison_svg(measurements, caption))


def test_bars_are_in_proportion_and_written_beside():
    picture = drawn(ROWS)
    lengths = [float(bar.get("width")) for bar in picture.iter(f"{SVG}rect")]
    assert lengths[1] / lengths[0] == pytest.approx(0.25, abs=0.01)
    assert lengths[3] / lengths[2] == pytest.approx(0.5, abs=0.01)
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    for written in ("4.00 MB", "1.00 MB  −75 %", "500 ms", "250 ms  −50 %", "90.0 %", "70.0 %", "60 %"):
        assert written in texts


def test_intervals_contain_their_points():
    picture = drawn(ROWS)
    ends = [
        (float(line.get("x1")), float(line.get("x2")))
        for line in picture.iter(f"{SVG}line")
        if line.get("stroke-width")
    ]
    points = [float(point.get("cx")) for point in picture.iter(f"{SVG}circle")]
    assert all(low < point < high for (low, high), point in zip(ends, points))
    assert points[0] > points[1]


def test_what_is_missing_is_said_and_names_are_escaped():
    picture = drawn([*ROWS, row("a<b", None, None, None)], "1 < 2")
    texts = [text.text for text in picture.iter(f"{SVG}text")]
    assert texts.count("not measured") == 3
    assert "a<b" in texts
    assert texts[-1] == "1 < 2"


def test_nothing_to_draw_is_an_error():
    with pytest.raises(LabError, match="nothing to draw"):
        comparison_svg([])


def test_the_command_draws_results(tmp_path, capsys):
    Comparison({}, ROWS).save(tmp_path / "results.json")
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "out.svg")]) == 0
    assert (tmp_path / "out.svg").read_text() == comparison_svg(ROWS)
    assert main(["plot", str(tmp_path), "--output", str(tmp_path / "out.png")]) == 2
    assert main(["plot", str(tmp_path / "none"), "--output", str(tmp_path / "out.svg")]) == 2
    assert "no such file" in capsys.readouterr().err
