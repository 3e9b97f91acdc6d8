"""Synthetic phone screens with exact ground truth, drawn from a seed.

    screen = draw_screen(7, kind="settings", lang="zh")
    screen.image, [(e.label, e.box) for e in screen.elements]

The same arguments give the same pixels everywhere: one `random.Random(seed)`, no trigonometry in wallpapers,
Pillow's own rasterizers, fonts of this repository.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from labkit.common.errors import ScreenError
from labkit.phonetap import words as phonetap_words
from labkit.phonetap.drawing.canvas import Canvas, Written
from labkit.phonetap.drawing.fonts import has_chinese
from labkit.phonetap.drawing.home import home
from labkit.phonetap.drawing.inputs import keyboard, search
from labkit.phonetap.drawing.lists import contacts, messages, settings
from labkit.phonetap.drawing.pages import detail, loading, menu
from labkit.phonetap.drawing.popups import dialog, toast
from labkit.phonetap.drawing.scene import DENSITIES, Element, Scene
from labkit.phonetap.drawing.themes import OPTIONS, choose_theme

__all__ = ["DEFAULT_SIZE", "KINDS", "Element", "Screen", "ScreenError", "draw_screen", "render"]

KINDS = (
    "home",
    "settings",
    "contacts",
    "messages",
    "menu",
    "dialog",
    "search",
    "keyboard",
    "loading",
    "detail",
)
DEFAULT_SIZE = (196, 420)
_WEIGHTS = (22, 16, 9, 9, 14, 10, 6, 5, 2, 7)
_LAYOUTS = {
    function.__name__: function
    for function in (home, settings, contacts, messages, menu, dialog, search, keyboard, loading, detail)
}
_WITH_TOASTS = ("home", "settings", "contacts", "messages", "menu", "detail")
_ATTEMPTS = 12


@dataclass(frozen=True)
class Screen:
    """One screen: its settings, its elements (boxes in pixels), and its image, drawn on first use.

    `state` holds what instructions depend on: "keyboard", "popup", "loading", "scrolls" (bool),
    "field" (text typed so far), "covered" (labels visible below a pop-up, not tappable).
    """

    seed: int
    size: tuple[int, int]
    kind: str
    lang: str
    style: str
    elements: tuple[Element, ...]
    state: Mapping[str, Any]
    recipe: tuple

    @cached_property
    def image(self) -> Image.Image:
        """The picture (RGB, `size`)."""
        return _compose(*self.recipe, dry=False).canvas.image

    def sha256(self) -> str:
        """Hash of the picture's size and pixels."""
        digest = hashlib.sha256(repr(self.size).encode())
        digest.update(self.image.tobytes())
        return digest.hexdigest()

    def find(self, label: str) -> Element:
        """The element with this label; KeyError if there is none."""
        for element in self.elements:
            if element.label == label:
                return element
        raise KeyError(label)


def _check(size, kind, lang, density, style, part) -> None:
    def check(what: str, value, choices: Sequence[str]) -> None:
        if value is not None and value not in choices:
            raise ScreenError(f"unknown {what} {value!r}; known: {', '.join(choices)}")

    check("kind", kind, KINDS)
    check("language", lang, ("zh", "en"))
    check("density", density, DENSITIES)
    check("style", style, tuple(OPTIONS))
    check("part", part, ("train", "calibration", "test"))
    width, height = size
    if width < 112 or not 1.5 <= height / width <= 2.6:
        raise ScreenError(
            f"size {width}x{height} is no phone screen: it needs a width of 112 or more and a height of "
            "1.5 to 2.6 times the width"
        )


def _compose(seed, size, kind, lang, density, hard, style, part, words, must_have, attempt, dry) -> Scene:
    """Run one layout. Everything random comes from `seed` and `attempt`."""
    rng = random.Random(seed * 64 + attempt)
    canvas = Canvas(size, None, dry)
    theme = choose_theme(rng, style, hard, canvas.scale)
    canvas.typeface = theme.typeface
    scene = Scene(
        rng, canvas, theme, words or phonetap_words, part=part, lang=lang, hard=hard, density=density,
        must_have=must_have,
    )  # fmt: skip
    scene.state |= {
        "keyboard": False,
        "field": "",
        "popup": False,
        "loading": False,
        "scrolls": False,
        "covered": (),
    }
    _LAYOUTS[kind](scene)
    if kind in _WITH_TOASTS and rng.random() < (0.2 if hard else 0.06):
        toast(scene)
    return scene


def _plan(seed, size, kind, lang, density, hard, style, part, words, must_have) -> tuple:
    """Draw the open settings from the seed."""
    _check(size, kind, lang, density, style, part)
    rng = random.Random(f"plan {seed}")
    kind_drawn, lang_drawn = rng.choices(KINDS, _WEIGHTS)[0], rng.choice(("zh", "en"))
    density_drawn = rng.choice(DENSITIES)
    must_have = tuple(must_have)
    if must_have:
        lang = "zh" if any(map(has_chinese, must_have)) else "en"
        if len({label.casefold() for label in must_have}) < len(must_have):
            raise ScreenError(f"must_have names a label twice: {', '.join(must_have)}")
    if density is None:
        density = "high" if hard else density_drawn
    part = part or ("test" if style == "test" else "train")
    return (
        seed,
        tuple(size),
        kind or kind_drawn,
        lang or lang_drawn,
        density,
        hard,
        style,
        part,
        words,
        must_have,
    )


def _draw(plan: tuple, dry: bool) -> tuple[Scene, tuple]:
    """Compose until the screen has every label of `must_have`; ScreenError if no attempt has room."""
    must_have = plan[-1]
    for attempt in range(_ATTEMPTS):
        scene = _compose(*plan, attempt, dry=dry)
        labels = {element.label for element in scene.elements}
        if scene.elements and labels.issuperset(must_have):
            return scene, (*plan, attempt)
    raise ScreenError(f"no {plan[2]!r} screen of size {plan[1]} has room for {', '.join(must_have)}")


def draw_screen(
    seed: int,
    *,
    size: tuple[int, int] = DEFAULT_SIZE,
    kind: str | None = None,
    lang: str | None = None,
    density: str | None = None,
    hard: bool = False,
    style: str = "train",
    part: str | None = None,
    words: ModuleType | None = None,
    must_have: Sequence[str] = (),
) -> Screen:
    """The screen of a seed; settings that are None are drawn from the seed.

    size: pixels (width, height). density: low, normal or high. hard: small labels, many elements, look-alike
    names. style: "train" or "test" designs. part: which labels may appear (default: "test" in style "test",
    else "train"). words: a module like labkit.phonetap.words. must_have: labels that must be on the screen;
    they decide the language. Raises ScreenError for unknown names, for sizes that no phone has, and if
    `must_have` does not fit.
    """
    scene, recipe = _draw(
        _plan(seed, size, kind, lang, density, hard, style, part, words, must_have), dry=True
    )
    elements = tuple(scene.elements)
    return Screen(seed, recipe[1], recipe[2], recipe[3], style, elements, dict(scene.state), recipe)


def render(seed: int, **settings: Any) -> tuple[np.ndarray, tuple[Element, ...]]:
    """The same as `draw_screen` in one pass: pixels (uint8 [height, width, 3]) and elements."""
    return render_with_text(seed, **settings)[:2]


def render_with_text(
    seed: int, **settings: Any
) -> tuple[np.ndarray, tuple[Element, ...], tuple[Written, ...]]:
    """As `render`, with every legible line of text, tappable or not, and the positions of its letters."""
    defaults = {
        "size": DEFAULT_SIZE, "kind": None, "lang": None, "density": None, "hard": False, "style": "train",
        "part": None, "words": None, "must_have": (),
    }  # fmt: skip
    unknown = set(settings) - set(defaults)
    if unknown:
        raise TypeError(f"unknown settings: {', '.join(sorted(unknown))}; known: {', '.join(defaults)}")
    scene, _ = _draw(_plan(seed, **(defaults | settings)), dry=False)
    return np.asarray(scene.canvas.image), tuple(scene.elements), tuple(scene.canvas.written)
