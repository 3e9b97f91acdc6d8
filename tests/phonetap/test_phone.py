"""The simulated phone does what it is told, and the loop drives it: by hand, and through a real service."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from service_tools import running

import labkit
from labkit import phonetap
from labkit.client import Client
from labkit.common.actions import Action, format_action
from labkit.common.errors import LabError
from labkit.phonetap import Phone, Place
from labkit.phonetap.items import tap_action


def tapped(one, label):
    return one.do(tap_action(one.screen.find(label), one.size))


def first(one, role):
    return next(e.label for e in one.screen.elements if e.role == role and e.kind == "text")


@pytest.fixture
def home():
    """A phone that has the settings on its home screen."""
    return next(p for p in map(Phone, range(50)) if any(e.label == "设置" for e in p.screen.elements))


def test_apps_open_rows_lead_on_and_back_goes_back(home):
    started = home.picture().tobytes()
    assert tapped(home, "设置") == "opened 设置"
    assert home.place == Place("settings", ("设置",))
    row = first(home, "row")
    listed = home.picture().tobytes()
    assert tapped(home, row) == f"opened {row}"
    assert home.place == Place("detail", ("设置", row))
    assert home.do(Action("Back")) == "went back"
    assert home.picture().tobytes() == listed != started
    assert home.do(Action("Home")) == "went home"
    assert home.picture().tobytes() == started
    assert home.do(Action("Back")) == "nothing to go back to"


def test_lists_scroll_and_scroll_back(home):
    tapped(home, "设置")
    top = home.picture().tobytes()
    up = Action("Swipe", {"start": (500, 800), "end": (500, 300)})
    down = Action("Swipe", {"start": (500, 300), "end": (500, 800)})
    assert home.do(down) == "swiped, nothing moved"
    assert home.do(up) == "scrolled down"
    assert home.picture().tobytes() != top
    assert home.do(down) == "scrolled up"
    assert home.picture().tobytes() == top


def test_text_is_seen_in_the_field(home):
    assert home.do(Action("Type", {"text": "x"})) == "typed, but there is no field"
    home.do(Action("Launch", {"app": "浏览器"}))
    assert home.place.kind == "search"
    empty = home.picture().tobytes()
    assert home.do(Action("Type", {"text": "天气"})) == "typed 天气"
    assert home.place.typed == "天气"
    assert home.picture().tobytes() != empty
    assert home.picture().size == home.screen.image.size


def test_what_is_not_known_changes_nothing(home):
    place = home.place
    for action in (Action("Wait", {"duration": "1"}), Action("Note"), Action("finish", {"message": "x"})):
        home.do(action)
        assert home.place == place
    assert home.do(Action("Tap", {"element": (0, 999)})).startswith("tapped")
    assert home.place == place


def test_tasks_are_the_same_again_and_their_actions_do_them():
    made = phonetap.tasks(24)
    assert made == phonetap.tasks(24)
    assert {task.lang for task in made} == {"zh", "en"}
    assert {len(task.steps) for task in made} == {2, 3, 4}
    assert {step.action.name for task in made for step in task.steps} >= {"Tap", "Back", "Home", "Type"}
    for task in made:
        one = task.phone()
        for step in task.steps:
            one.do(step.action)
            assert one.place == step.place
    assert made != phonetap.tasks(24, seed=1)
    with pytest.raises(LabError, match="count"):
        phonetap.tasks(0)
    with pytest.raises(LabError, match="language"):
        phonetap.tasks(1, lang="fr")


class Oracle:
    """Answers right, up to a number of answers."""

    def __init__(self, task, right=99):
        self.left, self.right, self.asked = list(task.steps), right, []

    def ask(self, text, **options):
        self.asked.append((text, options))
        if len(self.asked) > self.right or not self.left:
            return SimpleNamespace(text='finish(message="done")', reasoning="")
        return SimpleNamespace(text=format_action(self.left.pop(0).action), reasoning="so")


def test_a_guided_run_is_done_when_every_step_is():
    [task] = phonetap.tasks(1, seed=3)
    seen = []
    done = phonetap.run(Oracle(task), task, on_turn=seen.append)
    assert done.done
    assert done.steps_done == len(task.steps) == len(done.turns) == len(seen)
    assert [turn.instruction for turn in done.turns] == [step.instruction for step in task.steps]
    failed = phonetap.run(Oracle(task, right=1), task)
    assert not failed.done
    assert (failed.steps_done, len(failed.turns)) == (1, 2)


def test_a_run_by_itself_has_the_goal_its_history_and_ends_with_finish():
    [task] = phonetap.tasks(1, seed=3)
    oracle = Oracle(task)
    done = phonetap.run(oracle, task, guided=False)
    assert done.done
    assert oracle.asked[0][0] == task.goal
    assert len(oracle.asked) == len(task.steps) + 1
    history = oracle.asked[-1][1]["messages"]
    assert [message["role"] for message in history] == ["user", "assistant"] * len(task.steps)
    assert not phonetap.run(Oracle(task, right=0), task, guided=False).done


def test_the_score_counts_tasks_and_steps():
    made = phonetap.tasks(3, seed=5)
    oracles = iter([Oracle(made[0]), Oracle(made[1], right=1), Oracle(made[2])])
    current = {}

    class Many:
        def ask(self, text, image=None, **options):
            owner = next((t for t in made if text in [s.instruction for s in t.steps]), None)
            if owner not in current:
                current[owner] = next(oracles)
            return current[owner].ask(text)

    score = phonetap.evaluate(Many(), made, progress=False)
    assert score.success == pytest.approx(2 / 3)
    assert score.interval[0] < 2 / 3 < score.interval[1]
    total = sum(len(task.steps) for task in made)
    assert score.steps == pytest.approx((total - len(made[1].steps) + 1) / total)


@pytest.mark.slow
@pytest.mark.skipif(labkit.get_spec("pocket").availability() != "here", reason="no pocket model")
def test_the_pocket_model_does_tasks_through_the_service():
    with (
        running(labkit.load("pocket", "bf16", "cpu", progress=False)) as service,
        Client(f"{service.url}/v1") as client,
    ):
        score = phonetap.evaluate(client, phonetap.tasks(6), progress=False)
    assert all(turn.action is not None for run in score.runs for turn in run.turns)
    assert score.steps > 0.3


def test_the_phone_loads_no_torch():
    code = "import sys, labkit.phonetap; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
