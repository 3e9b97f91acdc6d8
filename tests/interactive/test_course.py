"""The course's exercises: right answers pass, known mistakes get the hint that is about them, none is just "wrong"."""

import ast
import html
import re
from pathlib import Path

import nbformat
import pytest
import torch

from labkit import phonetap
from labkit.common.errors import LabError
from labkit.interactive import course
from labkit.interactive.course import by_hand, chinese, chinese_hints
from labkit.models import get_spec

ROOT = Path(__file__).resolve().parents[2]
pocket_needed = pytest.mark.skipif(
    get_spec("pocket").availability() != "here", reason="the pocket model is not in assets"
)
RULES = [
    {"role": "vision", "scheme": "bf16"},
    {"role": "decoder", "scheme": "int4"},
    {"match": "re:.*", "scheme": "int8"},
]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
PICTURE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
TEXT = {"type": "text", "text": "open the settings"}


def round_trip(row, num_bits):
    top = 2 ** (num_bits - 1) - 1
    scale = row.abs().max() / top
    return (row / scale).round() * scale


def cut_off(row, num_bits):
    scale = row.abs().max() / (2 ** (num_bits - 1) - 1)
    return (row / scale).trunc() * scale


def codes_only(row, num_bits):
    return (row / (row.abs().max() / (2 ** (num_bits - 1) - 1))).round()


def always_four_bits(row, num_bits):
    return round_trip(row, 4)


def raises(row, num_bits):
    raise KeyError("scale")


class Answer:
    text = '<answer>do(action="Tap", element=[1,1])</answer>'


def screen_with(label=None):
    return phonetap.draw_screen(5, kind="home", style="test", lang="zh", must_have=[label] if label else [])


def tap_on(screen, label):
    x0, y0, x1, y1 = screen.find(label).box
    width, height = screen.size
    x, y = int((x0 + x1) / 2 / width * 1000), int((y0 + y1) / 2 / height * 1000)
    return f'do(action="Tap", element=[{x},{y}])'


RIGHT = {
    "00-a": lambda: _sizes()["fp32"] / _sizes()["int4"],
    "00-b": lambda: (screen_with("相机"), tap_on(screen_with("相机"), "相机")),
    "01-a": lambda: RULES,
    "01-b": lambda: 10 * 3108 * 40960 / 1e6,
    "02-a": lambda: 0.74 / 7,
    "02-b": lambda: round_trip,
    "02-c": lambda: 5,
    "02-d": lambda: (4, 32),
    "03-a": lambda: 1.0,
    "03-b": lambda: (0, 1, 0),
    "04-a": lambda: [{"role": "vision", "scheme": "int8"}, {"match": "re:.*", "scheme": "int4"}],
    "04-b": lambda: (8, 4, 2),
    "05-a": lambda: torch.tensor(6.274 / 1.008),
    "05-b": lambda: 295,
    "05-c": lambda: 8 * 4000 * 40960 / 1e9,
    "06-a": lambda: 0.97**8,
    "07-a": lambda: {"role": "user", "content": [PICTURE, TEXT]},
    "08-a": lambda: "int4",
    "08-b": lambda: 64,
}
MISTAKES = [
    ("00-a", lambda: _sizes()["int4"] / _sizes()["fp32"], "Turn the fraction round"),
    ("00-a", lambda: 8, "Eight is what 32 bits against 4 promise"),
    ("00-a", lambda: "five", "A number is asked for; this is of the type str"),
    ("00-a", lambda: torch.ones(2), "one is asked for"),
    ("00-b", lambda: "tap", "as (mine, answer)"),
    ("00-b", lambda: (screen_with(), Answer()), "There is no 相机 on this screen"),
    ("00-b", lambda: (screen_with("相机"), Answer()), "the tap misses 相机"),
    ("00-b", lambda: (screen_with("相机"), "finish(message=\"?\")"), "taps nothing"),
    ("01-a", lambda: RULES[1:2], "not int8"),
    ("01-a", lambda: RULES[::-1], "earlier rules match all its Linears"),
    ("01-a", lambda: [{"role": "eye", "scheme": "int8"}], "unknown role 'eye'"),
    ("01-b", lambda: 3108 * 40960 / 1e6, "Ten are asked for"),
    ("01-b", lambda: 1.273, "1 MB is 1,000,000 bytes"),
    ("02-a", lambda: 0.74 / 8, "-8 is not used"),
    ("02-a", lambda: (0.66 + 0.74) / 15, "asymmetric"),
    ("02-b", lambda: cut_off, "cut off, not rounded"),
    ("02-b", lambda: codes_only, "multiplied by the scale"),
    ("02-b", lambda: always_four_bits, "depends on num_bits"),
    ("02-b", lambda: raises, "raises KeyError: 'scale'"),
    ("02-b", lambda: lambda row, num_bits: None, "returns nothing"),
    ("02-b", lambda: lambda row, num_bits: row[:3], "shape (3,)"),
    ("02-b", lambda: 5, "without calling it"),
    ("02-c", lambda: 4.5, "Each group stores two"),
    ("02-d", lambda: (4, 64), "keep 19"),
    ("02-d", lambda: (8, 32), "it takes 9 bits a weight; 5 would do"),
    ("02-d", lambda: (5, 64), "num_bits is one of"),
    ("03-a", lambda: 2, "whole step"),
    ("03-a", lambda: 254 / 255, "cover both signs"),
    ("03-b", lambda: (0, 0, 0), "Each is rounded to its nearest"),
    ("03-b", lambda: (0.4, 0.4, 0.4), "Codes are whole numbers"),
    ("03-b", lambda: (5, -4, 0), "far from their weights"),
    ("03-b", lambda: 1, "three whole numbers"),
    ("04-a", lambda: RULES, "The vision encoder gets bf16"),
    ("04-a", lambda: [{"match": "re:.*", "scheme": "int8"}], "too many. The largest part is"),
    ("04-b", lambda: (4, 4, 4), "A cannot be afforded"),
    ("04-b", lambda: (8, 8, 2), "takes 18 bytes; 14 are there"),
    ("04-b", lambda: (4, 4, 3), "C takes 2 or 4 bytes"),
    ("05-a", lambda: 0.00622, "Right, in seconds"),
    ("05-b", lambda: 148, "factor of 2"),
    ("05-c", lambda: 4000 * 40960 / 1e9, "cache of its own"),
    ("06-a", lambda: 0.76, "Losses do not add up"),
    ("06-a", lambda: 0.216, "share which fails"),
    ("07-a", lambda: {"role": "user", "content": "open"}, "content is a list of parts"),
    ("07-a", lambda: {"role": "user", "content": [TEXT]}, "no part of the type image_url"),
    ("07-a", lambda: {"role": "user", "content": [{"type": "image", "image": 1}, TEXT]}, "in this process"),
    ("07-a", lambda: {"role": "assistant", "content": [PICTURE, TEXT]}, "the role is user"),
    ("08-a", lambda: "int8", "int8 needs 12.0 GB"),
    ("08-a", lambda: "nf4", "a few more bits"),
    ("08-b", lambda: 128, "53.5 groups"),
    ("08-b", lambda: 32, "a larger group size"),
]  # fmt: skip


def _sizes():
    from labkit.measure import anatomy

    pocket = anatomy.dissect("pocket")
    return {plan: pocket.under(plan).bytes for plan in ("fp32", "int4")}


def test_every_exercise_is_tested():
    known = {exercise.id for exercise in course.exercises()}
    assert set(RIGHT) == known
    assert {id for id, _, _ in MISTAKES} == known


@pocket_needed
@pytest.mark.parametrize("id", RIGHT)
def test_the_right_answer_is_right_and_says_why(id):
    verdict = course.check(id, RIGHT[id]())
    assert verdict, verdict
    assert verdict.word == "Right"
    assert len(verdict.message) > 20


@pocket_needed
@pytest.mark.parametrize(("id", "answer", "told"), MISTAKES, ids=[f"{m[0]} {m[2][:24]}" for m in MISTAKES])
def test_a_known_mistake_gets_the_hint_that_is_about_it(id, answer, told):
    verdict = course.check(id, answer())
    assert not verdict
    assert verdict.word == "Not yet"
    assert told in verdict.message
    assert told in html.unescape(verdict._repr_html_())


@pytest.mark.parametrize("id", RIGHT)
def test_no_answer_yet_repeats_the_task(id):
    verdict = course.check(id)
    assert (verdict.right, verdict.word) == (False, "Open")
    assert course.get_exercise(id).task in verdict.message


@pocket_needed
@pytest.mark.parametrize(("id", "answer"), [(m[0], m[1]) for m in MISTAKES] + list(RIGHT.items()))
def test_the_chinese_edition_is_answered_in_chinese(id, answer, monkeypatch, tmp_path):
    (tmp_path / "zh").mkdir()
    monkeypatch.chdir(tmp_path / "zh")
    for verdict in (course.check(id, answer()), course.check(id), course.hint(id)):
        assert verdict.word in ("正确", "还没有", "待答")
        assert re.search(r"[\u4e00-\u9fff]", verdict.message.replace("相机", "")), verdict
        assert not re.search(
            r"\b(the|is|are|that|what|of)\b",
            verdict.message.partition("拒绝")[0].replace("open the settings", ""),
        ), verdict
    english = course.get_exercise(id)
    assert len(chinese.EXERCISES[id][2]) == len(english.hints)


def test_every_hint_is_translated_with_the_same_gaps():
    hints = set()
    for path in (ROOT / "labkit/interactive/course").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and getattr(getattr(node.exc, "func", None), "id", "") == "Hint":
                parts = getattr(node.exc.args[0], "values", [node.exc.args[0]])
                hints.add("".join(part.value if isinstance(part, ast.Constant) else "{}" for part in parts))
    patterns = [re.compile(".*".join(map(re.escape, text.split("{}"))), re.S) for text in chinese_hints.HINTS]
    # A gap after "." or "for" may be empty.
    hints = {text.replace(".{}", ".").replace("for{}", "for") for text in hints}
    assert len(hints) > 50
    assert [text for text in hints if not any(pattern.fullmatch(text) for pattern in patterns)] == []
    for english, translation in chinese_hints.HINTS.items():
        assert english.count("{}") == translation.count("{}"), english


def test_hints_get_plainer_and_the_last_one_stays():
    course._hints_given.clear()
    told = [course.hint("02-c").message for _ in range(3)]
    assert told[0].startswith("Hint 1 of 2: ")
    assert told[1] == told[2] == f"Hint 2 of 2: {course.get_exercise('02-c').hints[-1]}"


def test_an_unknown_exercise_is_refused_with_those_that_are_known():
    with pytest.raises(LabError, match="no exercise '99-z'; there are 00-a"):
        course.check("99-z", 1)


def test_what_a_learner_wrote_is_shown_as_text():
    def hostile(row, num_bits):
        raise ValueError("<img src=x>")

    assert "<img" not in course.check("02-b", hostile)._repr_html_()


@pocket_needed
def test_the_weights_of_the_scale_exercise_are_those_in_the_notebook():
    text = (ROOT / "notebooks/02_quantize_by_hand.ipynb").read_text(encoding="utf-8")
    assert ", ".join(f"{weight:.2f}" for weight in by_hand.ROW) in text


def test_every_exercise_is_asked_in_its_notebook_and_every_check_is_known():
    known = {exercise.id for exercise in course.exercises()}
    asked = {}
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        asked[path.name[:2]] = set(re.findall(r'course\.check\("([^"]+)"', code))
        assert all(id[:2] == path.name[:2] for id in asked[path.name[:2]])
    assert set().union(*asked.values()) <= known
    assert {id for id in known if id[:2] in asked} <= set().union(*asked.values())
