"""Tags are tags, and the same letters inside what an action types are text: for the parser and in any pieces."""

import random

import pytest

from labkit.common.actions import Action, format_action, parse_answer
from labkit.common.marks import MARK, MarkReader, read_marks

PIECES = [
    "<answer>", "</answer>", "<think>", "</think>", "<|user|>", "<|endoftext|>", "</ans", "<", '"', "'", "\\", "\\n",
    "\n", "\r", "\t", "\0", "(", ")", "[", "]", "{", "}", ",", "=", " ", "Type", 'do(action="Back")', 'text="',
    'finish(message="', "，。！", "“”（）【】", "\U0001f600", "\U0001f468\u200d\U0001f469", "你好", "\u2028", "\x85", "\x7f",
]  # fmt: skip


def texts(count, seed=0):
    draw = random.Random(seed)
    return ["".join(draw.choices(PIECES, k=draw.randint(0, 8))) for _ in range(count)]


def actions(text):
    return [
        Action("Type", {"text": text}),
        Action("Tap", {"element": (1, 2), "message": text}),
        Action("Call_API", {"instruction": text}),
        Action("finish", {"message": text}),
    ]


def test_an_answer_with_any_text_is_read_as_it_was_written():
    for text in texts(50):
        for action in actions(text):
            call = format_action(action)
            for answer, thinking in [
                (f"<answer>{call}</answer>", None),
                (f"<answer>{call}</answer><|user|>", None),
                (f"<think>I see. </think><answer>{call}</answer>", "I see."),
                (f"I see.</think>\n<answer>{call}", "I see."),
                (f"<think>I see.<answer>{call}</answer>", "I see."),
                (f'<think>do(action="Type, or</think><answer>{call}</answer>', 'do(action="Type, or'),
                (f"Sure: {call}", None),
                (call, None),
            ]:
                parsed = parse_answer(answer)
                assert (parsed.action, parsed.thinking) == (action, thinking), answer


def test_thinking_may_quote_an_action_that_it_does_not_finish():
    parsed = parse_answer('Is it do(action="Tap?</think><answer>do(action="Back")</answer>')
    assert (parsed.thinking, parsed.action) == ('Is it do(action="Tap?', Action("Back"))


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
def test_pieces_give_the_same_tags_as_the_whole(size):
    for text in texts(100, seed=1):
        call = format_action(Action("Type", {"text": text}))
        for answer in (f"<think>{text}</think><answer>{call}</answer>", f"{text}{call}{text}", text):
            reader = MarkReader()
            segments = [
                segment
                for at in range(0, len(answer), size)
                for segment in reader.push(answer[at : at + size])
            ]
            segments += reader.flush()
            assert "".join(segment.text for segment in segments) == answer
            assert placed(segments) == placed(read_marks(answer))


def placed(segments):
    """The tags with their places."""
    tags, at = [], 0
    for segment in segments:
        if segment.kind == MARK:
            tags.append((at, segment.text))
        at += len(segment.text)
    return tags


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ('<answer>do(action="Type", text="a</answer>b")</answer>', [0, 45]),
        ("<answer>do(action='Type', text='it\\'s </answer>')</answer>", [0, 49]),
        ('finish(message="5" tall")</answer>', [25]),
        ('finish(message="C:\\")</answer>\n', [21]),
        ('finish(message="cut off</answer>', [23]),
        ('undo(action="</answer>', [13]),
        ("say do (it's) </answer> now", [14]),
    ],
)
def test_a_tag_is_one_outside_the_strings_of_a_call(text, tags):
    assert [at for at, _ in placed(read_marks(text))] == tags


def test_long_hostile_texts_are_read_in_time():
    for piece in ("=", "<", "do(action=", '"', "\\", "</answer>", "<|", " "):
        text = piece * (20_000 // len(piece))
        assert "".join(segment.text for segment in read_marks(text)) == text
        parse_answer(text)
