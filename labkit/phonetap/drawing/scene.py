"""A screen while it is laid out: its elements, the words already used, and helpers for all layouts."""

from __future__ import annotations

import random
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from labkit.phonetap.drawing.canvas import Box, Canvas, Colour, intersects, mix, union
from labkit.phonetap.drawing.fonts import has_chinese
from labkit.phonetap.drawing.icons import ICON_NAMES
from labkit.phonetap.drawing.themes import SUITABLE, WHITE, Theme, readable_on

DENSITIES = ("low", "normal", "high")


@dataclass(frozen=True)
class Element:
    """Something that can be tapped. Boxes are pixels (x0, y0, x1, y1), right and bottom exclusive.

    kind "text": `label` is written on the screen; "icon": a glyph only, `label` is its key in words.ICONS.
    box: the tap target (icon and label together, the whole row, the whole button). ink: what is drawn in it.
    role: app, row, button, tab, field, icon, key, toggle or chip.
    """

    label: str
    kind: str
    lang: str
    box: Box
    role: str
    ink: Box


class Scene:
    """Draws on `canvas` and collects `elements`; every label and icon is used once a screen."""

    def __init__(self, rng: random.Random, canvas: Canvas, theme: Theme, words: ModuleType, **settings: Any):
        self.rng, self.canvas, self.theme, self.words = rng, canvas, theme, words
        self.part: str = settings["part"]
        self.lang: str = settings["lang"]
        self.hard: bool = settings["hard"]
        self.density: str = settings["density"]
        self.must: list[str] = list(settings["must_have"])
        self.required = frozenset(self.must)
        self.elements: list[Element] = []
        self.state: dict[str, Any] = {}
        self.used: set[str] = {label.casefold() for label in self.must}
        self.icons: set[str] = set()  # glyphs on the screen
        self.decorations: set[str] = set()  # those of them that accompany labels: may repeat, are no targets
        self.shown: list[str] = []
        self.size = theme.sizes[self.lang]
        self.top, self.bottom = 0.0, canvas.height
        self.width = canvas.width
        self.navigation, self.floor = "none", canvas.height
        self.key_ground: Colour = theme.background

    # words -------------------------------------------------------------------------------------------------
    def count(self, low: int, normal: int, high: int) -> int:
        """About as many things as the density asks for, a quarter more in a hard screen."""
        middle = {"low": low, "normal": normal, "high": high + high // 4 * self.hard}[self.density]
        return max(1, middle + self.rng.randint(-1, 1))

    def claim(self, label: str) -> bool:
        """Take a label for this screen; False when it is already written somewhere on it."""
        key = label.casefold()
        if key in self.used or (len(key) > 1 and any(key in text for text in self.shown)):
            return False
        self.used.add(key)
        return True

    def fits(self, label: str, width: float | None, lines: int = 1, size: float | None = None) -> bool:
        return width is None or len(self.wrap(label, width, size)) <= lines

    def wrap(self, label: str, width: float, size: float | None = None) -> list[str]:
        """`label` broken at spaces into lines of at most `width` units; [""] * 9 where a word is too long."""
        size = size or self.size
        lines: list[str] = []
        for word in label.split(" "):
            joined = f"{lines[-1]} {word}" if lines else word
            if lines and self.canvas.measure(joined, size) <= width:
                lines[-1] = joined
            elif self.canvas.measure(word, size) <= width:
                lines.append(word)
            else:
                return [""] * 9
        return lines

    def labels(
        self, kind: str, count: int, width: float | None = None, lines: int = 1, size: float | None = None
    ) -> list[str]:
        """Up to `count` new labels of a kind that fit; required labels come first."""
        rng = self.rng
        first = [label for label in self.must if self.fits(label, width, lines, size)][:count]
        self.must = [label for label in self.must if label not in first]
        chosen: list[str] = list(first)
        pool: list[str] = []
        for _ in range(12):
            if len(chosen) >= count:
                break
            if not pool:
                pool = self.words.sample_labels(
                    rng, kind, self.lang, min(12, count - len(chosen) + 3), self.part
                )
            label = pool.pop()
            while pool and not (self.fits(label, width, lines, size) and self._new(label)):
                label = pool.pop()
            self._take(label, chosen, count, width, lines, size)
            while pool and len(chosen) < count:
                self._take(pool.pop(), chosen, count, width, lines, size)
        rng.shuffle(chosen)
        return chosen

    def _new(self, label: str) -> bool:
        return label.casefold() not in self.used

    def _take(self, label: str, chosen: list[str], count: int, width, lines: int, size: float | None) -> None:
        """Add a label, and in a hard screen often some that look like it."""
        if not self.fits(label, width, lines, size) or not self.claim(label):
            return
        chosen.append(label)
        if self.hard and self.rng.random() < 0.75:
            others = self.words.lookalikes(self.rng, label, self.lang, self.part)
            self.rng.shuffle(others)
            for other in others[: self.rng.randint(1, 3)]:
                if len(chosen) < count and self.fits(other, width, lines, size) and self.claim(other):
                    chosen.append(other)

    def filler(self, length: int) -> str:
        """Running text that contains no label of this screen; "" if no attempt succeeds."""
        for _ in range(3):
            text = self.words.filler(self.rng, self.lang, length)
            folded = text.casefold()
            if text and not any(label in folded for label in self.used if len(label) > 1):
                self.shown.append(folded)
                return text
        return ""

    def title(self) -> str:
        """A heading that is no target and shares no words with one."""
        for _ in range(4):
            text = self.words.title(self.rng, self.lang)
            if not any(label in text.casefold() for label in self.used):
                self.used.add(text.casefold())
                return text
        return ""

    # elements ----------------------------------------------------------------------------------------------
    def add(self, label: str, kind: str, role: str, box: Box, ink: Box) -> None:
        """Record a target, in pixels; the box is widened to hold the ink and cut at the screen."""
        x0, y0, x1, y1 = union(box, ink)
        w, h = self.canvas.size
        box = (float(max(0, x0)), float(max(0, y0)), float(min(w, x1)), float(min(h, y1)))
        inside = ink[0] >= 0 and ink[1] >= 0 and ink[2] <= w and ink[3] <= h
        if inside and box[2] > box[0] and box[3] > box[1]:
            lang = "zh" if has_chinese(label) else "en"
            self.elements.append(Element(label, kind, self.lang if kind == "icon" else lang, box, role, ink))

    def must_near(self, box: Box) -> bool:
        """Whether a target that must stay lies below `box` (pixels)."""
        return any(e.label in self.required and intersects(e.box, box) for e in self.elements)

    def cover(self, box: Box) -> None:
        """Something is drawn over `box` (pixels): targets that it touches can no longer be tapped."""
        self.elements = [e for e in self.elements if not intersects(e.box, box)]

    def take_icons(self, count: int, prefer: tuple[str, ...] = ()) -> list[str]:
        """Names of glyphs not yet on the screen; `prefer` first, each with good odds."""
        chosen = [name for name in prefer[:count] if self.rng.random() < 0.75 and self.take_icon(name)]
        rest = list(ICON_NAMES)
        self.rng.shuffle(rest)
        while rest and len(chosen) < count:
            name = rest.pop()
            if self.take_icon(name):
                chosen.append(name)
        return chosen

    def take_icon(self, name: str) -> bool:
        """Reserve a glyph as a target; False when it, or a label it is called by, is already in use."""
        names = {name, *(text.casefold() for texts in self.words.ICONS[name].values() for text in texts)}
        if name in self.icons or names & self.used:
            return False
        self.icons.add(name)
        self.used |= names
        return True

    def decoration(self, label: str) -> str | None:
        """A glyph beside a label: a suitable one or any, never a glyph that is a target itself."""
        name = SUITABLE.get(label)
        if name is None or self.rng.random() < 0.25:
            name = self.rng.choice(ICON_NAMES)
        if name in self.icons and name not in self.decorations:
            return None
        self.icons.add(name)
        self.decorations.add(name)
        return name

    def icon(
        self,
        name: str,
        x: float,
        y: float,
        side: float,
        colour: Colour,
        plate: Colour | None = None,
        reach: float = 1.5,
    ) -> None:
        """A glyph that is a target by itself, centred on (x, y); `plate` puts a disc behind it.

        The tap target is a square of `reach` times the glyph's side.
        """
        ink = None
        if plate is not None:
            ink = self.canvas.disc(x, y, side * 0.85, plate)
        glyph = self.canvas.glyph(name, x, y, side, colour, self.theme.stroke, self.theme.filled)
        half = side * reach / 2
        box = self.canvas.pixels((x - half, y - half, x + half, y + half))
        self.add(name, "icon", "icon", union(box, ink), glyph)

    # pieces ------------------------------------------------------------------------------------------------
    def caption(
        self, x: float, y: float, label: str, width: float, colour: Colour, shadow: Colour | None = None,
        size: float | None = None, strong: bool = False,
    ) -> tuple[Box, float]:  # fmt: skip
        """A centred label in one or two lines, the first line's middle at y. Returns its ink and height."""
        size = size or self.size
        lines = self.wrap(label, width, size)
        step = size * 1.12
        inks = [
            self.canvas.text(x, y + i * step, line, size, colour, "m", strong, shadow)
            for i, line in enumerate(lines)
        ]
        return union(*inks), step * len(lines)

    def app_tile(self, x: float, y: float, side: float, label: str | None, glyph: str | None = None) -> Box:
        """An app's or a menu entry's picture, its top left at (x, y). `glyph` forces that glyph."""
        theme, rng, canvas = self.theme, self.rng, self.canvas
        first, second = theme.colours(rng)
        look, content = theme.icon_fill, theme.icon_content
        if content == "mixed":
            content = rng.choice(("glyph", "letter", "pattern"))
        fill, ink = first, readable_on(first)
        if look in ("outlined", "pale"):
            ground = WHITE if look == "outlined" else mix(WHITE, first, 0.22)
            fill, ink = ground, mix(first, (0, 0, 0), 0.15)
        if look == "outlined":
            canvas.tile(theme.icon_shape, x, y, side, first)
            edge = max(0.8, side * 0.05)
            canvas.tile(theme.icon_shape, x + edge, y + edge, side - 2 * edge, fill)
            box = canvas.pixels((x, y, x + side, y + side))
        else:
            box = canvas.tile(theme.icon_shape, x, y, side, fill, second if look == "gradient" else None)
        cx, cy = x + side / 2, y + side / 2
        name = glyph or (self.decoration(label or "") if content == "glyph" else None)
        if name is not None:
            canvas.glyph(name, cx, cy, side * 0.62, ink, theme.stroke, theme.filled)
        elif content == "letter" and label:
            canvas.text(cx, cy, label[0], side * 0.55, ink, "m", True)
        else:
            kind, other = rng.randrange(4), mix(fill, ink, 0.75)
            if kind == 0:
                canvas.disc(cx, cy, side * 0.28, other)
                canvas.disc(cx, cy, side * 0.13, fill)
            elif kind == 1:
                for i in range(3):
                    h = side * rng.uniform(0.15, 0.5)
                    left = cx - side * 0.26 + i * side * 0.19
                    canvas.round((left, cy + side * 0.25 - h, left + side * 0.13, cy + side * 0.25), 1, other)
            elif kind == 2:
                canvas.disc(cx - side * 0.1, cy, side * 0.2, other)
                canvas.disc(cx + side * 0.12, cy, side * 0.2, mix(other, second, 0.5))
            else:
                canvas.round((cx - side * 0.26, cy - side * 0.2, cx + side * 0.26, cy + side * 0.2), 2, other)
                canvas.rect((cx - side * 0.26, cy - side * 0.08, cx + side * 0.26, cy), fill)
        return box

    def button(
        self, label: str, box: Box, primary: bool, radius: float | None = None, role: str = "button"
    ) -> None:
        """A button with its label in the middle; `box` in units."""
        fill, colour, edge = self.theme.button_colours(self.rng, primary)
        pixels = self.canvas.pixels(box)
        if fill is not None:
            self.canvas.round(box, self.theme.radius if radius is None else radius, fill, edge)
        middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        ink = self.canvas.text(*middle, label, self.size, colour, "m", primary)
        self.add(label, "text", role, pixels, ink)
