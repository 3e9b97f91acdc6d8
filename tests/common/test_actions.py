"""Actions are written and read exactly; sloppy and hostile answers are taken apart without surprises."""

import pickle
import random

import pytest

from labkit.common.actions import Action, format_action, parse_action, parse_answer
from labkit.common.errors import ActionSyntaxError

WRITTEN = {
    'do(action="Tap", element=[500,120])': Action("Tap", {"element": (500, 120)}),
    'do(action="Tap", element=[0,999], message="pays")': Action(
        "Tap", {"element": (0, 999), "message": "pays"}
    ),
    'do(action="Long Press", element=[1,2])': Action("Long Press", {"element": (1, 2)}),
    'do(action="Double Tap", element=[1,2])': Action("Double Tap", {"element": (1, 2)}),
    'do(action="Swipe", start=[1,2], end=[3,4])': Action("Swipe", {"start": (1, 2), "end": (3, 4)}),
    'do(action="Type", text="你好")': Action("Type", {"text": "你好"}),
    'do(action="Launch", app="微信")': Action("Launch", {"app": "微信"}),
    'do(action="Back")': Action("Back"),
    'do(action="Home")': Action("Home"),
    'do(action="Wait", duration="2 seconds")': Action("Wait", {"duration": "2 seconds"}),
    'do(action="Take_over", message="log in")': Action("Take_over", {"message": "log in"}),
    'do(action="Note", message="True")': Action("Note", {"message": "True"}),
    'do(action="Call_API", instruction="sum up")': Action("Call_API", {"instruction": "sum up"}),
    'do(action="Interact")': Action("Interact"),
    'finish(message="done")': Action("finish", {"message": "done"}),
}


@pytest.mark.parametrize("text", WRITTEN)
def test_every_action_is_written_and_read_in_the_syntax_of_open_autoglm(text):
    assert format_action(WRITTEN[text]) == text
    assert parse_action(text) == WRITTEN[text]


def test_any_string_survives_writing_and_reading():
    draw = random.Random(0)
    alphabet = "a\"'\\\n\r\t()[]你 ,=\x00\x0b\x7f\x85\u2028<>|/"
    for _ in range(500):
        text = "".join(draw.choice(alphabet) for _ in range(draw.randint(0, 12)))
        for action in (Action("Type", {"text": text}), Action("finish", {"message": text})):
            assert parse_action(format_action(action)) == action


def test_lists_and_numbers_are_normalized():
    assert Action("Tap", {"element": [1, 2]}) == Action("Tap", {"element": (1, 2)})
    assert parse_action('do(action="Wait", duration=3)').arguments["duration"] == "3 seconds"
    assert Action("Tap", {"element": [7, 8]}).point == (7, 8)
    assert Action("Swipe", {"start": [1, 2], "end": [3, 4]}).point is None


def test_actions_hash_and_pickle():
    action = Action("Tap", {"element": (1, 2)})
    assert len({action, Action("Tap", {"element": [1, 2]})}) == 1
    assert pickle.loads(pickle.dumps(action)) == action


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not an action"),
        ("hello", "not an action"),
        ('do(action="Fly")', "unknown action 'Fly'"),
        ('do(action="Tap")', "lacks its argument 'element'"),
        ('do(action="Tap", element=[1,1000])', "off the screen"),
        ('do(action="Tap", element=[-1,5])', "off the screen"),
        ('do(action="Tap", element=[1.5,5])', "two integers"),
        ('do(action="Tap", element=[1])', "two integers"),
        ('do(action="Tap", element=[True,False])', "two integers"),
        ('do(action="Back", speed=3)', "no argument 'speed'"),
        ('do(action="Type", text=5)', "must be a string"),
        ('do("Tap", [1,2])', "arguments need names"),
        ('do(action="Tap", element=[1,2], element=[3,4])', ""),
        ('do(action=open("/etc/passwd"))', "no plain value"),
        ('__import__("os").system("true")', "not an action"),
        ('do(action="finish", message="x")', "needs action"),
        ("(" * 5000, "not an action"),
        ("do(" + "[" * 3000, "not an action"),
    ],
)
def test_what_is_no_action_is_refused_with_the_reason(text, reason):
    with pytest.raises(ActionSyntaxError, match=reason.replace("(", r"\(") if reason else None):
        parse_action(text)


TAP = Action("Tap", {"element": (1, 2)})


@pytest.mark.parametrize(
    ("text", "thinking", "action"),
    [
        ('<think>why</think><answer>do(action="Tap", element=[1,2])</answer>', "why", TAP),
        ('<think>why</think><answer>do(action="Tap", element=[1,2])', "why", TAP),
        ('<think>why\ndo(action="Tap", element=[1,2])', "why", TAP),
        ('<think>why<answer>do(action="Tap", element=[1,2])</answer>', "why", TAP),
        ('why</think><answer>do(action="Tap", element=[1,2])</answer>', "why", TAP),
        ('do(action="Tap", element=[1,2])', None, TAP),
        ('Sure. do(action="Tap", element=[1,2]) then do(action="Back")', None, TAP),
        ('<answer>do(action="Tap", element=[1,2])</answer><|endoftext|><|user|>', None, TAP),
        (
            '<answer>finish(message="he said "hi"")</answer>',
            None,
            Action("finish", {"message": 'he said "hi"'}),
        ),
        ('<answer>do(action="Type", text="a)b</answer>', None, None),
        ("<think>on and on", "on and on", None),
        ("I am a phone agent (small).", None, None),
        ("", None, None),
    ],
)
def test_answers_are_taken_apart_whatever_tags_are_missing(text, thinking, action):
    answer = parse_answer(text)
    assert (answer.thinking, answer.action) == (thinking, action)
    assert (answer.error is None) == (action is not None)


def test_prose_is_kept_as_text():
    assert parse_answer("<think>x</think>I am a pocket model.<|user|>").text == "I am a pocket model."


def test_random_answers_never_raise():
    draw = random.Random(1)
    pieces = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "do(",
        'action="Tap"',
        "element=",
        "[1,2]",
        ")",
        '"',
        ",",
    ]
    for _ in range(2000):
        parse_answer("".join(draw.choice(pieces) for _ in range(draw.randint(0, 12))))
