"""Exercises of notebook 00."""

from typing import Any

from labkit.interactive.course.exercise import Exercise, Hint, is_near, number


def _shrinks(answer: Any) -> None:
    """How many times smaller the pocket model's weights are in int4 than in fp32."""
    from labkit.measure import anatomy

    pocket = anatomy.dissect("pocket")
    right = pocket.under("fp32").bytes / pocket.under("int4").bytes
    value = number(answer)
    if is_near(value, right, 0.03):
        return
    if is_near(value, 1 / right, 0.03):
        raise Hint("That is int4's share of fp32. Turn the fraction round: how many times smaller is it?")
    if is_near(value, 8, 0.03):
        raise Hint("Eight is what 32 bits against 4 promise. Divide the two numbers in the column Weights.")
    if 0 < 1 - value < 1 and is_near(value, 1 - 1 / right, 0.03):
        raise Hint("That is the share which is saved. Divide fp32's bytes by int4's instead.")
    raise Hint(
        "Divide the bytes of fp32's weights by those of int4's; both are in the table's column Weights."
    )


def _camera(answer: Any) -> None:
    """A Chinese home screen with the camera on it, and a model's answer that taps it."""
    from labkit.common.actions import parse_answer
    from labkit.phonetap import Screen

    if not isinstance(answer, tuple | list) or len(answer) != 2 or not isinstance(answer[0], Screen):
        raise Hint("Give the screen and the model's answer together, as (mine, answer).")
    screen, reply = answer
    labels = [element.label for element in screen.elements]
    if "相机" not in labels:
        some = ", ".join(labels[:4])
        raise Hint(f"There is no 相机 on this screen (but {some} …). must_have takes a list of labels.")
    action = parse_answer(getattr(reply, "text", reply)).action
    if action is None or action.point is None:
        raise Hint("The answer taps nothing. Does the message hold the picture of this screen and a request?")
    width, height = screen.size
    x0, y0, x1, y1 = screen.find("相机").box
    x, y = action.point[0] * width / 1000, action.point[1] * height / 1000
    if not (x0 <= x <= x1 and y0 <= y <= y1):
        raise Hint(
            "The question is asked well, and the tap misses 相机. Ask about *this* screen's picture; if you "
            "do, it is the model's mistake: another seed draws another screen."
        )


EXERCISES = (
    Exercise(
        "00-a",
        "How many times smaller are the pocket model's weights in int4 than in fp32?",
        _shrinks,
        "More than five times, not eight: scales, zero points, and what is no Linear take their share.",
        (
            "The comparison's table has a column Weights.",
            "comparison.table()['weights_bytes'] has the bytes by plan: divide one by the other.",
        ),
    ),
    Exercise(
        "00-b",
        "Draw a Chinese home screen with the app 相机, ask for it, and give (screen, answer).",
        _camera,
        "The tap lands on 相机: the model reads labels, it was not told where the camera is.",
        (
            "phonetap.draw_screen takes kind='home', lang='zh' and must_have=['相机'].",
            "Ask as above: a message whose content is the picture mine.image and the text 点击相机.",
        ),
    ),
)
