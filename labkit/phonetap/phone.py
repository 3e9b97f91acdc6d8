"""A phone made of PhoneTap's screens: apps open, lists lead to pages, fields take text, back goes back.

It is a tree of screens drawn from seeds. The way to a place identifies it, so the effect of every action is exact, and
the same on every machine.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from PIL import Image, ImageDraw, ImageFont

from labkit.common.actions import COORDINATE_MAX, Action
from labkit.common.errors import LabError
from labkit.phonetap.drawing.fonts import FULL, fonts_folder
from labkit.phonetap.items import SIZE
from labkit.phonetap.screens import Element, Screen, draw_screen

_APPS = {
    "settings": ("设置", "Settings"),
    "contacts": ("联系人", "Contacts", "电话", "Phone"),
    "messages": ("短信", "Messages", "微信", "WeChat"),
    "search": ("浏览器", "Browser", "地图", "Maps", "音乐", "Music"),
}
_LISTS = ("settings", "contacts", "messages", "menu")
LEAST_SWIPE = 100
"""Shortest swipe that scrolls, in thousandths of the screen."""


@dataclass(frozen=True)
class Place:
    """Where the phone is: the kind of screen, the labels that led here, how far it is scrolled, what was typed."""

    kind: str
    way: tuple[str, ...] = ()
    scrolled: int = 0
    typed: str = ""


class Phone:
    """One phone.

    Args:
        seed: decides home screen, apps and lists.
        lang: ``zh`` or ``en``.
        size: pixels of its screen.
    """

    def __init__(self, seed: int = 0, lang: str = "zh", size: tuple[int, int] = SIZE):
        if lang not in ("zh", "en"):
            raise LabError(f"unknown language {lang!r}; known: zh, en")
        self.seed, self.lang, self.size = seed, lang, size
        self._stack = [Place("home")]

    @property
    def place(self) -> Place:
        """The current place."""
        return self._stack[-1]

    @cached_property
    def _drawn(self) -> dict[Place, Screen]:
        return {}

    @property
    def screen(self) -> Screen:
        """The current screen, without typed text."""
        plain = replace(self.place, typed="")
        if plain not in self._drawn:
            name = f"{self.seed} {plain.kind} {plain.scrolled} {'/'.join(plain.way)}"
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big")
            self._drawn[plain] = draw_screen(
                seed, size=self.size, kind=plain.kind, lang=self.lang, style="test", part="test"
            )
        return self._drawn[plain]

    def picture(self) -> Image.Image:
        """The screenshot, with typed text in its field."""
        field = self.field
        if not self.place.typed or field is None:
            return self.screen.image
        picture, (x0, y0, x1, y1) = self.screen.image.copy(), map(round, field.box)
        pen = ImageDraw.Draw(picture)
        pen.rounded_rectangle((x0 + 3, y0 + 3, x1 - 3, y1 - 3), 4, fill="white", outline="#0072B2")
        font = ImageFont.truetype(str(fonts_folder() / FULL), 0.5 * (y1 - y0))
        pen.text((x0 + 10, (y0 + y1) / 2), self.place.typed, font=font, fill="black", anchor="lm")
        return picture

    @property
    def field(self) -> Element | None:
        """The screen's text field, or None."""
        return next((element for element in self.screen.elements if element.role == "field"), None)

    def at(self, point: tuple[int, int]) -> Element | None:
        """The element at a point (thousandths of the screen); the smallest if several overlap."""
        x, y = (value / (COORDINATE_MAX + 1) * side for value, side in zip(point, self.size))
        hit = [e for e in self.screen.elements if e.box[0] <= x < e.box[2] and e.box[1] <= y < e.box[3]]
        return min(hit, key=lambda e: (e.box[2] - e.box[0]) * (e.box[3] - e.box[1]), default=None)

    def do(self, action: Action) -> str:
        """Carry out an action and return its effect in a few words. Actions the phone lacks change nothing."""
        if action.name in ("Tap", "Double Tap", "Long Press"):
            return self._tap(self.at(action.point))
        if action.name == "Swipe":
            return self._swipe(action.arguments["start"], action.arguments["end"])
        if action.name in ("Type", "Type_Name"):
            return self._type(action.arguments["text"])
        if action.name == "Launch":
            app = action.arguments["app"]
            self._stack = [self._stack[0], self._opened((), app)]
            return f"started {app}"
        if action.name == "Back":
            if len(self._stack) > 1:
                self._stack.pop()
                return "went back"
            return "nothing to go back to"
        if action.name == "Home":
            self._stack = [Place("home")]
            return "went home"
        if action.name == "finish":
            return f"finished: {action.arguments['message']}"
        return f"{action.name}: nothing changed"

    def _tap(self, element: Element | None) -> str:
        if element is None:
            return "tapped nothing"
        place, label = self.place, element.label
        if element.role == "app":
            self._stack.append(self._opened(place.way, label))
            return f"opened {label}"
        if element.role == "row" and place.kind in _LISTS:
            self._stack.append(Place("detail", (*place.way, label)))
            return f"opened {label}"
        if element.role == "tab":
            self._stack.append(Place(place.kind, (*place.way, label)))
            return f"changed to {label}"
        if element.role == "chip":
            self._stack[-1] = replace(place, typed=label)
            return f"took {label}"
        if element.kind == "icon" and label == "back" and len(self._stack) > 1:
            self._stack.pop()
            return "went back"
        return f"tapped {label}"

    def _swipe(self, start: tuple[int, int], end: tuple[int, int]) -> str:
        moved = start[1] - end[1]
        if abs(moved) < LEAST_SWIPE or abs(moved) < abs(start[0] - end[0]):
            return "swiped, nothing moved"
        to = self.place.scrolled + (1 if moved > 0 else -1)
        if self.place.kind not in _LISTS or to < 0:
            return "swiped, nothing moved"
        self._stack[-1] = replace(self.place, scrolled=to)
        return "scrolled down" if moved > 0 else "scrolled up"

    def _type(self, text: str) -> str:
        if self.field is None:
            return "typed, but there is no field"
        self._stack[-1] = replace(self.place, typed=text)
        return f"typed {text}"

    def _opened(self, way: tuple[str, ...], app: str) -> Place:
        kind = next((kind for kind, names in _APPS.items() if app in names), "menu")
        return Place(kind, (*way, app))
