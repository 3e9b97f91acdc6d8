"""The fonts of synthetic screens: small, freely licensed files in assets/fonts (sources in its README).

Text is laid out with Pillow's basic engine, so that a screen has the same pixels on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from labkit.common.errors import LabError
from labkit.common.files import assets_folder

Colour = tuple[int, int, int]
Box = tuple[float, float, float, float]

FULL = "zh-hei.otf"  # has all of GB 2312's first level: stands in where another font lacks a character
PUNCTUATION = "…·“”‘’—×–°€£¥•、。《》「」！（），：；？～→←％＋"
# Families: (regular, strong) file names. The last group of each script is held out for style "test".
FAMILIES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("zh", "train"): (
        ("zh-hei.otf", "zh-hei-medium.otf"),
        ("zh-hei-medium.otf", "zh-hei-medium.otf"),
        ("zh-kai.ttf", "zh-kai.ttf"),
        ("zh-oblique.ttf", "zh-oblique.ttf"),
    ),
    ("en", "train"): (
        ("en-grotesk.ttf", "en-grotesk-medium.ttf"),
        ("en-neo.otf", "en-neo-semibold.otf"),
        ("en-humanist.ttf", "en-humanist.ttf"),
        ("en-cant.otf", "en-cant.otf"),
        ("en-condensed.ttf", "en-grotesk-medium.ttf"),
    ),
    ("zh", "test"): (("zh-micro.ttf", "zh-micro.ttf"),),
    ("en", "test"): (("en-open.ttf", "en-open.ttf"),),
}


def fonts_folder() -> Path:
    """The folder of the fonts."""
    return assets_folder() / "fonts"


class Glyph(NamedTuple):
    """One character's picture: mask ("L", None for a blank), where it lies from the pen's place, the advance.

    Pixels; y counts from the top of the ascender.
    """

    mask: Image.Image | None
    left: int
    top: int
    right: int
    bottom: int
    advance: float


class Face:
    """One font at one size (pixels), which draws every character once and keeps its picture.

    `middle` is the distance from the top of the ascender to the middle of a typical letter, so that text
    placed by it looks centred whatever the font's own metrics are.
    """

    def __init__(self, path: Path, size: float):
        self.font = ImageFont.truetype(str(path), size, layout_engine=ImageFont.Layout.BASIC)
        _, top, _, bottom = self.font.getbbox("国" if path.name.startswith("zh") else "Hn")
        self.middle = (top + bottom) / 2
        self._glyphs: dict[str, Glyph] = {}

    def glyph(self, character: str) -> Glyph:
        """The picture of one character."""
        glyph = self._glyphs.get(character)
        if glyph is None:
            left, top, right, bottom = (int(edge) for edge in self.font.getbbox(character))
            mask = None
            if right > left and bottom > top:
                mask = Image.new("L", (right - left, bottom - top))
                ImageDraw.Draw(mask).text((-left, -top), character, 255, self.font)
            glyph = Glyph(mask, left, top, right, bottom, self.font.getlength(character))
            self._glyphs[character] = glyph
        return glyph

    def width(self, text: str) -> float:
        """Advance width of `text` in pixels."""
        return sum(self.glyph(character).advance for character in text)

    def draw(self, image: Image.Image | None, left: int, top: int, text: str, colour: Colour) -> Box:
        """Draw `text` (or with None only measure it); (left, top) is the pen's start and the ascender's top.

        Returns the tight box of the ink.
        """
        x0, y0, x1, y1 = 1 << 30, 1 << 30, -(1 << 30), -(1 << 30)
        pen = float(left)
        for character in text:
            glyph = self.glyph(character)
            if glyph.mask is not None:
                x, y = int(pen + 0.5) + glyph.left, top + glyph.top
                if image is not None:
                    image.paste(colour, (x, y), glyph.mask)
                x0, y0 = min(x0, x), min(y0, y)
                x1, y1 = max(x1, x + glyph.right - glyph.left), max(y1, y + glyph.bottom - glyph.top)
            pen += glyph.advance
        return (x0, y0, x1, y1) if x1 > x0 else (left, top, left, top)


@cache
def limited_characters() -> frozenset[str]:
    """Characters that every Chinese font here has."""
    path = fonts_folder() / "characters.txt"
    if not path.exists():
        raise LabError(
            f"{path} is missing: in a checkout, make the fonts with `python -m labkit.models.pocket.training.fonts`"
        )
    return frozenset(path.read_text(encoding="utf-8").rstrip("\n")) | frozenset(map(chr, range(32, 127)))


@lru_cache(maxsize=512)
def _load(name: str, size: float) -> Face:
    path = fonts_folder() / name
    if not path.exists():
        raise LabError(
            f"{path} is missing: in a checkout, make the fonts with `python -m labkit.models.pocket.training.fonts`"
        )
    return Face(path, size)


@cache
def gb2312_first_level() -> frozenset[str]:
    """The 3,755 characters of GB 2312's first level."""
    pairs = (bytes((high, low)) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return frozenset("".join(pair.decode("gb2312", "ignore") for pair in pairs))


@lru_cache(maxsize=8192)
def _needs_full(text: str) -> bool:
    """Whether only the full font can draw `text`; LabError when it cannot either."""
    lacking = set(text) - limited_characters()
    unknown = "".join(sorted(lacking - gb2312_first_level()))
    if unknown:
        raise LabError(
            f"no font here can draw {unknown!r} of {text!r}: they have ASCII and the 3,755 commonest Chinese "
            "characters"
        )
    return bool(lacking)


def has_chinese(text: str) -> bool:
    """Whether any character is Chinese."""
    return any(ord(c) > 0x2E7F for c in text)


@dataclass(frozen=True)
class Typeface:
    """The fonts of one screen: a Chinese and a Latin family, (regular, strong) each."""

    zh: tuple[str, str]
    en: tuple[str, str]

    def face(self, text: str, size: float, strong: bool = False) -> Face:
        """The face that draws `text` at `size` pixels; sizes are rounded to half pixels."""
        size = max(4.0, int(size * 2 + 0.5) / 2)
        if text.isascii():
            return _load(self.en[strong], size)
        return _load(FULL if _needs_full(text) else self.zh[strong], size)
