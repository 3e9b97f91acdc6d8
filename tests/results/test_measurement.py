"""Measurements survive the disk, damage is named, and intervals have their textbook values."""

import json
import random

import pytest

from labkit.common.errors import ResultsError
from labkit.common.files import atomic_path
from labkit.common.intervals import mean_interval, paired_difference, wilson_interval
from labkit.common.machine import environment
from labkit.results.comparison import Comparison
from labkit.results.measurement import Measurement


def test_wilson_interval_has_the_textbook_values():
    assert wilson_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson_interval(200, 200) == pytest.approx((0.9812, 1.0), abs=1e-4)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_wilson_interval_refuses_more_successes_than_trials():
    with pytest.raises(ValueError, match="0…3"):
        wilson_interval(4, 3)


def test_mean_interval():
    assert mean_interval([]) == (None, None, None)
    assert mean_interval([2.0]) == (2.0, None, None)
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 1.96 / 3**0.5, 2 + 1.96 / 3**0.5), abs=1e-4)


def test_paired_difference_counts_only_what_changed():
    reference = [True] * 90 + [False] * 10
    worse = [True] * 80 + [False] * 20
    mean, low, high = paired_difference(worse, reference)
    assert mean == pytest.approx(-0.1)
    assert low < -0.1 < high < 0
    assert paired_difference(reference, worse) == pytest.approx((0.1, -high, -low))


def test_paired_difference_of_equal_answers_is_zero_but_not_certain():
    mean, low, high = paired_difference([True] * 200, [True] * 200)
    assert mean == 0.0
    assert -0.02 < low < 0 < high < 0.02


def test_paired_interval_covers_the_truth_about_95_times_in_100():
    draw = random.Random(3)
    covered = 0
    for _ in range(400):
        pairs = [
            draw.choices([(1, 1), (1, 0), (0, 1), (0, 0)], [0.85, 0.03, 0.08, 0.04])[0] for _ in range(200)
        ]
        _, low, high = paired_difference([bool(a) for a, _ in pairs], [bool(b) for _, b in pairs])
        covered += low <= -0.05 <= high
    assert 0.92 <= covered / 400 <= 0.985


def test_paired_numbers_use_their_differences():
    mean, low, high = paired_difference([0.5, 0.7, 0.6], [0.4, 0.6, 0.5])
    assert mean == pytest.approx(0.1)
    assert (low, high) == pytest.approx((0.1, 0.1))
    with pytest.raises(ValueError, match="2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_results_survive_the_disk(tmp_path):
    rows = [
        Measurement(
            model="m", plan="int4", device="cpu", weights_bytes=7, click_accuracy=0.5, splits={"a": {"b": 1}}
        ),
        Measurement(model="m", plan="fp32", device="cpu", samples={"ttft_s": [0.1], "items": [{"id": "x"}]}),
    ]
    Comparison(environment(), rows).save(tmp_path / "deep" / "results.json")
    loaded = Comparison.load(tmp_path / "deep")
    assert loaded.measurements == rows
    assert loaded.environment["packages"]["torch"].startswith("2.")


def test_results_have_the_promised_shape(tmp_path):
    Comparison({"cpu": "x"}, [Measurement(model="m", plan="p", device="cpu")]).save(tmp_path / "r.json")
    body = json.loads((tmp_path / "r.json").read_text())
    assert set(body) == {"environment", "measurements"}
    promised = "model plan device weights_bytes peak_memory_bytes load_s ttft_s decode_tokens_per_s items "
    promised += "click_accuracy click_accuracy_low click_accuracy_high step_success_rate parse_rate samples"
    assert set(promised.split()) <= set(body["measurements"][0])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"{", "damaged"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"[]", "'environment' is missing"),
        (b'{"environment": {}}', "'measurements' is missing"),
        (b'{"environment": {}, "measurements": [5]}', r"measurements\[0\]: expected an object"),
        (b'{"environment": {}, "measurements": [{"model": "m"}]}', "'plan' is missing"),
        (
            b'{"environment": {}, "measurements": [{"model": "m", "plan": "p", "device": "", "items": "3"}]}',
            "'items' must be a whole number",
        ),
        (
            b'{"environment": {}, "measurements": [{"model": "m", "plan": "p", "device": "", "click": 1}]}',
            "unknown field 'click'",
        ),
    ],
)
def test_damaged_results_are_named(tmp_path, content, reason):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ResultsError, match=reason) as raised:
        Comparison.load(tmp_path)
    assert str(path) in str(raised.value)


def test_missing_results_are_named(tmp_path):
    with pytest.raises(ResultsError, match="no such file"):
        Comparison.load(tmp_path / "nothing.json")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "kept.json"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    with atomic_path(path) as temporary:
        assert temporary.suffix == ".json"
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_not_a_number_is_never_written(tmp_path):
    row = Measurement(model="m", plan="p", device="cpu", ttft_s=float("nan"))
    with pytest.raises(ValueError, match="JSON"):
        Comparison({}, [row]).save(tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
