"""The roofline's arithmetic and marks, small measurements of this machine, and the results that are shipped."""

import pytest

from labkit.common.errors import LabError, ResultsError
from labkit.measure import speed
from labkit.results import shipped
from labkit.results.charts import roofline


def test_intensity_is_operations_for_each_byte():
    assert roofline.intensity(1, 16) == 1.0
    assert roofline.intensity(16, 4) == 64.0
    with pytest.raises(LabError, match="at least one row"):
        roofline.intensity(0, 16)


def test_the_floor_is_what_must_be_read():
    assert roofline.floor_s(3.35e12, 3.35e12) == 1.0
    assert roofline.floor_s(1e9, 1e12, cache_bytes=1e9) == 2e-3
    with pytest.raises(LabError, match="positive"):
        roofline.floor_s(1, 0)


def test_no_mark_is_above_the_roof_and_fewer_bits_stand_to_the_right():
    chart = roofline.chart(
        10e9, 100e9, {"bf16": 16, "int4": 4.5}, rows=(1, 8, 64), measured={"int4": [(2.0, 1e9)]}
    )
    roof, wide, narrow, crosses = chart.data
    assert list(roof.y)[1:] == [100.0, 100.0]
    for mark in (wide, narrow):
        assert all(y <= min(100.0, x * 10) * 1.0001 for x, y in zip(mark.x, mark.y))
    assert all(right > left for left, right in zip(wide.x, narrow.x))
    assert (crosses.x[0], crosses.y[0]) == (2.0, 1.0)


def test_the_median_ignores_the_warm_up_and_one_slow_call():
    spent = iter([0, 9, 9, 18, 20, 21, 30, 31, 40, 41])  # two warm-ups of 9 s, then 1 s each
    clock = speed.time.perf_counter
    try:
        speed.time.perf_counter = lambda: next(spent)
        assert speed.median_s(lambda: None, repeats=3) == 1
    finally:
        speed.time.perf_counter = clock


def test_more_rows_take_longer_and_every_scheme_is_timed():
    found = speed.products(["bf16", "int8"], rows=(1, 512), size=(512, 512))
    assert set(found) == {"bf16", "int8"}
    for points in found.values():
        assert [rows for rows, _ in points] == [1, 512]
        assert points[1][1] > points[0][1] > 0


def test_this_machine_moves_bytes_and_multiplies():
    assert 1e8 < speed.bandwidth(size=2**22) < 1e13
    assert 1e8 < speed.flops(side=128) < 1e14


def test_shipped_results_can_be_loaded_and_those_of_gpus_are_of_gpus():
    assert "pocket-cpu" in shipped.names()
    assert shipped.load("pocket-cpu").measurements
    for comparison in shipped.on_gpus().values():
        assert any(m.device.startswith("cuda") for m in comparison.measurements)
    with pytest.raises(ResultsError, match="no such file"):
        shipped.load("nothing")
