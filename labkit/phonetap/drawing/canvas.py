"""A canvas that draws phone interfaces in logical units and reports the ink of what it drew.

A screen is 196 units wide whatever its pixels; `Canvas` multiplies by `scale` and rounds to whole pixels, so
every edge but curves and text is sharp. Curves come from small masks drawn at four times their size, cached.
Boxes that methods take are in units, boxes that they return are in pixels: (x0, y0, x1, y1), right and bottom
exclusive. With `dry=True` it draws nothing and returns the same boxes, which gives a screen's elements without
its image.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from PIL import Image, ImageDraw

from labkit.phonetap.drawing.fonts import Typeface
from labkit.phonetap.drawing.icons import glyph, glyph_ink

Box = tuple[float, float, float, float]
Colour = tuple[int, int, int]
UNITS_WIDE = 196
_SAMPLES = 4


@lru_cache(maxsize=1024)
def corner_mask(radius: int) -> Image.Image:
    """The top left quarter of a disc of `radius` pixels, anti-aliased ("L")."""
    big = Image.new("L", (radius * _SAMPLES,) * 2)
    ImageDraw.Draw(big).ellipse((0, 0, 2 * radius * _SAMPLES - 1, 2 * radius * _SAMPLES - 1), fill=255)
    return big.resize((radius, radius), Image.Resampling.BOX)


@lru_cache(maxsize=1024)
def rounded_mask(width: int, height: int, radius: int) -> Image.Image:
    """A rectangle with round corners as a mask ("L"), anti-aliased."""
    radius = max(0, min(radius, width // 2, height // 2))
    mask = Image.new("L", (width, height), 255)
    if radius:
        quarter = corner_mask(radius)
        mirrored = quarter.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        flip = Image.Transpose.FLIP_TOP_BOTTOM
        mask.paste(quarter, (0, 0))
        mask.paste(mirrored, (width - radius, 0))
        mask.paste(quarter.transpose(flip), (0, height - radius))
        mask.paste(mirrored.transpose(flip), (width - radius, height - radius))
    return mask


@lru_cache(maxsize=512)
def shape_mask(shape: str, side: int) -> Image.Image:
    """The outline of an app icon as a mask: circle, squircle, rounded, square, leaf, hexagon or octagon."""
    if shape in ("circle", "rounded", "square"):
        radius = {"circle": side // 2, "rounded": side // 5, "square": max(1, side // 14)}[shape]
        return rounded_mask(side, side, radius)
    if shape == "squircle":
        return rounded_mask(side, side, side // 3)
    big = Image.new("L", (side * _SAMPLES,) * 2)
    pen, n = ImageDraw.Draw(big), side * _SAMPLES - 1
    if shape == "leaf":
        pen.rounded_rectangle((0, 0, n, n), n * 0.42, fill=255, corners=(True, False, True, False))
        pen.rounded_rectangle((0, 0, n, n), n * 0.12, fill=255)
        pen.rectangle((0, 0, n * 0.42, n * 0.42), fill=0)
        pen.rectangle((n * 0.58, n * 0.58, n, n), fill=0)
        pen.ellipse((0, 0, n * 0.84, n * 0.84), fill=255)
        pen.ellipse((n * 0.16, n * 0.16, n, n), fill=255)
    elif shape == "hexagon":
        points = [(0.5, 0), (0.95, 0.25), (0.95, 0.75), (0.5, 1), (0.05, 0.75), (0.05, 0.25)]
        pen.polygon([(x * n, y * n) for x, y in points], fill=255)
    elif shape == "octagon":
        cut = 0.26
        points = [
            (cut, 0),
            (1 - cut, 0),
            (1, cut),
            (1, 1 - cut),
            (1 - cut, 1),
            (cut, 1),
            (0, 1 - cut),
            (0, cut),
        ]
        pen.polygon([(x * n, y * n) for x, y in points], fill=255)
    else:
        raise ValueError(f"unknown icon shape {shape!r}")
    return big.resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=256)
def gradient_mask(width: int, height: int, vertical: bool) -> Image.Image:
    """A ramp from 0 to 255 ("L"), top to bottom or left to right."""
    ramp = Image.linear_gradient("L")
    if not vertical:
        ramp = ramp.transpose(Image.Transpose.ROTATE_90)
    return ramp.resize((width, height), Image.Resampling.BILINEAR)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """`share` of b and the rest of a."""
    return tuple(int(x + (y - x) * share + 0.5) for x, y in zip(a, b))


def luminance(colour: Colour) -> float:
    """Perceived brightness, 0 to 1."""
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


def union(*boxes: Box | None) -> Box:
    """The smallest box around all boxes that are not None."""
    present = [b for b in boxes if b is not None]
    return (
        min(b[0] for b in present),
        min(b[1] for b in present),
        max(b[2] for b in present),
        max(b[3] for b in present),
    )


def intersects(a: Box, b: Box) -> bool:
    """Whether two boxes share any area."""
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


class Written(NamedTuple):
    """One line of text as it was drawn: letter i stands between edges[i] and edges[i + 1] (pixels)."""

    text: str
    edges: tuple[float, ...]
    top: float
    bottom: float


class Canvas:
    """One screen being drawn. Attributes: image (RGB), scale (pixels a unit), width and height in units."""

    def __init__(self, size: tuple[int, int], typeface: Typeface, dry: bool = False):
        self.size, self.typeface, self.dry = size, typeface, dry
        self.scale = size[0] / UNITS_WIDE
        self.width, self.height = float(UNITS_WIDE), size[1] / self.scale
        self.image = Image.new("RGB", (1, 1) if dry else size)
        self.pen = ImageDraw.Draw(self.image)
        self.written: list[Written] = []  # what can be read, for a trainer; a pop-up's dimming empties it

    def px(self, units: float) -> int:
        """Units to whole pixels."""
        return int(units * self.scale + 0.5) if units >= 0 else -int(-units * self.scale + 0.5)

    def pixels(self, box: Box) -> tuple[int, int, int, int]:
        """A box in units as a box in whole pixels."""
        return self.px(box[0]), self.px(box[1]), self.px(box[2]), self.px(box[3])

    def paste(self, image: Image.Image, left: int = 0, top: int = 0) -> None:
        """Put an image's top left corner at a pixel."""
        if not self.dry:
            self.image.paste(image, (left, top))

    def rect(self, box: Box, colour: Colour) -> Box:
        """A filled rectangle."""
        x0, y0, x1, y1 = self.pixels(box)
        if not self.dry and x1 > x0 and y1 > y0:
            self.image.paste(colour, (x0, y0, x1, y1))
        return x0, y0, x1, y1

    def line(self, x0: float, x1: float, y: float, colour: Colour, width: float = 0.6) -> None:
        """A horizontal hairline, at least one pixel thick."""
        if not self.dry:
            top, thick = self.px(y), max(1, self.px(width))
            self.image.paste(colour, (self.px(x0), top, self.px(x1), top + thick))

    def round(
        self, box: Box, radius: float, colour: Colour, edge: Colour | None = None, edge_width: float = 1
    ) -> Box:
        """A filled rectangle with round corners and, with `edge`, an outline inside it."""
        x0, y0, x1, y1 = self.pixels(box)
        if not self.dry and x1 > x0 and y1 > y0:
            self._fill_round(x0, y0, x1, y1, self.px(radius), colour if edge is None else edge)
            if edge is not None:
                thick = max(1, self.px(edge_width))
                if x1 - x0 > 2 * thick and y1 - y0 > 2 * thick:
                    inner = self.px(radius) - thick
                    self._fill_round(x0 + thick, y0 + thick, x1 - thick, y1 - thick, inner, colour)
        return x0, y0, x1, y1

    def _fill_round(self, x0: int, y0: int, x1: int, y1: int, radius: int, colour: Colour) -> None:
        radius = max(0, min(radius, (x1 - x0) // 2, (y1 - y0) // 2))
        if radius:
            top = rounded_mask(x1 - x0, 2 * radius, radius)
            if y1 - y0 == 2 * radius:
                self.image.paste(colour, (x0, y0, x1, y1), top)
                return
            self.image.paste(colour, (x0, y0, x1, y0 + radius), top.crop((0, 0, x1 - x0, radius)))
            self.image.paste(colour, (x0, y1 - radius, x1, y1), top.crop((0, radius, x1 - x0, 2 * radius)))
        self.image.paste(colour, (x0, y0 + radius, x1, y1 - radius))

    def glass(self, box: Box, radius: float, colour: Colour, share: float) -> Box:
        """A translucent panel: `share` of colour over what is there."""
        x0, y0, x1, y1 = self.pixels(box)
        if not self.dry and x1 > x0 and y1 > y0:
            part = self.image.crop((x0, y0, x1, y1))
            tinted = Image.blend(part, Image.new("RGB", part.size, colour), share)
            self.image.paste(tinted, (x0, y0), rounded_mask(x1 - x0, y1 - y0, self.px(radius)))
        return x0, y0, x1, y1

    def disc(self, x: float, y: float, radius: float, colour: Colour) -> Box:
        """A filled circle round (x, y)."""
        side = max(2, self.px(2 * radius))
        left, top = self.px(x - radius), self.px(y - radius)
        if not self.dry:
            self.image.paste(colour, (left, top), rounded_mask(side, side, side // 2))
        return left, top, left + side, top + side

    def tile(
        self, shape: str, x: float, y: float, side: float, fill: Colour, second: Colour | None = None
    ) -> Box:
        """An app icon's shape with its top left at (x, y); with `second`, a vertical gradient to it."""
        pixels = max(4, self.px(side))
        left, top = self.px(x), self.px(y)
        if not self.dry:
            mask = shape_mask(shape, pixels)
            if second is None:
                self.image.paste(fill, (left, top), mask)
            else:
                blend = Image.composite(
                    Image.new("RGB", mask.size, second),
                    Image.new("RGB", mask.size, fill),
                    gradient_mask(pixels, pixels, True),
                )
                self.image.paste(blend, (left, top), mask)
        return left, top, left + pixels, top + pixels

    def measure(self, text: str, size: float, strong: bool = False) -> float:
        """Advance width of `text` in units, at `size` units a letter."""
        return self.typeface.face(text, size * self.scale, strong).width(text) / self.scale

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour,
        align: str = "l",
        strong: bool = False,
        shadow: Colour | None = None,
    ) -> Box:
        """One line of text whose letters' middle is at height y; `align` l, m or r says what x means.

        Returns the tight box of the ink in pixels.
        """
        face = self.typeface.face(text, size * self.scale, strong)
        left = x * self.scale
        if align != "l":
            left -= face.width(text) * (0.5 if align == "m" else 1)
        left, top = int(left + 0.5), int(y * self.scale - face.middle + 0.5)
        image = None if self.dry else self.image
        if shadow is not None and not self.dry:
            offset = max(1, self.px(0.7))
            face.draw(image, left + offset, top + offset, text, shadow)
        ink = face.draw(image, left, top, text, colour)
        if not self.dry:
            edges = accumulate((face.glyph(letter).advance for letter in text), initial=left)
            self.written.append(Written(text, tuple(edges), ink[1], ink[3]))
        return ink

    def glyph(
        self,
        name: str,
        x: float,
        y: float,
        side: float,
        colour: Colour,
        stroke: float = 2.0,
        filled: bool = False,
    ) -> Box:
        """A glyph icon centred on (x, y). Returns its ink in pixels."""
        pixels = max(8, self.px(side))
        left, top = int(x * self.scale - pixels / 2 + 0.5), int(y * self.scale - pixels / 2 + 0.5)
        if self.dry:
            ink = glyph_ink(name, pixels, stroke, filled)
        else:
            self.image.paste(colour, (left, top), glyph(name, pixels, stroke, filled))
            ink = glyph_ink(name, pixels, stroke, filled)
        return left + ink[0], top + ink[1], left + ink[2], top + ink[3]

    def dim(self, share: float) -> None:
        """Darken everything drawn so far."""
        self.written.clear()
        if not self.dry:
            keep = int(256 * (1 - share))
            self.image.paste(self.image.point([value * keep >> 8 for value in range(256)] * 3))
