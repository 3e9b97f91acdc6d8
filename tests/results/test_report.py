"""The report says what the numbers say, stands alone in one file, and shows foreign text as text."""

import re

import pytest
from compare_fakes import measurements

from labkit.common.formats import (
    format_bytes,
    format_change,
    format_difference,
    format_points,
    format_rate,
    format_seconds,
)
from labkit.common.machine import environment
from labkit.results import tables
from labkit.results.measurement import Measurement
from labkit.results.report import report_html


@pytest.fixture
def rows():
    return measurements("fp32", "int8", "int4")


def visible(page):
    """The page's own text: without scripts, styles and tags."""
    page = re.sub(r"<(script|style)\b.*?</\1>", " ", page, flags=re.S)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_conclusions_come_first(rows):
    text = visible(report_html(environment(), rows))
    assert text.index("int4 is the smallest") < text.index("Cost") < text.index("Accuracy against bytes")


def test_the_report_needs_no_network(rows):
    page = report_html(environment(), rows)
    own = page.replace(re.search(r"<script>.*?</script></head>", page, re.S).group(), "")
    assert "Plotly.newPlot" in own
    assert not re.search(r"(src|href)\s*=\s*['\"]?(https?:)?//", own)
    assert "cdn" not in own.lower()


def test_foreign_text_is_escaped(rows):
    rows[1].plan = "<script>alert(1)</script>"
    where = {**environment(), "failures": {"<b>": "<img src=x onerror=alert(1)>"}}
    page = report_html(where, rows)
    body = re.sub(r"<div id=\"chart.*?</script>|Plotly\.newPlot.*?</script>", "", page, flags=re.S)
    assert "<img src=x" not in page
    assert "<script>alert(1)" not in body.partition("<body>")[2].partition("<h2>")[0]


def test_claims_stand_beside_what_was_measured(rows):
    headers, cost = tables.cost_table(rows)
    assert cost[-1][0] == tables.ARTICLE_ROW
    assert (cost[-1][headers.index("vs fp32")], cost[-1][-1]) == ("−62 %", "−40 %")
    assert (cost[2][headers.index("vs fp32")], cost[2][-1]) == ("−82 %", "+25 %")
    _, quality = tables.quality_table(rows)
    assert quality[-1][-1] == "loss < 3 %"
    assert quality[2][-1].startswith("−30.0 [")


def test_conclusions_call_measurable_only_what_the_interval_shows(rows):
    said = " ".join(tables.conclusions(rows))
    assert "Measurably" not in said  # three of ten items are too few to tell
    assert "No difference to fp32 that 10 items could show: int8 and int4" in said
    rows[2].paired |= {"step_success_rate_low": -0.4, "step_success_rate_high": -0.2}
    said = " ".join(tables.conclusions(rows))
    assert "Measurably fewer right steps than fp32 on the same items: int4 (−30.0 points)" in said
    assert "at least 62 % fewer bytes: int8 and int4" in said
    assert "less than 3 points lost (estimate): int8" in said
    assert "all three: no plan" in said


def test_a_reference_that_fails_is_pointed_out(rows):
    assert "losses say little" not in " ".join(tables.conclusions(rows))
    rows[0].step_success_rate = 0.2
    assert "fp32 itself gets 20.0 % of the steps right" in " ".join(tables.conclusions(rows))


def test_a_comparison_without_fp32_says_so():
    rows = [
        Measurement(model="m", plan="bf16", device="cpu", weights_bytes=200),
        Measurement(model="m", plan="int4", device="cpu", weights_bytes=50),
    ]
    assert tables.reference_of(rows).plan == "bf16"
    assert tables.comparison_rows(rows)[1]["weights_change"] == -0.75
    said = " ".join(tables.conclusions(rows))
    assert "all comparisons are with bf16" in said
    assert "claims" not in said


def test_the_best_reference_is_taken():
    rows = [Measurement(model="m", plan=plan, device="cpu") for plan in ("int4", "fp16", "bf16", "fp32")]
    assert tables.reference_of(rows).plan == "fp32"
    assert tables.reference_of(rows[:3]).plan == "bf16"
    assert tables.reference_of(rows[:2]).plan == "fp16"
    assert tables.reference_of(rows[:1]) is None


def test_memory_of_the_cpu_is_never_called_gpu_memory(rows):
    assert "Peak RSS" in tables.cost_table(rows)[0]
    for row in rows:
        row.peak_memory_kind = "GPU peak allocated"
    assert "Peak GPU" in tables.cost_table(rows)[0]


def test_numbers_are_written_as_people_read_them():
    assert [format_bytes(v) for v in (None, 12, 98_300_000, 41.2e9, 130e6)] == [
        "–",
        "12 B",
        "98.3 MB",
        "41.2 GB",
        "130 MB",
    ]
    assert [format_seconds(v) for v in (None, 0.0123, 0.34, 1.25, 140.0)] == [
        "–",
        "12.3 ms",
        "340 ms",
        "1.25 s",
        "140 s",
    ]
    assert [format_change(v) for v in (None, -0.623, 0.0, 0.25, -0.001)] == [
        "–",
        "−62 %",
        "±0 %",
        "+25 %",
        "±0 %",
    ]
    assert [format_points(v) for v in (None, -0.025, 0.0, 0.01)] == [
        "–",
        "−2.5 points",
        "±0.0 points",
        "+1.0 points",
    ]
    assert format_rate(0.975, 0.943, 0.9891) == "97.5 % [94.3, 98.9]"
    assert format_difference(-0.025, -0.046, 0.004) == "−2.5 [−4.6, +0.4]"
