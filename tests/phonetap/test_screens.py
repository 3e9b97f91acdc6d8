"""Synthetic screens: the same everywhere, boxes that tell the truth, test designs apart from training's."""

import os
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import PIL
import pytest

from labkit.common.errors import LabError, ScreenError
from labkit.models.pocket.training.fonts import characters_of
from labkit.phonetap import words
from labkit.phonetap.drawing.canvas import Canvas, intersects
from labkit.phonetap.drawing.fonts import (
    FAMILIES,
    Typeface,
    fonts_folder,
    gb2312_first_level,
    limited_characters,
)
from labkit.phonetap.drawing.icons import ICON_NAMES, glyph
from labkit.phonetap.drawing.themes import OPTIONS
from labkit.phonetap.drawing.wallpapers import WALLPAPERS
from labkit.phonetap.screens import DEFAULT_SIZE, KINDS, draw_screen, render

PIXELS_OF_PILLOW = "12.3"  # the version whose rasterizers made HASHES
HASHES = {
    ("home", "train"): "fc18ce10e81ee53a",
    ("home", "test"): "20ab55fe259f4456",
    ("settings", "train"): "56ee0954379cd888",
    ("settings", "test"): "ad7f61e338fffe31",
    ("contacts", "train"): "179e8d1cdc23d522",
    ("contacts", "test"): "796865cec4168f69",
    ("messages", "train"): "e10f9c6ce9c95c33",
    ("messages", "test"): "65a7f5f327e2d0a5",
    ("menu", "train"): "f297528a197d43a3",
    ("menu", "test"): "579ebc1492cd7d68",
    ("dialog", "train"): "acf387a1b25de155",
    ("dialog", "test"): "8686286b4580d15e",
    ("search", "train"): "0fe95185b928cb4d",
    ("search", "test"): "ac530878bb9956da",
    ("keyboard", "train"): "f8095afecb660f92",
    ("keyboard", "test"): "8cf8c18256193a1f",
    ("loading", "train"): "569fd4b09d0f8ab8",
    ("loading", "test"): "f74e5ebb1117a71c",
    ("detail", "train"): "d6a0c491f62e8c6e",
    ("detail", "test"): "b578084b652440dc",
}


def plain_words() -> SimpleNamespace:
    """Words that never change, so that the hashes below change only when the drawing does."""
    stock = {
        "zh": [a + b for a in "天地山水风云日月" for b in ("中心", "设置", "音乐", "相机")],
        "en": [
            f"{a} {b}"
            for a in ("Red", "Blue", "Sun", "Moon", "Star")
            for b in ("Maps", "Mail", "Notes", "Chat")
        ],
    }

    def sample_labels(rng, kind, lang, count, part):
        return rng.sample(stock[lang], count)

    def filler(rng, lang, length):
        return ("一二三四五六七八九十" * 3 if lang == "zh" else "lorem ipsum dolor sit amet erat")[:length]

    icons = {name: {"zh": (f"{name}图标",), "en": (f"{name} icon",)} for name in ICON_NAMES}
    return SimpleNamespace(
        sample_labels=sample_labels,
        filler=filler,
        lookalikes=lambda rng, label, lang, part: [label[:-1] + label[0].lower()],
        title=lambda rng, lang: "标题" if lang == "zh" else "Title",
        ICONS=icons,
    )


def many(count=60, **settings):
    """Screens of many seeds, both styles, a third of them hard."""
    for seed in range(count):
        style = ("train", "test")[seed % 2]
        yield draw_screen(seed, **({"style": style, "hard": seed % 3 == 0} | settings))


@pytest.mark.skipif(
    not PIL.__version__.startswith(PIXELS_OF_PILLOW), reason=f"hashes are those of Pillow {PIXELS_OF_PILLOW}"
)
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_those_recorded(kind):
    for style in ("train", "test"):
        screen = draw_screen(11, kind=kind, style=style, words=plain_words())
        assert screen.sha256()[:16] == HASHES[kind, style]


def test_same_seed_same_pixels_in_another_process():
    code = "from labkit.phonetap.screens import draw_screen as d; print([d(s).sha256() for s in range(6)])"
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert other.stdout.strip() == str([draw_screen(seed).sha256() for seed in range(6)])


def test_render_gives_the_pixels_and_elements_of_draw_screen():
    for seed in range(8):
        pixels, elements = render(seed, style="test", hard=seed % 2 == 0)
        screen = draw_screen(seed, style="test", hard=seed % 2 == 0)
        assert np.array_equal(pixels, np.asarray(screen.image))
        assert elements == screen.elements


def test_a_screen_survives_the_way_to_another_process():
    screen = draw_screen(5, kind="menu")
    copy = pickle.loads(pickle.dumps(screen))
    assert copy.elements == screen.elements
    assert copy.sha256() == screen.sha256()


def test_other_seeds_give_other_screens():
    assert len({screen.sha256() for screen in many(20)}) == 20


@pytest.mark.parametrize("size", [DEFAULT_SIZE, (168, 336), (360, 800)])
def test_boxes_lie_inside_the_screen_hold_their_ink_and_do_not_overlap(size):
    for screen in many(60, size=size):
        for i, element in enumerate(screen.elements):
            x0, y0, x1, y1 = element.box
            assert 0 <= x0 < x1 <= size[0]
            assert 0 <= y0 < y1 <= size[1]
            left, top, right, bottom = element.ink
            assert x0 <= left < right <= x1
            assert y0 <= top < bottom <= y1
            for other in screen.elements[:i]:
                assert not intersects(element.box, other.box), (screen.seed, element.label, other.label)


def test_every_label_is_written_once():
    for screen in many(120):
        labels = [element.label.casefold() for element in screen.elements]
        assert len(set(labels)) == len(labels)


def test_no_text_is_a_name_of_a_glyph_on_the_same_screen():
    for screen in many(120):
        texts = {e.label.casefold() for e in screen.elements if e.kind == "text"}
        for element in screen.elements:
            if element.kind == "icon":
                names = {n.casefold() for named in words.ICONS[element.label].values() for n in named}
                assert not names & texts


def test_ink_stands_out_from_its_background():
    for screen in many(40):
        grey = np.asarray(screen.image.convert("L"), dtype=int)
        for element in screen.elements:
            x0, y0, x1, y1 = map(int, element.ink)
            assert np.ptp(grey[y0:y1, x0:x1]) >= 45, (screen.seed, element.label)


@pytest.mark.parametrize("lang", ["zh", "en"])
@pytest.mark.parametrize("kind", KINDS)
def test_labels_asked_for_are_on_the_screen(kind, lang):
    asked = {"zh": ("飞鱼天气", "删除"), "en": ("Moon Radio", "Delete")}[lang]
    for seed in range(4):
        screen = draw_screen(seed, kind=kind, must_have=asked)
        assert set(asked) <= {element.label for element in screen.elements}
        assert screen.lang == lang
        assert screen.find(asked[0]).lang == lang


@pytest.mark.parametrize(("lang", "tab"), [("zh", "购物车"), ("en", "Nearby")])
def test_a_tab_that_is_asked_for_stands_among_the_tabs(lang, tab):
    for seed in range(12):
        screen = draw_screen(seed, kind="menu", must_have=(tab,))
        assert screen.find(tab).role == "tab"


def test_hard_screens_hold_more_and_smaller_labels_that_look_alike():
    def measure(hard):
        screens = [draw_screen(seed, kind="home", lang="zh", hard=hard) for seed in range(30)]
        counts = [len(s.elements) for s in screens]
        heights = [e.ink[3] - e.ink[1] for s in screens for e in s.elements if e.kind == "text"]
        shared = [
            sum(a.label[:2] == b.label[:2] for a in s.elements for b in s.elements if a is not b)
            for s in screens
        ]
        return np.mean(counts), np.mean(heights), np.mean(shared)

    easy, hard = measure(False), measure(True)
    assert hard[0] > max(20, easy[0])
    assert hard[1] < easy[1]
    assert hard[2] > 2 * easy[2]


def test_a_dialog_leaves_only_its_own_targets():
    for seed in range(20):
        screen = draw_screen(seed, kind="dialog")
        assert screen.state["popup"]
        assert not {e.label for e in screen.elements} & set(screen.state["covered"])
        assert 1 <= len(screen.elements) <= 9


def test_a_keyboard_offers_every_letter_and_state_tells_what_is_typed():
    screens = [draw_screen(seed, kind="keyboard") for seed in range(12)]
    for screen in screens:
        keys = {e.label.lower() for e in screen.elements if e.role == "key"}
        assert keys == set("abcdefghijklmnopqrstuvwxyz")
        assert screen.state["keyboard"]
    assert len({bool(screen.state["field"]) for screen in screens}) == 2


def test_test_designs_share_nothing_with_training():
    train, test = OPTIONS["train"], OPTIONS["test"]
    for name in (
        "wallpapers",
        "light",
        "dark",
        "hues",
        "icon_shapes",
        "list_variants",
        "menu_variants",
        "dialog_variants",
    ):
        assert not set(getattr(train, name)) & set(getattr(test, name)), name
    for name in ("row_heights", "margins"):
        for low, high in getattr(test, name):
            assert all(high < a or low > b for a, b in getattr(train, name)), name
    for lang in ("zh", "en"):
        files = [{file for family in FAMILIES[lang, style] for file in family} for style in ("train", "test")]
        assert not files[0] & files[1]
    assert set(train.wallpapers) | set(test.wallpapers) == set(WALLPAPERS)


def test_wallpapers_used_are_those_of_the_style():
    for style in ("train", "test"):
        used = {draw_screen(seed, kind="home", style=style).state["wallpaper"] for seed in range(60)}
        assert used == set(OPTIONS[style].wallpapers)


def test_every_icon_has_names_and_a_picture_of_its_own():
    assert set(ICON_NAMES) == set(words.ICONS)
    pictures = {glyph(name, 20).tobytes() for name in ICON_NAMES}
    assert len(pictures) == len(ICON_NAMES)
    with pytest.raises(ValueError, match=r"unknown icon 'hart'.*heart"):
        glyph("hart", 20)


def test_fonts_have_every_character_that_words_can_write():
    wanted = characters_of([value for name, value in vars(words).items() if not name.startswith("__")])
    assert {c for c in wanted if c.isprintable()} <= limited_characters() | {"\xa0"}
    total = sum(path.stat().st_size for path in fonts_folder().glob("*.[ot]tf"))
    assert total < 3_000_000


def test_a_character_outside_the_subset_is_drawn_by_the_full_font():
    family = FAMILIES["zh", "test"][0]
    canvas = Canvas((196, 420), Typeface(family, family))
    rare = min(gb2312_first_level() - limited_characters())
    x0, y0, x1, y1 = canvas.text(20, 50, rare, 14, (255, 255, 255))
    assert x1 - x0 > 8
    assert y1 - y0 > 8
    with pytest.raises(LabError, match="no font here can draw '饕'"):
        canvas.text(20, 50, "老饕", 14, (255, 255, 255))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "desktop"}, "unknown kind 'desktop'; known: home"),
        ({"lang": "fr"}, "unknown language 'fr'; known: zh, en"),
        ({"density": "full"}, "known: low, normal, high"),
        ({"style": "real"}, "known: train, test"),
        ({"size": (800, 600)}, "size 800x600 is no phone screen"),
        ({"kind": "dialog", "must_have": [f"设置{i}" for i in range(40)]}, "no 'dialog' screen of size"),
        ({"must_have": ("Mail", "mail")}, "names a label twice"),
    ],
)
def test_what_cannot_be_drawn_is_refused_by_name(settings, message):
    with pytest.raises(ScreenError, match=message):
        draw_screen(1, **settings)
