"""Traffic from many connections: what is taken down of each request; and a soak that notices what goes wrong."""

import os
from itertools import pairwise

import pytest
import soak_service
from fake_service import FakeService, serving
from traffic import Request, quantile, send

TAP = '<answer>do(action="Tap", element=[500,500])</answer>'


def asked(name, text="open it", **more):
    leave = more.pop("leave_after", None)
    return Request(name, {"messages": [{"role": "user", "content": text}], **more}, leave)


def test_each_request_leaves_a_sample_of_what_became_of_it():
    with serving(pause_s=0.05) as service:
        requests = [
            asked("whole", enable_thinking=True),
            asked("refused", "refuse"),
            asked("left", leave_after=1),
        ]
        seen = []
        samples = send(service.base_url, requests, 3, model="fake", on_sample=seen.append)
    assert seen == samples
    by_name = {one.name: one for one in samples}
    whole = by_name["whole"]
    assert whole.text == 'I heard: open it. Tap "it".' + TAP
    assert whole.is_whole
    assert 0.05 <= whole.ttft_s <= whole.total_s
    assert (by_name["refused"].status, by_name["refused"].error) == (400, "this picture is too large")
    assert by_name["refused"].ttft_s is None
    left = by_name["left"]
    assert left.left
    assert not left.is_whole
    assert left.text == TAP[: len(TAP) // 2]
    [dead] = send(service.base_url, requests[:1], 1, model="fake")
    assert (dead.status, dead.is_whole) == (None, False)


def test_connections_share_the_requests_and_time_ends_them():
    with serving(pause_s=0.3) as service:
        at_once = send(service.base_url, [asked("x")] * 8, 8, model="fake")
        assert max(one.begun_s for one in at_once) < min(one.begun_s + one.total_s for one in at_once)
        alone = send(service.base_url, [asked("x")] * 3, 1, model="fake")
        assert all(later.begun_s >= one.begun_s + one.total_s for one, later in pairwise(alone))
        endless = send(service.base_url, iter(lambda: asked("x"), None), 2, model="fake", seconds=1.2)
    assert (len(at_once), len(alone)) == (8, 3)
    assert len(endless) >= 2
    assert all(one.begun_s <= 1.3 for one in endless)


def test_a_quantile_is_one_of_the_values():
    assert [quantile([4, 1, 3, 2], share) for share in (0, 0.25, 0.5, 0.51, 0.95, 1)] == [1, 1, 2, 3, 4, 4]
    assert quantile([], 0.5) is None


class Watched(FakeService):
    """Stands for a started service; answers otherwise from the N-th request on."""

    pid, running, changes_at = os.getpid(), 0, None

    @property
    def answer(self):
        changed = self.changes_at is not None and len(self.asked) > self.changes_at
        return TAP.replace("500", "7") if changed else self._answer

    @answer.setter
    def answer(self, value):
        self._answer = value

    def facts(self):
        return {"names": ["fake"], "running": self.running, "waiting": 0}


@pytest.mark.parametrize(("changes_at", "wrong", "right_afterwards"), [(None, 0, True), (4, True, False)])
def test_a_soak_tells_right_answers_from_wrong_ones(monkeypatch, changes_at, wrong, right_afterwards):
    monkeypatch.setattr("fake_service.FakeService", Watched)
    monkeypatch.setattr(Watched, "changes_at", changes_at)
    monkeypatch.setattr(Watched, "running", 1 if wrong else 0)
    monkeypatch.setattr(soak_service, "IDLE_S", 0.1)
    requests = [asked("typed"), asked("left", leave_after=1), asked("wrong", "refuse")]
    with serving(pause_s=0.02) as service:
        report = soak_service.soak(service, requests, 2, 2.5)
    assert report["errors"] == 0
    assert bool(report["wrong_answers"]) == bool(wrong)
    assert report["right_afterwards"] == right_afterwards
    assert report["left_over"] == {"running": int(bool(wrong)), "waiting": 0}
    assert sum(report["verdicts"].values()) == report["requests"] == sum(report["by_kind"].values())
    assert {"left", "refused"} < set(report["verdicts"])
    assert report["memory"]["start_bytes"] > 1e6


def test_memory_that_grows_is_told_by_the_request():
    grows = [(second, 100_000_000 + 5000 * second) for second in range(100)]
    told = soak_service.memory_of(grows, requests_per_s=10)
    assert told["growth_bytes_per_request"] == pytest.approx(500)
    assert (told["warm_bytes"], told["end_bytes"]) == (100_050_000, 100_495_000)


def test_a_soak_asks_every_kind_of_thing():
    names = {one.name for one in soak_service.requests_of(1)}
    assert names == {"typed", "spoken", "hard", "thinking", "sampled", "action", "text", "left", "wrong"}
