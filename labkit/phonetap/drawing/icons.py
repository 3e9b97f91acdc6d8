"""Glyph icons drawn with Pillow primitives: no icon font, no image files.

Each glyph is drawn on a grid of 24 units at four times its size and averaged down, once for every
(name, size, stroke, filled); the masks are cached. `glyph("heart", 18)` gives an "L" image of 18 x 18 pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

from PIL import Image

from labkit.phonetap.drawing.pen import Pen, Point, bezier, polar


def _back(p: Pen) -> None:
    p.line((20, 12), (4.5, 12))
    p.line((11, 5), (4.5, 12), (11, 19))


def _close(p: Pen) -> None:
    p.line((5.5, 5.5), (18.5, 18.5))
    p.line((18.5, 5.5), (5.5, 18.5))


def _search(p: Pen) -> None:
    p.ring(10.5, 10.5, 6, fill=False)
    p.line((15.2, 15.2), (20.5, 20.5), width=p.stroke * 1.2)


def _settings(p: Pen) -> None:
    teeth: list[Point] = []
    for i in range(8):
        for offset, radius in ((-13, 7.2), (-9, 9.8), (9, 9.8), (13, 7.2)):
            teeth.append(polar(12, 12, radius, i * 45 + offset))
    p.shape(*teeth)
    p.dot(12, 12, 3.2 if p.filled else 3.4 + p.stroke / 2, 0 if p.filled else 255)
    if not p.filled:
        p.dot(12, 12, 3.4 - p.stroke / 2, 0)


def _menu(p: Pen) -> None:
    for y in (6, 12, 18):
        p.line((4, y), (20, y))


def _more(p: Pen) -> None:
    for offset in (-7, 0, 7):
        p.dot(12 if p.filled else 12 + offset, 12 + offset if p.filled else 12, 1.1 + p.stroke / 2)


def _add(p: Pen) -> None:
    p.line((12, 4), (12, 20))
    p.line((4, 12), (20, 12))


def _heart(p: Pen) -> None:
    left = bezier((12, 20.5), (2.5, 14), (1.5, 9), (4, 5.9)) + bezier(
        (4, 5.9), (6.5, 3.2), (10.5, 3.6), (12, 7.2)
    )
    right = [(24 - x, y) for x, y in reversed(left)]
    p.shape(*left, *right)


def _star(p: Pen) -> None:
    p.shape(*(polar(12, 12.8, 9.6 if i % 2 == 0 else 4.2, -90 + 36 * i) for i in range(10)))


def _bell(p: Pen) -> None:
    side = bezier((4, 17.5), (7, 15), (5.5, 10.5), (7, 7.5)) + bezier(
        (7, 7.5), (8.5, 4.6), (10, 4.2), (12, 4.2)
    )
    p.shape(*side, *((24 - x, y) for x, y in reversed(side)))
    p.arc(12, 19.3, 2, 10, 170)
    p.line((12, 2.6), (12, 4))


def _camera(p: Pen) -> None:
    p.box(3, 7, 21, 19.5, 2)
    p.line((8.3, 6.5), (9.6, 4.3), (14.4, 4.3), (15.7, 6.5), width=p.stroke)
    p.draw.polygon(p.at([(8.3, 6.8), (9.6, 4.3), (14.4, 4.3), (15.7, 6.8)]), fill=255)
    p.dot(12, 13, 3.6 + p.stroke / 2, 0 if p.filled else 255)
    p.dot(12, 13, 2.8 if p.filled else 3.6 - p.stroke / 2, 255 if p.filled else 0)


def _phone(p: Pen) -> None:
    thick = p.stroke + (2.4 if p.filled else 1.2)
    p.line(*bezier((6.2, 5.5), (5.8, 12.5), (11.5, 18.2), (18.5, 17.8)), width=thick)
    p.line((5.6, 6.8), (7.4, 4.6), width=thick + 0.6)
    p.line((7.4, 4.6), (9, 7.8), width=thick)
    p.line((17.2, 18.4), (19.4, 16.6), width=thick + 0.6)
    p.line((19.4, 16.6), (16.2, 15), width=thick)


def _mail(p: Pen) -> None:
    p.box(3, 5, 21, 19, 1.6)
    p.line(
        (3.8, 7), (12, 13.2), (20.2, 7), width=p.stroke * (1.1 if p.filled else 1), ink=0 if p.filled else 255
    )


def _home(p: Pen) -> None:
    p.shape((5.5, 10.5), (12, 4.5), (18.5, 10.5), (18.5, 20), (5.5, 20))
    p.line((3, 12), (12, 3.8), (21, 12))
    p.draw.rectangle(
        p.at([(9.8, 14), (14.2, 20 + (p.stroke / 2 if p.filled else 0))]), fill=0 if p.filled else 255
    )
    if not p.filled:
        inner = [(9.8 + p.stroke / 1.6, 14 + p.stroke / 1.6), (14.2 - p.stroke / 1.6, 20 - p.stroke / 2)]
        p.draw.rectangle(p.at(inner), fill=0)


def _user(p: Pen) -> None:
    p.ring(12, 8, 4)
    shoulders = bezier((4, 20.5), (4, 15.5), (8, 14.5), (12, 14.5))
    p.shape(*shoulders, *((24 - x, y) for x, y in reversed(shoulders)))


def _trash(p: Pen) -> None:
    p.shape((5.8, 7), (18.2, 7), (17.2, 20.5), (6.8, 20.5))
    p.line((4, 6.5), (20, 6.5))
    p.line((9, 6), (9.6, 3.5), (14.4, 3.5), (15, 6))
    for x in (10, 14):
        p.line((x, 10.5), (x, 17), width=p.stroke * 0.9, ink=0 if p.filled else 255)


def _edit(p: Pen) -> None:
    p.shape((4, 20), (5, 15.2), (15.8, 4.4), (19.6, 8.2), (8.8, 19))
    p.line((13, 7.4), (16.6, 11), ink=0 if p.filled else 255)
    if p.filled:
        p.line((13, 20.5), (20, 20.5))


def _share(p: Pen) -> None:
    p.line((17.5, 5.5), (6.5, 12), (17.5, 18.5))
    for x, y in ((17.5, 5.5), (6.5, 12), (17.5, 18.5)):
        p.ring(x, y, 2.3)


def _download(p: Pen) -> None:
    p.line((12, 3.5), (12, 15.5))
    p.line((6.5, 10.5), (12, 15.8), (17.5, 10.5))
    p.line((4, 20.2), (20, 20.2))


def _microphone(p: Pen) -> None:
    p.box(9, 3, 15, 14, 3)
    p.arc(12, 11, 6.5, 0, 180)
    p.line((12, 17.5), (12, 21))
    p.line((8.5, 21.2), (15.5, 21.2))


def _lock(p: Pen) -> None:
    p.arc(12, 8.5, 4.3, 180, 360)
    p.line((7.7, 8.5), (7.7, 11))
    p.line((16.3, 8.5), (16.3, 11))
    p.box(5, 11, 19, 20.5, 1.8)
    p.dot(12, 15.6, 1.5, 0 if p.filled else 255)


def _play(p: Pen) -> None:
    p.shape((7, 4.5), (19.5, 12), (7, 19.5))


def _pause(p: Pen) -> None:
    for x in (8.2, 15.8):
        p.line((x, 5), (x, 19), width=p.stroke + 1.6)


def _cart(p: Pen) -> None:
    p.line((2.5, 4), (5.5, 4), (8, 15.5))
    p.shape((6.2, 7), (20.8, 7), (18.8, 15.3), (8, 15.3))
    for x in (9.5, 17.3):
        p.dot(x, 19.4, 1.1 + p.stroke / 2.6)


def _clock(p: Pen) -> None:
    p.ring(12, 12, 8.8)
    p.line((12, 6.8), (12, 12.2), (15.8, 14.4), ink=0 if p.filled else 255)


def _calendar(p: Pen) -> None:
    p.box(3.8, 5.5, 20.2, 20.5, 1.8)
    for x in (8.2, 15.8):
        p.line((x, 3), (x, 7))
    p.line((4.2, 10), (19.8, 10), ink=0 if p.filled else 255)
    for x, y in ((8.2, 13.4), (12, 13.4), (15.8, 13.4), (8.2, 17), (12, 17)):
        p.dot(x, y, 1.15, 0 if p.filled else 255)


def _location(p: Pen) -> None:
    side = bezier((12, 21.5), (8, 16.5), (5, 13), (5, 9.5)) + bezier((5, 9.5), (5, 5.5), (8, 2.8), (12, 2.8))
    p.shape(*side, *((24 - x, y) for x, y in reversed(side)))
    p.dot(12, 9.8, 2.7, 0 if p.filled else 255)
    if not p.filled:
        p.dot(12, 9.8, max(0.6, 2.7 - p.stroke * 0.8), 0)


def _cloud(p: Pen) -> None:
    half = p.stroke / 2
    for grow, ink in ((half, 255), (-half, 0)):
        if ink == 0 and p.filled:
            break
        for x, y, r in ((7, 14.5, 4.5), (12, 10.5, 5.3), (17, 14.3, 4.4)):
            p.dot(x, y, r + grow, ink)
        p.draw.rectangle(p.at([(7, 12), (17, 18.8 + grow)]), fill=ink)


def _sun(p: Pen) -> None:
    p.ring(12, 12, 4.2)
    for i in range(8):
        p.line(polar(12, 12, 7.3, 45 * i), polar(12, 12, 10, 45 * i))


def _moon(p: Pen) -> None:
    outer = [polar(11.5, 12.5, 8.7, a) for a in range(20, 271, 10)]
    p.shape(*outer, *bezier(outer[-1], (9.5, 8), (13.5, 16), outer[0]))


def _wifi(p: Pen) -> None:
    for radius in (14, 9.3, 4.8):
        p.arc(12, 19, radius, -135, -45)
    p.dot(12, 19, 1 + p.stroke / 3)


def _bookmark(p: Pen) -> None:
    p.shape((6, 3.5), (18, 3.5), (18, 20.5), (12, 15.5), (6, 20.5))


def _send(p: Pen) -> None:
    p.shape((3, 11), (21, 3.5), (14.5, 20.8), (11, 13.2))
    p.line((21, 3.5), (11, 13.2), ink=0 if p.filled else 255)


def _image(p: Pen) -> None:
    p.box(3, 4, 21, 20, 1.8)
    ink = 0 if p.filled else 255
    p.dot(8.2, 9, 1.7, ink)
    p.line((4.5, 17.5), (9.5, 12.8), (12.5, 15.6), (16.5, 11), (19.8, 14.6), ink=ink)


def _check(p: Pen) -> None:
    p.line((4, 12.5), (9.8, 18.2), (20.2, 6.5))


def _refresh(p: Pen) -> None:
    p.arc(12, 12.4, 7.8, -20, 265)
    x, y = polar(12, 12.4, 7.8, -95)
    tip = p.at([(x + 4.6, y + 0.2), (x - 0.8, y - 3.8), (x - 0.8, y + 4.2)])
    p.draw.polygon(tip, fill=255)


def _volume(p: Pen) -> None:
    p.shape((3.5, 9.3), (7.5, 9.3), (12.3, 5), (12.3, 19), (7.5, 14.7), (3.5, 14.7))
    p.arc(12.3, 12, 4, -45, 45)
    p.arc(12.3, 12, 7.8, -48, 48)


def _keyboard(p: Pen) -> None:
    p.box(2.5, 6, 21.5, 18.5, 1.6)
    ink = 0 if p.filled else 255
    for x in (6.2, 10, 13.9, 17.8):
        for y in (9.3, 12.4):
            p.dot(x, y, 1.05, ink)
    p.line((8.5, 15.7), (15.5, 15.7), width=1.5, ink=ink)


def _folder(p: Pen) -> None:
    p.shape((3.3, 5), (9.5, 5), (11.8, 7.8), (20.7, 7.8), (20.7, 19), (3.3, 19))
    if p.filled:
        p.line((4.5, 10), (19.5, 10), width=1.2, ink=0)


def _globe(p: Pen) -> None:
    p.ring(12, 12, 8.8, fill=False)
    p.line((3.4, 12), (20.6, 12))
    for x in (6.5, 17.5):
        p.line(*bezier((12, 3.2), (x, 7), (x, 17), (12, 20.8)))
    if p.filled:
        p.line((12, 3.4), (12, 20.6))


_DRAWERS: dict[str, Callable[[Pen], None]] = {
    name.removeprefix("_"): value
    for name, value in list(globals().items())
    if name.startswith("_") and callable(value) and not name.startswith("__")
}
ICON_NAMES: Sequence[str] = tuple(_DRAWERS)


@lru_cache(maxsize=2048)
def glyph(name: str, size: int, stroke: float = 2.0, filled: bool = False) -> Image.Image:
    """The mask ("L", size x size) of one glyph; `stroke` is in units of the 24-unit grid.

    Raises ValueError that lists the known names when `name` is not one of them. The image is shared: copy it
    before changing it.
    """
    if name not in _DRAWERS:
        raise ValueError(f"unknown icon {name!r}; known: {', '.join(ICON_NAMES)}")
    pen = Pen(max(6, size), stroke, filled)
    _DRAWERS[name](pen)
    return pen.image.resize((size, size), Image.Resampling.BOX)


@lru_cache(maxsize=2048)
def glyph_ink(name: str, size: int, stroke: float = 2.0, filled: bool = False) -> tuple[int, int, int, int]:
    """The tight box round what `glyph` draws, in pixels of its mask."""
    return glyph(name, size, stroke, filled).getbbox() or (0, 0, size, size)
