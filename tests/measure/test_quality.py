"""Answers become records, records become rates: only from what was answered, resumable, with intervals."""

import pytest
from compare_fakes import FakeEngine, fake_items, fake_score

from labkit.measure.quality import evaluate
from labkit.results.summary import summarize, summarize_groups, summarize_paired


def run(engine, count=10, **options):
    return evaluate(engine, fake_items(count=count), score=fake_score, **options)


def test_records_hold_the_answer_and_its_score_in_the_items_order():
    records = run(FakeEngine(hits=6), batch_size=4)
    assert [r["id"] for r in records] == [item.id for item in fake_items()]
    assert records[0] | {"latency_s": 0} == {
        "id": "typed-0",
        "split": "typed",
        "lang": "en",
        "task": None,
        "target_kind": "text",
        "speaker": None,
        "instruction": "open number 0",
        "expected": 'do(action="Tap", element=[100,200])',
        "answer": '<answer>do(action="Tap", element=[100,200])</answer>',
        "completion_tokens": 9,
        "finish_reason": "stop",
        "latency_s": 0,
        "parsed": True,
        "click": True,
        "success": True,
        "distance": 0.0,
        "dx": 0.0,
        "dy": 0.0,
    }
    assert records[7]["success"] is False
    assert records[7]["dx"] == pytest.approx(0.05)


def test_items_are_answered_in_batches():
    engine = FakeEngine(hits=10)
    run(engine, batch_size=4)
    assert engine.batches == [4, 4, 2]


def test_an_engine_without_batches_is_asked_one_by_one():
    whole = FakeEngine(hits=10)

    class OneByOne:
        generate = staticmethod(whole.generate)

    assert run(OneByOne(), batch_size=4) is not None
    assert whole.batches == [1] * 10


def test_what_is_done_is_not_asked_again():
    first = run(FakeEngine(hits=10))[:7]
    engine, seen = FakeEngine(hits=0), []
    records = run(engine, done=first, on_record=seen.append)
    assert sum(engine.batches) == 3
    assert [r["id"] for r in seen] == [r["id"] for r in records[7:]]
    assert records[:7] == first


def test_items_that_share_an_id_are_refused():
    with pytest.raises(ValueError, match="different ids"):
        evaluate(FakeEngine(1), fake_items(count=2) + fake_items(count=1), score=fake_score)


def test_rates_are_over_the_items_they_concern():
    summary = summarize(run(FakeEngine(hits=6)))
    # Items 4 and 9 go back (no point); 6, 7 and 8 miss by 0.05.
    assert (summary["items"], summary["clicks"]) == (10, 8)
    assert summary["click_accuracy"] == 5 / 8
    assert summary["step_success_rate"] == 7 / 10
    assert summary["parse_rate"] == 1.0
    assert summary["click_accuracy_low"] < 5 / 8 < summary["click_accuracy_high"]
    assert summary["mean_distance"] == pytest.approx(3 * 0.05 / 8)
    assert summary["bias_x"] == pytest.approx(3 * 0.05 / 8)
    assert summary["bias_y"] == 0.0


def test_nothing_is_claimed_of_no_items():
    summary = summarize([])
    assert summary["click_accuracy"] is None
    assert summary["step_success_rate_low"] is None


def test_groups_hold_their_own_items():
    groups = summarize_groups(run(FakeEngine(hits=6)))
    assert list(groups) == ["split=hard", "split=spoken", "split=typed", "lang=en", "target_kind=text"]
    assert groups["lang=en"] == summarize(run(FakeEngine(hits=6)))
    assert sum(groups[f"split={name}"]["items"] for name in ("typed", "spoken", "hard")) == 10
    assert groups["target_kind=text"]["items"] == 8


def test_paired_differences_are_over_the_same_items():
    reference, worse = run(FakeEngine(hits=10)), run(FakeEngine(hits=6))
    paired = summarize_paired(worse[2:], reference)
    assert paired["items"] == 8
    assert paired["step_success_rate"] == pytest.approx(-3 / 8)
    assert paired["click_accuracy"] == pytest.approx(-3 / 6)
    assert paired["step_success_rate_low"] < -3 / 8 < paired["step_success_rate_high"]
    assert set(paired["splits"]) == {"typed", "spoken", "hard"}
    assert summarize_paired(reference, worse)["step_success_rate"] == pytest.approx(3 / 10)
