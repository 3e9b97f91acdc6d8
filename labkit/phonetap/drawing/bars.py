"""The bars of a phone screen: status, navigation, title and tabs, and fields for text."""

from __future__ import annotations

from labkit.phonetap.drawing.canvas import Colour, mix, union
from labkit.phonetap.drawing.scene import Scene

PLACEHOLDERS = {
    "zh": ("搜索", "请输入", "输入消息", "说点什么", "输入名称", "输入地址", "输入内容", "手机号", "备注"),
    "en": (
        "Search",
        "Type here",
        "Message",
        "Write something",
        "Your name",
        "Address",
        "Text",
        "Number",
        "Comment",
    ),
}


def status_bar(scene: Scene, colour: Colour) -> None:
    """Time, signal and battery at the top; sets `scene.top` below it."""
    rng, canvas = scene.rng, scene.canvas
    height = rng.uniform(13, 17)
    middle, edge, size = height / 2 + 0.5, rng.uniform(6, 14), rng.uniform(7.5, 9)
    clock = f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"
    at_middle = rng.random() < 0.15
    canvas.text(98 if at_middle else edge, middle, clock, size, colour, "m" if at_middle else "l", True)
    x = scene.width - edge
    level, wide = rng.random(), 12.0
    canvas.round((x - wide, middle - 3, x, middle + 3), 1.5, mix(colour, (128, 128, 128), 0.45))
    canvas.round((x - wide + 0.8, middle - 2.2, x - 0.8 - (wide - 4) * (1 - level), middle + 2.2), 1, colour)
    x -= wide + 4
    if rng.random() < 0.4:
        x = canvas_text_right(scene, x, middle, f"{int(level * 100)}%", size * 0.9, colour)
    bars = rng.randint(1, 4)
    for i in range(4):
        shade = colour if i < bars else mix(colour, (128, 128, 128), 0.6)
        left = x - 11 + i * 3
        canvas.rect((left, middle + 3.2 - 1.8 * (i + 1), left + 2, middle + 3.2), shade)
    x -= 14
    if rng.random() < 0.4:
        canvas_text_right(scene, x, middle, rng.choice(("5G", "4G", "LTE")), size * 0.85, colour)
    elif rng.random() < 0.5:
        scene.icons.add("wifi")
        canvas.glyph("wifi", x - 4, middle, 10, colour, 3)
    scene.top = height


def canvas_text_right(scene: Scene, x: float, y: float, text: str, size: float, colour: Colour) -> float:
    """Text that ends at x; returns where the next thing to its left may end."""
    scene.canvas.text(x, y, text, size, colour, "r")
    return x - scene.canvas.measure(text, size) - 4


def plan_navigation(scene: Scene) -> None:
    """Decide what the system shows at the bottom and leave room for it (drawn by `navigation_bar`)."""
    rng = scene.rng
    scene.navigation = rng.choice(("none", "pill", "pill", "buttons"))
    if scene.navigation == "buttons" and not (scene.take_icon("back") and scene.take_icon("home")):
        scene.navigation = "pill"
    scene.bottom = scene.canvas.height - {"none": 2.0, "pill": 10.0, "buttons": 20.0}[scene.navigation]
    scene.floor = scene.bottom


def navigation_bar(scene: Scene, colour: Colour, ground: Colour | None = None) -> None:
    """The system's own bar: nothing, a pill to swipe, or back, home and recent apps."""
    canvas, y = scene.canvas, (scene.floor + scene.canvas.height) / 2
    if ground is not None and scene.navigation != "none":
        canvas.rect((0, scene.floor, scene.width, canvas.height + 1), ground)
    if scene.navigation == "pill":
        canvas.round((68, canvas.height - 6, 128, canvas.height - 3.6), 1.2, colour)
    elif scene.navigation == "buttons":
        back_first = scene.rng.random() < 0.75
        for name, x in (("back", 35 if back_first else 161), ("home", 98)):
            scene.icon(name, x, y, 13, colour, reach=1.45)
        x = 161 if back_first else 35
        canvas.round((x - 4.5, y - 4.5, x + 4.5, y + 4.5), 1.5, colour)
        canvas.round((x - 3, y - 3, x + 3, y + 3), 0.8, ground or mix(colour, (128, 128, 128), 0.8))


def title_bar(scene: Scene, icons: int, back: bool = True, prefer: tuple[str, ...] = ()) -> None:
    """A page's title with an arrow back and up to `icons` glyphs at the right; moves `scene.top` below."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    height, coloured = rng.uniform(24, 31), rng.random() < 0.2
    large = not coloured and rng.random() < 0.25
    ink, ground = theme.text, None
    if coloured:
        ground = theme.accent
        ink = (255, 255, 255) if sum(ground) < 430 else (17, 19, 24)
        canvas.rect((0, 0 if scene.top < 1 else scene.top, scene.width, scene.top + height), ground)
    y, left, right = scene.top + height / 2, theme.margin + 2, scene.width - theme.margin - 2
    side = rng.uniform(13, 17)
    if back and rng.random() < 0.85 and scene.take_icon("back"):
        scene.icon("back", left + side / 2, y, side, ink)
        left += side * 1.5 + 3
    names = scene.take_icons(icons, prefer) if icons else []
    plate = mix(ground or theme.background, ink, 0.1) if rng.random() < 0.2 else None
    for name in names:
        scene.icon(name, right - side / 2, y, side * (0.85 if plate else 1), ink, plate)
        right -= side * 1.5 + rng.uniform(2, 6)
    text = scene.title()
    size = scene.size * rng.uniform(1.1, 1.3)
    if large:
        scene.top += height
        canvas.text(theme.margin + 3, scene.top + size * 0.7, text, size * 1.35, theme.text, "l", True)
        scene.top += size * 1.6
        return
    centred = rng.random() < 0.4 and canvas.measure(text, size, True) < 2 * min(98 - left, right - 98)
    if canvas.measure(text, size, True) < right - left:
        canvas.text(98 if centred else left + 2, y, text, size, ink, "m" if centred else "l", True)
    scene.top += height
    if not coloured and rng.random() < 0.3:
        canvas.line(0, scene.width, scene.top, theme.line)


def text_field(
    scene: Scene,
    x0: float,
    x1: float,
    y: float,
    height: float,
    text: str = "",
    glyph: bool = False,
    placeholder: str = "",
) -> str:
    """A field to type in, its middle at y, with `text` in it or a placeholder. Returns the label it got."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    box = (x0, y - height / 2, x1, y + height / 2)
    look = rng.choice(("filled", "edge", "tinted"))
    fill = {"filled": mix(theme.background, theme.text, 0.09), "edge": theme.background}.get(look)
    fill = fill or mix(theme.background, theme.accent, 0.12)
    radius = rng.choice((3.0, 6.0, height / 2))
    canvas.round(box, radius, fill, mix(theme.background, theme.text, 0.35) if look == "edge" else None)
    left = x0 + max(5.0, radius * 0.6)
    mark = None
    if glyph:
        scene.icons.add("search")
        scene.decorations.add("search")
        mark = canvas.glyph("search", left + 5, y, 11, theme.muted, 2.3)
        left += 14
    label = text
    if not label:
        choices = [placeholder] if placeholder else list(PLACEHOLDERS[scene.lang])
        rng.shuffle(choices)
        label = next((p for p in choices if scene.fits(p, x1 - left - 3) and scene.claim(p)), "")
        if not label:
            return ""
    ink = canvas.text(
        left, y, label, scene.size, theme.text if text else mix(theme.text, theme.background, 0.3)
    )
    if text and rng.random() < 0.5:
        end = ink[2] / canvas.scale + 1.5
        canvas.rect((end, y - scene.size * 0.55, end + 1, y + scene.size * 0.55), theme.accent)
    scene.add(label, "text", "field", canvas.pixels(box), union(ink, mark))
    return label


def tab_bar(scene: Scene) -> None:
    """Three to five tabs with glyphs above the system's bar; raises `scene.bottom`."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    count = rng.randint(3, 5 if scene.lang == "zh" else 4)
    size = max(scene.size * 0.86, {"zh": 9.5, "en": 8.5}[scene.lang] / canvas.scale)
    pitch = scene.width / count
    labels = scene.labels("tab", count, width=pitch - 3, size=size)
    height = rng.uniform(30, 36)
    top, ground = scene.bottom - height, theme.surface
    canvas.rect((0, top, scene.width, scene.bottom + 1), ground)
    canvas.line(0, scene.width, top, theme.line)
    chosen = rng.randrange(max(1, len(labels)))
    pitch = scene.width / max(1, len(labels))
    for i, label in enumerate(labels):
        x = (i + 0.5) * pitch
        colour = theme.accent_text if i == chosen else theme.muted
        name = scene.decoration(label)
        mark = None
        if name is not None:
            mark = canvas.glyph(name, x, top + height * 0.32, 14, colour, theme.stroke, i == chosen)
        else:
            mark = canvas.disc(x, top + height * 0.32, 4.5, colour)
        ink = canvas.text(x, top + height * 0.76, label, size, colour, "m", i == chosen)
        cell = (i * pitch, top, (i + 1) * pitch, scene.bottom)
        scene.add(label, "text", "tab", canvas.pixels(cell), union(ink, mark))
    scene.bottom = top
