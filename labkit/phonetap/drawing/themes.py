"""What a screen may look like: colours, shapes, sizes, layout variants, apart for styles "train" and "test".

`OPTIONS["test"]` shares no wallpaper, palette, accent hue, icon shape, row height, margin or layout variant
with `OPTIONS["train"]` (nor a font: see fonts.FAMILIES), so a model is measured on unseen designs.
"""

from __future__ import annotations

import colorsys
import random
from collections.abc import Mapping
from dataclasses import dataclass

from labkit.phonetap.drawing.canvas import Colour, luminance, mix
from labkit.phonetap.drawing.fonts import FAMILIES, Typeface

Range = tuple[float, float]


@dataclass(frozen=True)
class Options:
    """The choices of one style. Ranges are (low, high) in units of a screen 196 wide; hues are in degrees."""

    wallpapers: tuple[str, ...]
    light: tuple[tuple[Colour, Colour], ...]  # (background, surface of cards and bars)
    dark: tuple[tuple[Colour, Colour], ...]
    hues: tuple[int, ...]
    icon_shapes: tuple[str, ...]
    row_heights: tuple[Range, ...]
    margins: tuple[Range, ...]
    list_variants: tuple[str, ...]
    menu_variants: tuple[str, ...]
    dialog_variants: tuple[str, ...]


def _rgb(*codes: str) -> tuple[Colour, ...]:
    return tuple(tuple(bytes.fromhex(code)) for code in codes)


OPTIONS: Mapping[str, Options] = {
    "train": Options(
        wallpapers=("plain", "linear", "diagonal", "blobs", "bands", "clouds", "facets"),
        light=(
            _rgb("ffffff", "f4f4f6"),
            _rgb("f2f2f7", "ffffff"),
            _rgb("fafafa", "eeeeee"),
            _rgb("eef1f5", "fbfcfe"),
            _rgb("fffaf0", "f6eddc"),
            _rgb("f5f5f5", "fefefe"),
        ),
        dark=(
            _rgb("000000", "1c1c1e"),
            _rgb("121212", "222222"),
            _rgb("0f172a", "1e293b"),
            _rgb("1a1a24", "2a2a38"),
            _rgb("202124", "2d2f33"),
        ),
        hues=(0, 20, 40, 90, 130, 150, 190, 210, 225, 260, 280, 330),
        icon_shapes=("circle", "squircle", "rounded", "square"),
        row_heights=((23.0, 26.0), (28.0, 31.0), (34.0, 40.0)),
        margins=((5.0, 8.0), (10.0, 13.0)),
        list_variants=("plain", "cards", "sections"),
        menu_variants=("grid", "list", "pairs", "sections"),
        dialog_variants=("row", "stack", "sheet", "flow", "corner"),
    ),
    "test": Options(
        wallpapers=("rings", "checks", "rays", "hills"),
        light=(_rgb("f6f1fb", "fffdff"), _rgb("eaf4f1", "fafffd"), _rgb("f3ead7", "fdf7ea")),
        dark=(_rgb("0b2027", "16323b"), _rgb("2b2024", "3c2f34"), _rgb("23272e", "31363f")),
        hues=(10, 55, 110, 170, 240, 305),
        icon_shapes=("leaf", "hexagon", "octagon"),
        row_heights=((26.5, 27.5), (31.5, 33.5)),
        margins=((8.5, 9.5), (13.5, 15.0)),
        list_variants=("tiles",),
        menu_variants=("bands",),
        dialog_variants=("strip", "grid"),
    ),
}
# Label sizes in pixels at 196 wide, usual and hard, and the least that stays legible on narrower screens.
LABEL_SIZES: Mapping[tuple[str, bool], Range] = {
    ("zh", False): (11.0, 13.5),
    ("en", False): (10.0, 12.5),
    ("zh", True): (8.2, 9.5),
    ("en", True): (7.2, 8.5),
}
LEAST_PIXELS: Mapping[tuple[str, bool], float] = {
    ("zh", False): 10.5,
    ("en", False): 9.5,
    ("zh", True): 8.4,
    ("en", True): 7.4,
}
# Glyphs that suit some well-known labels; others get any glyph that is no tap target of its own.
_SUITABLE = {
    "camera": "相机 Camera", "image": "相册 Gallery 壁纸 Wallpaper", "mail": "邮件 Mail 短信 Messages",
    "phone": "电话 Phone",
    "cloud": "天气 Weather 备份 Backup", "calendar": "日历 Calendar", "clock": "时钟 Clock 历史 History",
    "user": "联系人 Contacts 我的 Me 账号 Accounts", "globe": "浏览器 Browser 语言 Language 发现 Discover",
    "edit": "笔记 Notes", "microphone": "录音机 Recorder", "folder": "文件 Files 存储 Storage",
    "settings": "设置 Settings", "location": "地图 Maps 定位 Location 附近 Nearby", "home": "首页 Home",
    "cart": "购物车 Cart 淘宝 Taobao", "wifi": "无线网络 Wi-Fi", "volume": "声音 Sound",
    "bell": "通知 Notifications 消息 Inbox",
    "lock": "密码 Passwords 安全 Security 锁屏 隐私 Privacy", "moon": "勿扰模式", "sun": "显示 Display",
    "play": "视频 Videos 电影 Movies 直播 Live", "keyboard": "键盘 Keyboard", "bookmark": "图书 Books",
    "download": "下载 Downloads 应用商店", "heart": "健康 Health", "star": "会员 Members 热门 Popular",
}  # fmt: skip
SUITABLE = {label: name for name, labels in _SUITABLE.items() for label in labels.split()}
WHITE: Colour = (255, 255, 255)
INK: Colour = (17, 19, 24)


def hsv(hue: float, saturation: float, value: float) -> Colour:
    """A colour from hue in degrees, saturation and value from 0 to 1."""
    return tuple(int(c * 255 + 0.5) for c in colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value))


def readable_on(colour: Colour) -> Colour:
    """White or near-black, whichever reads better on `colour`."""
    return WHITE if luminance(colour) < 0.6 else INK


@dataclass(frozen=True)
class Theme:
    """The look of one screen. Lengths in units (196 to the screen's width)."""

    style: str
    options: Options
    dark: bool
    background: Colour
    surface: Colour
    text: Colour
    muted: Colour
    line: Colour
    accent: Colour
    accent_text: Colour  # the accent where it reads well on background and surface, else the text's colour
    typeface: Typeface
    sizes: Mapping[str, float]  # label size by language
    row: float
    margin: float
    radius: float
    stroke: float
    filled: bool
    icon_shape: str
    icon_fill: str  # flat, gradient, outlined, pale
    icon_content: str  # glyph, letter, pattern, mixed

    def colours(self, rng: random.Random) -> tuple[Colour, Colour]:
        """A saturated colour for an icon or avatar, and a neighbour for gradients."""
        hue = rng.choice(self.options.hues) + rng.uniform(-4, 4)
        saturation, value = rng.uniform(0.55, 0.9), rng.uniform(0.6, 0.92)
        return hsv(hue, saturation, value), hsv(hue + rng.choice((-30, 25)), saturation, value * 0.82)

    def button_colours(
        self, rng: random.Random, primary: bool
    ) -> tuple[Colour | None, Colour, Colour | None]:
        """(fill or None, text, edge or None) of a button on the theme's surface."""
        if primary:
            return self.accent, readable_on(self.accent), None
        look = rng.choice(("tonal", "edge", "text", "grey"))
        if look == "tonal":
            return mix(self.surface, self.accent, 0.16), self.accent_text, None
        if look == "edge":
            return self.surface, self.accent_text, self.accent_text
        if look == "grey":
            return mix(self.surface, self.text, 0.1), self.text, None
        return None, self.accent_text, None


def choose_theme(rng: random.Random, style: str, hard: bool, scale: float) -> Theme:
    """A theme drawn from the style's options; `scale` (pixels a unit) keeps small screens' labels legible."""
    options = OPTIONS[style]
    dark = rng.random() < 0.4
    background, surface = rng.choice(options.dark if dark else options.light)
    if rng.random() < 0.3:
        background, surface = surface, background
    text = mix(WHITE, background, 0.06) if dark else mix(INK, background, rng.uniform(0.0, 0.14))
    hue = rng.choice(options.hues) + rng.uniform(-4, 4)
    accent = hsv(hue, rng.uniform(0.6, 0.95), rng.uniform(0.55, 0.95))
    contrast = min(abs(luminance(accent) - luminance(c)) for c in (background, surface))
    readable = accent if contrast > 0.38 else mix(accent, text, 0.55)
    if min(abs(luminance(readable) - luminance(c)) for c in (background, surface)) < 0.3:
        readable = text
    sizes = {}
    for lang in ("zh", "en"):
        low, high = LABEL_SIZES[lang, hard]
        sizes[lang] = max(rng.uniform(low, high), LEAST_PIXELS[lang, hard] / scale)
    return Theme(
        style=style,
        options=options,
        dark=dark,
        background=background,
        surface=surface,
        text=text,
        muted=mix(text, background, 0.42),
        line=mix(text, background, 0.86),
        accent=accent,
        accent_text=readable,
        typeface=Typeface(rng.choice(FAMILIES["zh", style]), rng.choice(FAMILIES["en", style])),
        sizes=sizes,
        row=rng.uniform(*rng.choice(options.row_heights)),
        margin=rng.uniform(*rng.choice(options.margins)),
        radius=rng.choice((2.0, 5.0, 8.0, 12.0)),
        stroke=rng.choice((1.7, 2.0, 2.3, 2.6)),
        filled=rng.random() < 0.4,
        icon_shape=rng.choice(options.icon_shapes),
        icon_fill=rng.choice(("flat", "flat", "gradient", "outlined", "pale")),
        icon_content=rng.choice(("glyph", "letter", "mixed", "mixed", "pattern")),
    )
