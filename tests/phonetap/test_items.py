"""PhoneTap's items: the same for a seed, never in training, with right answers that score as right."""

import math
import random

import pytest

from labkit import phonetap
from labkit.common.actions import Action, format_action
from labkit.common.errors import LabError
from labkit.phonetap import instructions, words
from labkit.phonetap.items import SPLITS, box_of


def answer(action: Action) -> str:
    return f"<answer>{format_action(action)}</answer>"


@pytest.fixture(scope="module", params=SPLITS)
def some(request):
    return phonetap.items(request.param, 60)


def test_the_same_arguments_give_the_same_items_and_screens():
    first, second = (phonetap.items("all", 9, seed=4) for _ in range(2))
    assert [item.id for item in first] == [item.id for item in second]
    assert [item.screen.sha256() for item in first] == [item.screen.sha256() for item in second]
    assert {item.id for item in first}.isdisjoint(item.id for item in phonetap.items("all", 9, seed=5))


def test_fewer_items_are_the_first_of_more():
    assert [i.id for i in phonetap.items("typed", 5)] == [i.id for i in phonetap.items("typed", 12)][:5]


def test_the_right_answer_scores_as_right_and_another_screens_answer_does_not(some):
    for item in some:
        assert phonetap.score(item, answer(item.action)).success
        if item.box is not None:
            score = phonetap.score(item, answer(item.action))
            assert score.click
            assert score.distance < 0.01
            outside = (999, 999) if item.box[0] < 500 and item.box[1] < 500 else (0, 0)
            missed = phonetap.score(item, answer(Action("Tap", {"element": outside})))
            assert not missed.click
            assert not missed.success
            assert missed.distance > 0.1


def test_the_instruction_names_its_target_or_says_what_it_is_for(some):
    for item in some:
        if item.box is None:
            continue
        target = item.target
        if item.task == "icon":
            said = words.ICONS[target][item.lang]
        elif item.task == "what":
            said = instructions.DESCRIPTIONS[item.lang][target]
        else:
            said = (target,)
        assert any(one in item.instruction for one in said), (item.instruction, target)


def test_targets_are_unique_on_their_screen(some):
    for item in some:
        labels = [element.label.lower() for element in item.screen.elements]
        assert len(labels) == len(set(labels))


def test_hard_screens_are_dense_small_and_have_lookalikes():
    hard, typed = phonetap.items("hard", 60), phonetap.items("typed", 60)
    count = lambda items: sum(len(i.screen.elements) for i in items) / len(items)  # noqa: E731
    assert count(hard) >= 22
    assert count(hard) > 1.6 * count(typed)
    assert sum(item.task == "what" for item in hard) >= 6
    alike = 0
    for item in hard:
        labels = {e.label for e in item.screen.elements}
        rng = random.Random(0)
        alike += bool(labels & set(words.lookalikes(rng, item.target, item.lang, "test")))
    assert alike >= 25


def test_hard_items_want_a_fine_aim_at_the_middle_and_others_take_the_whole_target():
    for item in phonetap.items("hard", 40):
        x0, y0, x1, y1 = item.box
        whole = box_of(item.screen.find(item.target), item.screen.size)
        assert x1 - x0 == pytest.approx(min(30, whole[2] - whole[0]))
        assert y1 - y0 == pytest.approx(min(6, whole[3] - whole[1]))
        assert (x0 + x1, y0 + y1) == pytest.approx((whole[0] + whole[2], whole[1] + whole[3]))
        beside = Action("Tap", {"element": (int(x0 + x1) // 2, math.ceil(y1) + 1)})
        assert not phonetap.score(item, answer(beside)).success
    for item in phonetap.items("typed", 40):
        if item.target_kind == "text":
            assert item.box == box_of(item.screen.find(item.target), item.screen.size)


def test_spoken_items_show_what_their_recording_asks_for():
    for item in phonetap.items("spoken", 30):
        kinds = [part["type"] for part in item.messages()[0]["content"]]
        assert kinds == ["image", "audio"]
        assert item.group in ("unseen_voice", "unseen_speaker")


def test_labels_and_phrases_of_the_test_are_not_those_of_training():
    rng = random.Random(1)
    trained = {instructions.tap(rng, "X", "en", "train").text.strip(".") for _ in range(20_000)}
    tested = {instructions.tap(rng, "X", "en", "test").text.strip(".") for _ in range(500)}
    assert len(trained) > 1_000
    assert trained.isdisjoint(tested)
    for kind, lang in words.COMPOUNDS:
        concepts = set(words.concepts(kind, lang))
        test_labels = set(words.sample_labels(rng, kind, lang, 20, "test")) - concepts
        assert all(words.part_of(label) == "test" for label in test_labels)


def test_fixed_requests_are_varied_in_training_and_never_say_what_is_held_out():
    rng = random.Random(1)

    def plain(text):
        return text.lower().strip(".。")

    for task in ("Back", "Home", "Wait", "up", "left"):
        for lang in words.LANGS:
            trained = {plain(instructions.fixed(rng, task, lang, "train").text) for _ in range(4_000)}
            tested = {plain(instructions.fixed(rng, task, lang, "test").text) for _ in range(60)}
            assert len(trained) > 60
            assert len(tested) == 2
            assert not trained & tested


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"split": "easy"}, "unknown split 'easy'; known: all, typed, spoken, hard"),
        ({"part": "train"}, "unknown part 'train'; known: test, calibration"),
        ({"count": 0}, "count must be a whole number of 1 or more"),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
    ],
)
def test_bad_requests_name_what_would_be_right(arguments, says):
    with pytest.raises(LabError, match=says):
        phonetap.items(**arguments)


def test_swipes_are_judged_by_direction_and_free_text_is_not_judged():
    swipe = next(i for i in phonetap.items("typed", 200) if i.action.name == "Swipe")
    (x0, y0), (x1, y1) = swipe.action.arguments["start"], swipe.action.arguments["end"]
    shorter = Action("Swipe", {"start": (x0, y0), "end": ((x0 + x1) // 2, (y0 + y1) // 2)})
    back = Action("Swipe", {"start": (x1, y1), "end": (x0, y0)})
    assert phonetap.score(swipe, answer(shorter)).success
    assert not phonetap.score(swipe, answer(back)).success
    talk = next(i for i in phonetap.items("typed", 200) if i.action.name == "finish")
    assert phonetap.score(talk, answer(Action("finish", {"message": "other words"}))).success
    assert not phonetap.score(talk, "no action at all").parsed


def test_several_splits_take_turns_and_each_has_the_items_it_has_alone():
    both, typed, hard = (
        phonetap.items(split, count=count) for split, count in (("typed,hard", 4), ("typed", 2), ("hard", 2))
    )
    assert [item.id for item in both] == [typed[0].id, hard[0].id, typed[1].id, hard[1].id]
    with pytest.raises(LabError, match="unknown split 'typed,typed'"):
        phonetap.items("typed,typed", count=2)
