"""What notebooks show: marks at the right place, answers taken apart, no model's text run as HTML."""

import subprocess
import sys

import numpy as np
import pandas
import pytest

from labkit.common.actions import Action, format_action
from labkit.engine.engine import Generation
from labkit.phonetap import draw_screen, items
from labkit.results import show


def text_of(action, thinking=""):
    return f"<think>{thinking}</think><answer>{format_action(action)}</answer>"


def coloured(picture, colour, like=None):
    """Bounding box (x0, y0, x1, y1) of what a mark changed to exactly this colour; None if nothing."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    mask = (np.asarray(picture) == wanted).all(-1)
    if like is not None:
        mask &= ~(np.asarray(like) == wanted).all(-1)
    ys, xs = np.nonzero(mask)
    return None if not len(xs) else (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


@pytest.fixture(scope="module")
def screen():
    return draw_screen(7, kind="settings", must_have=["Bluetooth"])


@pytest.fixture(scope="module")
def plain(screen):
    return show.tap(screen)


def test_a_tap_is_drawn_where_the_model_tapped(screen, plain):
    drawn = show.tap(screen, text_of(Action("Tap", {"element": (250, 750)})))
    x0, y0, x1, y1 = coloured(drawn, show.GIVEN, plain)
    width, height = drawn.size
    assert drawn.size == (screen.size[0] * 2, screen.size[1] * 2)
    assert (x0 + x1) / 2 == pytest.approx(0.25 * width, abs=2)
    assert (y0 + y1) / 2 == pytest.approx(0.75 * height, abs=2)


def test_the_true_box_is_the_elements_box(screen, plain):
    drawn = coloured(show.tap(screen, target="Bluetooth"), show.RIGHT, plain)
    assert drawn == pytest.approx([2 * side for side in screen.find("Bluetooth").box], abs=2)


def test_an_items_box_is_drawn_without_its_label():
    question = next(one for one in items("typed", 20) if one.box)
    plain = show.tap(question.screen)
    assert coloured(show.item(question), show.RIGHT, plain) == pytest.approx(
        [2 * side for side in question.screen.find(question.target).box], abs=2
    )


def test_a_swipe_draws_both_ends(screen, plain):
    swipe = Action("Swipe", {"start": (500, 800), "end": (500, 200)})
    _, y0, _, y1 = coloured(show.tap(screen, swipe), show.GIVEN, plain)
    assert y0 < 0.2 * plain.size[1]
    assert y1 > 0.8 * plain.size[1]


def test_an_answer_without_a_point_draws_nothing(screen, plain):
    for answer in (Action("Back"), "no action at all", text_of(Action("finish", {"message": "done"}))):
        assert show.tap(screen, answer).tobytes() == plain.tobytes()


def test_the_screen_itself_is_not_drawn_on(screen):
    before = screen.image.tobytes()
    show.tap(screen, Action("Tap", {"element": (1, 1)}), "Bluetooth")
    show.grid(screen, 3, 2)
    assert screen.image.tobytes() == before


def test_an_unknown_label_is_named_with_those_there_are(screen):
    with pytest.raises(show.LabError, match=r"no 'Teapot' on this screen; there are .*Bluetooth"):
        show.tap(screen, target="Teapot")
    with pytest.raises(show.LabError, match="box in thousandths"):
        show.tap(screen.image, target="Bluetooth")


def test_a_grid_has_a_line_between_cells(screen, plain):
    drawn = np.asarray(show.grid(screen.image, 1, 2))
    changed = (drawn != np.asarray(plain)).any(-1).all(0)
    assert np.flatnonzero(changed) == pytest.approx(plain.size[0] / 2, abs=2)
    with pytest.raises(show.LabError, match="at least one row"):
        show.grid(screen, 0, 2)


def test_an_answer_shows_thinking_action_verdict_and_time():
    question = next(one for one in items("typed", 20) if one.box)
    done = Generation(text_of(question.action, "I heard: tap it"), 10, 12, "stop", 0.2, 0.3)
    told = show.answer(done, question).data
    assert "I heard: tap it" in told
    assert f"yes: the tap lands on “{question.target}”" in told
    assert "500 ms" in told
    assert "200 ms" in told


def test_a_miss_says_by_how_much():
    question = next(one for one in items("typed", 20) if one.box and one.box[1] > 300)
    told = show.answer(text_of(Action("Tap", {"element": (0, 0)})), question).data
    assert f"it misses “{question.target}” by" in told


def test_what_a_model_writes_is_not_run_as_html():
    told = show.answer("<script>alert(1)</script> hello").data
    assert "<script>" not in told
    assert "&lt;script&gt;" in told


@pytest.mark.parametrize(
    ("action", "words"),
    [
        (Action("Tap", {"element": (500, 120)}), "tap 50 % from the left and 12 % from the top"),
        (Action("Launch", {"app": "Mail"}), "launch Mail"),
        (Action("Back"), "back"),
        (Action("finish", {"message": "Hi"}), "say “Hi” and stop"),
    ],
)
def test_actions_in_words(action, words):
    assert show.in_words(action) == words


def test_pictures_stand_in_a_row_with_captions(plain):
    told = show.row(plain, plain, captions=["one", "<two>"]).data
    assert told.count("data:image/png;base64,") == 2
    assert "&lt;two&gt;" in told
    with pytest.raises(show.LabError, match="2 pictures and 1 captions"):
        show.row(plain, plain, captions=["one"])


def test_tables_write_numbers_as_people_read_them():
    frame = pandas.DataFrame(
        {"bytes": [13_741_824], "parameters": [8_158_760_960], "share": [0.2409], "note": ["long " * 30]}
    )
    told = show.table(frame).data.replace("\N{NO-BREAK SPACE}", " ")
    assert "13.7 MB" in told
    assert "8.16 B" in told
    assert "24.1%" in told
    assert ("long " * 30).strip() in told
    told = show.table(pandas.DataFrame({"int4": [2_500_000_000]}), unit="bytes").data
    assert "2.50\N{NO-BREAK SPACE}GB" in told
    frame = pandas.DataFrame({"kl": [2.909899e-08, float("nan")], "items": [48, 1], "plan": ["<a>", "b"]})
    told = show.table(frame).data
    for cell in ('right">2.91e-08<', 'right">–<', 'right">48<', 'left">&lt;a&gt;<'):
        assert cell in told


def test_sentences_become_a_list():
    assert show.sentences(["a < b", "c"]).data == "<ul><li>a &lt; b</li><li>c</li></ul>"


def test_a_recording_becomes_a_player():
    assert "<audio" in show.audio(np.sin(np.arange(1600, dtype=np.float32)))._repr_html_()


def test_showing_needs_no_torch():
    code = "import sys, labkit.results.show; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
