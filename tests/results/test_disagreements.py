"""The report's ten items: those on which plans differ most from the unquantized row, drawn with both taps."""

import re
from types import SimpleNamespace

import pytest
from compare_fakes import measurements

from labkit import phonetap
from labkit.common.actions import Action, format_action
from labkit.measure.quality import evaluate
from labkit.results import show
from labkit.results.charts.marks import plan_colour
from labkit.results.disagreements import disagreements, section
from labkit.results.measurement import Measurement
from labkit.results.summary import summarize


def answering(items, shift):
    """An engine that taps the target, moved by ``shift(number)`` thousandths to the right."""

    class Engine:
        number = -1

        def generate(self, messages, **_):
            self.number += 1
            action = items[self.number].action
            if action.point is not None:
                x, y = action.point
                action = Action("Tap", {"element": (min(999, x + shift(self.number)), y)})
            return SimpleNamespace(text=format_action(action), completion_tokens=9, finish_reason="stop")

    return Engine()


@pytest.fixture(scope="module")
def rows():
    items = phonetap.items("typed", 8)
    found = []
    for plan, shift in (
        ("fp32", lambda n: 0),
        ("int8", lambda n: 1),
        ("int4", lambda n: 400 if n == 2 else 2 * n),
    ):
        records = evaluate(answering(items, shift), items, batch_size=1)
        found.append(
            Measurement(
                model="m",
                plan=plan,
                device="cpu",
                split="typed",
                samples={"items": records},
                **summarize(records),
            )
        )
    return found, items


def test_the_most_different_answer_comes_first(rows):
    measured, items = rows
    found = disagreements(measured)
    assert (found[0].record["id"], found[0].plan, found[0].reference_plan) == (items[2].id, "int4", "fp32")
    assert found[0].reference["success"]
    assert not found[0].record["success"]
    weights = [one.weight for one in found]
    assert weights == sorted(weights, reverse=True)
    assert len(disagreements(measured, 2)) == 2


def test_answers_that_agree_are_no_disagreement(rows):
    measured, _ = rows
    assert disagreements([measured[0], measured[0]]) == []
    assert section([measured[0]]) == ""


def test_the_page_shows_picture_taps_and_every_answer(rows):
    measured, items = rows
    page = section(measured)
    first = page.partition("</figure>")[0]
    assert re.search(
        r"<img alt='the screen with the taps of fp32 and int4' src='data:image/webp;base64,.{2000}", first
    )
    assert all(f">{plan}</th>" in first for plan in ("fp32", "int8", "int4"))
    assert "<td>right</td>" in first
    assert "<td>wrong</td>" in first
    assert items[2].instruction.replace('"', "&quot;").replace("'", "&#x27;") in first


def test_a_screen_that_is_drawn_otherwise_today_is_not_shown(rows):
    measured, _ = rows
    changed = [Measurement.from_dict(m.to_dict()) for m in measured]
    for m in changed:
        m.samples = {"items": [{**record, "expected": 'do(action="Back")'} for record in m.samples["items"]]}
    page = section(changed)
    assert "drawn otherwise today" in page
    assert "<img" not in page


def test_unknown_items_and_foreign_text_do_no_harm():
    fakes = measurements("fp32", "int4")
    for record in fakes[1].samples["items"]:
        record["instruction"], record["answer"] = "<script>x</script>", "<answer><img src=x></answer>"
    page = section(fakes)
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "<img src=x" not in page


def test_taps_are_drawn_in_their_colours_and_shapes():
    screen = phonetap.draw_screen(3)
    colours = plan_colour("fp32"), plan_colour("int4")
    drawn = show.taps(screen, [('do(action="Tap", element=[200,300])', colours[0]), ("prose", colours[1])])
    both = show.taps(screen, [('do(action="Tap", element=[200,300])', colours[0]),
                              ('do(action="Tap", element=[800,600])', colours[1])])  # fmt: skip
    width, height = both.size
    rgb = tuple(int(colours[1][i : i + 2], 16) for i in (1, 3, 5))
    corner = both.crop(
        (int(0.8 * width) - 24, int(0.6 * height) - 24, int(0.8 * width) + 24, int(0.6 * height) + 24)
    )
    assert rgb in set(corner.getdata())
    assert drawn.size == both.size
    assert drawn.tobytes() != both.tobytes()
