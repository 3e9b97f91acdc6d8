"""Scores of one answer: does it parse, does the tap land, is the whole step right, how far off is it?

- click: the tapped point lies in the target's box (ScreenSpot's click accuracy);
- success: the action's type and all its arguments are right (a tap: in the box; a swipe: in the same direction);
- distance, dx, dy: from the target's centre to the tapped point, 1.0 being the screen's side (AITW's action match
  counts taps within 0.14 as right).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from labkit.common.actions import Action, parse_answer
from labkit.phonetap.items import Item

_FREE_TEXT = {"finish", "Wait"}  # what is said there is not judged, only that it is said


@dataclass(frozen=True)
class Score:
    """See the module's docstring; `click`, `distance`, `dx`, `dy` are None if the right answer is no tap.

    If a tap is right and the answer has none, click is False and distance None.
    """

    parsed: bool
    click: bool | None
    success: bool
    distance: float | None
    dx: float | None
    dy: float | None


def score(item: Item, answer_text: str) -> Score:
    """Score a model's answer to an item."""
    action = parse_answer(answer_text).action
    if item.box is None:
        return Score(
            action is not None, None, action is not None and _same(item.action, action), None, None, None
        )
    point = action.arguments.get("element") if action is not None else None
    if action is None or action.name != "Tap" or point is None:
        return Score(action is not None, False, False, None, None, None)
    x0, y0, x1, y1 = item.box
    dx, dy = (point[0] - (x0 + x1) / 2) / 1000, (point[1] - (y0 + y1) / 2) / 1000
    hit = x0 <= point[0] <= x1 and y0 <= point[1] <= y1
    return Score(True, hit, hit, math.hypot(dx, dy), dx, dy)


def _same(right: Action, answer: Action) -> bool:
    if right.name != answer.name:
        return False
    if right.name in _FREE_TEXT:
        return True
    if right.name == "Swipe":
        return _direction(right) == _direction(answer)
    return dict(right.arguments) == dict(answer.arguments)


def _direction(swipe: Action) -> tuple[bool, bool]:
    (x0, y0), (x1, y1) = swipe.arguments["start"], swipe.arguments["end"]
    return abs(x1 - x0) > abs(y1 - y0), (x1 + y1) > (x0 + y0)
