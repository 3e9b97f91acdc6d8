"""Pictures of screens: the taps of answers, true targets, elements, the grid of image tokens. PIL images, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image, ImageDraw

from labkit.common.actions import COORDINATE_MAX, Action, Answer, parse_answer
from labkit.common.errors import LabError
from labkit.phonetap import Item, Screen

RIGHT, GIVEN = "#0072B2", "#D55E00"
"""Blue for the true target, orange for the model's tap (Okabe and Ito's); the marks differ in shape too."""
SCALE = 2
"""Factor by which pictures are larger than screens, so that marks are crisp."""


class Generation(Protocol):
    """What is shown of a `labkit.engine.generation.Generation`, which this room does not import."""

    text: str
    completion_tokens: int
    ttft_s: float
    decode_s: float


Given = Generation | Answer | Action | str | None
"""An answer: as generated, parsed, as an action or as text; None draws nothing."""


def tap(
    screen: Screen | Image.Image,
    answer: Given = None,
    target: str | tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The screen with the model's tap (orange ring) and the true target (blue box).

    answer: a `Generation`, its text, or an `Action`; one without a point draws nothing. target: an element's
    label, or a box (x0, y0, x1, y1) in thousandths. Raises LabError for a label that is not on the screen.
    """
    canvas = _enlarged(screen)
    if target is not None:
        _box(canvas, _pixels(_target_box(screen, target), canvas.size), RIGHT)
    action = action_of(answer)
    if action is not None:
        names = [name for name in ("element", "start", "end") if name in action.arguments]
        points = [_point(action.arguments[name], canvas.size) for name in names]
        if len(points) == 2:
            ImageDraw.Draw(canvas).line(points, fill=GIVEN, width=6)
        for point in points:
            _ring(canvas, point)
    return canvas


def taps(
    screen: Screen | Image.Image,
    answers: Sequence[tuple[Given, str]],
    target: str | tuple[float, float, float, float] | None = None,
) -> Image.Image:
    """The screen with the taps of several answers, each in its colour: a ring, a diamond, a ring …; blue box: target.

    answers: pairs of an answer, as for `tap`, and a colour.
    """
    canvas = _enlarged(screen)
    if target is not None:
        _box(canvas, _pixels(_target_box(screen, target), canvas.size), RIGHT)
    for number, (answer, colour) in enumerate(answers):
        action = action_of(answer)
        if action is not None and action.point is not None:
            draw = _diamond if number % 2 else _ring
            draw(canvas, _point(action.point, canvas.size), colour=colour)
    return canvas


def item(question: Item, answer: Given = None) -> Image.Image:
    """The screen of a PhoneTap item with its true target, and the tap of ``answer`` if there is one."""
    return tap(question.screen, answer, question.box)


def elements(screen: Screen) -> Image.Image:
    """The screen with a box around each element that can be tapped."""
    canvas = _enlarged(screen)
    for element in screen.elements:
        _box(canvas, tuple(SCALE * side for side in element.box), RIGHT)
    return canvas


def grid(screen: Screen | Image.Image, rows: int, columns: int) -> Image.Image:
    """The picture with the grid of its image tokens: each cell becomes one token."""
    if rows < 1 or columns < 1:
        raise LabError(f"a grid needs at least one row and one column, not {rows} x {columns}")
    canvas = _enlarged(screen)
    draw, (width, height) = ImageDraw.Draw(canvas), canvas.size
    for column in range(1, columns):
        x = round(column * width / columns)
        draw.line([(x, 0), (x, height)], fill=GIVEN, width=2)
    for row in range(1, rows):
        y = round(row * height / rows)
        draw.line([(0, y), (width, y)], fill=GIVEN, width=2)
    return canvas


def text_of(generation: Generation | str) -> str:
    """The text of an answer. Raises LabError for anything else."""
    text = generation.text if hasattr(generation, "text") else generation
    if not isinstance(text, str):
        raise LabError(f"an answer is a Generation or its text, not {type(generation).__name__}")
    return text


def action_of(answer: Given) -> Action | None:
    """The action of an answer, or None."""
    if answer is None or isinstance(answer, Action):
        return answer
    if isinstance(answer, Answer):
        return answer.action
    return parse_answer(text_of(answer)).action


def _target_box(screen: Screen | Image.Image, target: str | tuple) -> tuple[float, ...]:
    """The box of a target, in thousandths of the screen."""
    if not isinstance(target, str):
        return tuple(target)
    if not isinstance(screen, Screen):
        raise LabError("a picture has no labels: give the target as a box in thousandths")
    labels = [element.label for element in screen.elements]
    if target not in labels:
        raise LabError(f"there is no {target!r} on this screen; there are {', '.join(labels)}")
    sides = screen.size * 2
    return tuple(edge / side * 1000 for edge, side in zip(screen.find(target).box, sides))


def _enlarged(screen: Screen | Image.Image) -> Image.Image:
    image = screen.image if isinstance(screen, Screen) else screen
    width, height = image.size
    return image.convert("RGB").resize((width * SCALE, height * SCALE), Image.Resampling.LANCZOS)


def _pixels(box: Sequence[float], size: tuple[int, int]) -> tuple[float, ...]:
    return tuple(edge * side / 1000 for edge, side in zip(box, size * 2))


def _point(point: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    return tuple((place + 0.5) * side / (COORDINATE_MAX + 1) for place, side in zip(point, size))


def _box(canvas: Image.Image, box: Sequence[float], colour: str) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.rectangle([box[0] - 2, box[1] - 2, box[2] + 1, box[3] + 1], outline="white", width=7)
    draw.rectangle([box[0], box[1], box[2] - 1, box[3] - 1], outline=colour, width=3)


def _ring(canvas: Image.Image, centre: tuple[float, float], radius: int = 17, colour: str = GIVEN) -> None:
    draw, (x, y) = ImageDraw.Draw(canvas), centre
    for reach, width, shade in ((radius + 3, 11, "white"), (radius, 5, colour)):
        draw.ellipse([x - reach, y - reach, x + reach, y + reach], outline=shade, width=width)
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour, outline="white", width=1)


def _diamond(canvas: Image.Image, centre: tuple[float, float], radius: int = 20, colour: str = GIVEN) -> None:
    draw, (x, y) = ImageDraw.Draw(canvas), centre
    corners = [(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y), (x, y - radius)]
    for width, shade in ((11, "white"), (5, colour)):
        draw.line([*corners, corners[1]], fill=shade, width=width, joint="curve")
    draw.ellipse([x - 4, y - 4, x + 4, y + 4], fill=colour, outline="white", width=1)
