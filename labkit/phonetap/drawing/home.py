"""The home screen: a grid of apps on a wallpaper, a dock, a search bar, a clock."""

from __future__ import annotations

from labkit.phonetap.drawing.bars import PLACEHOLDERS, navigation_bar, plan_navigation, status_bar
from labkit.phonetap.drawing.canvas import union
from labkit.phonetap.drawing.scene import Scene
from labkit.phonetap.drawing.themes import INK, LEAST_PIXELS, WHITE
from labkit.phonetap.drawing.wallpapers import WALLPAPERS, wallpaper_colours

# How many apps may lie side by side, by language, usual and hard.
_COLUMNS = {
    ("zh", False): (4, 4, 4, 5, 3),
    ("en", False): (3, 3, 4),
    ("zh", True): (5, 5, 6),
    ("en", True): (4,),
}


def home(scene: Scene) -> None:
    """Draw a home screen."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    name = rng.choice(theme.options.wallpapers)
    dark = theme.dark or rng.random() < 0.4
    colours = wallpaper_colours(rng, theme.options, dark)
    picture = type(rng)(rng.getrandbits(48))
    scene.state["wallpaper"] = name
    if not canvas.dry:
        canvas.paste(WALLPAPERS[name](picture, canvas.size, colours))
    ink = WHITE if dark else INK
    shadow = (0, 0, 0) if dark and (name not in ("plain", "linear") or rng.random() < 0.5) else None
    status_bar(scene, ink)
    plan_navigation(scene)
    top, bottom = scene.top + rng.uniform(3, 10), scene.bottom
    edge = rng.uniform(3, 9)
    columns, lines = grid_columns(scene, edge), 2 if scene.lang == "en" else 1

    if rng.random() < 0.35:  # a clock, or a search bar, or both
        size = rng.uniform(22, 34)
        clock = f"{rng.randint(0, 23):02d}:{rng.randint(0, 59):02d}"
        canvas.text(98, top + size * 0.6, clock, size, ink, "m", rng.random() < 0.5, shadow)
        top += size * 1.25
    if rng.random() < 0.35:
        top = search_bar(scene, top + 3, ink) + 4
    docked, dock_top = [], bottom
    if rng.random() < 0.7:
        dock_top = bottom - rng.uniform(34, 40)
        docked = scene.take_icons(rng.randint(3, 5))
    pitch_x = (scene.width - 2 * edge) / columns
    side = min(pitch_x * (rng.uniform(0.46, 0.62) if scene.hard else rng.uniform(0.6, 0.78)), 38)
    text_height = scene.size * (1.12 * lines + 0.35)
    least = side + text_height + 4
    rows = max(1, int((dock_top - 8 - top) / least))
    count = min(rows * columns, max(len(scene.must), scene.count(5, 11, 26)))
    labels = scene.labels("app", count, width=pitch_x - 2, lines=lines)
    used_rows = min(rows, max(-(-len(labels) // columns), rng.randint(1, rows)))
    pitch_y = min((dock_top - 8 - top) / used_rows, least * rng.uniform(1.0, 1.35))
    if rng.random() < 0.3:
        top += (dock_top - 8 - top) - pitch_y * used_rows
    cells = [(r, c) for r in range(used_rows) for c in range(columns)]
    if rng.random() < 0.3:
        cells = sorted(rng.sample(cells, len(labels)))
    for label, (r, c) in zip(labels, cells):
        app(scene, label, edge + (c + 0.5) * pitch_x, top + r * pitch_y, side, pitch_x, pitch_y, ink, shadow)
    if rng.random() < 0.6:
        dots = rng.randint(2, 5)
        for i in range(dots):
            canvas.disc(98 + (i - dots / 2 + 0.5) * 8, dock_top - 5, 1.6 if i else 2.2, ink)
    if docked:
        dock(scene, docked, dock_top, bottom, dark)
    navigation_bar(scene, ink)


def grid_columns(scene: Scene, edge: float) -> int:
    """How many apps lie side by side; Chinese labels shrink so that four characters fit, while legible."""
    rng, hard = scene.rng, scene.hard
    columns = rng.choice(_COLUMNS[scene.lang, hard])
    if scene.density == "high" and rng.random() < 0.7:
        columns = max(columns, 4)
    least = LEAST_PIXELS[scene.lang, hard] / scene.canvas.scale
    while True:
        width = (scene.width - 2 * edge) / columns - 2
        if scene.lang == "zh":
            scene.size = max(least, min(scene.theme.sizes["zh"], width / 4.05))
        lines = 1 if scene.lang == "zh" else 2
        if columns == 3 or all(scene.fits(label, width, lines) for label in scene.must):
            return columns
        columns -= 1


def app(
    scene: Scene, label: str, x: float, y: float, side: float, wide: float, tall: float, ink, shadow
) -> None:
    """One app: picture, label below, perhaps a badge; x is its middle, y its top."""
    canvas, rng = scene.canvas, scene.rng
    picture = scene.app_tile(x - side / 2, y, side, label)
    text, _ = scene.caption(x, y + side + scene.size * 0.78, label, wide - 2, ink, shadow)
    if rng.random() < 0.1:
        number = str(rng.randint(1, 99))
        canvas.disc(x + side / 2 - 2, y + 2, 5, (235, 50, 50))
        canvas.text(x + side / 2 - 2, y + 2, number, 6.5, WHITE, "m", True)
    cell = canvas.pixels((x - wide / 2 + 1, y - 1, x + wide / 2 - 1, y + tall - 2))
    whole = union(picture, text)
    box = (max(cell[0], whole[0] - 3), whole[1] - 1, min(cell[2], whole[2] + 3), whole[3] + 1)
    scene.add(label, "text", "app", union(box, whole), whole)


def search_bar(scene: Scene, top: float, ink) -> float:
    """A bar to search with, part of the wallpaper; returns its bottom."""
    rng, canvas = scene.rng, scene.canvas
    height, edge = rng.uniform(18, 24), rng.uniform(8, 16)
    label = PLACEHOLDERS[scene.lang][0]
    if not scene.claim(label):
        return top
    box = (edge, top, scene.width - edge, top + height)
    light = rng.random() < 0.5
    canvas.round(box, rng.choice((5, height / 2)), (240, 241, 244) if light else (38, 40, 46))
    colour = INK if light else WHITE
    scene.icons.add("search")
    scene.decorations.add("search")
    mark = canvas.glyph("search", edge + 11, top + height / 2, 12, colour, 2.3)
    text = canvas.text(edge + 20, top + height / 2, label, scene.size, colour)
    scene.add(label, "text", "field", canvas.pixels(box), union(mark, text))
    return top + height


def dock(scene: Scene, names: list[str], top: float, bottom: float, dark: bool) -> None:
    """A row of glyph-only apps at the bottom, sometimes on a glass panel."""
    rng, canvas = scene.rng, scene.canvas
    if rng.random() < 0.6:
        panel = (4, top, scene.width - 4, bottom - 2)
        canvas.glass(panel, rng.choice((4, 9, 14)), (0, 0, 0) if dark else WHITE, rng.uniform(0.2, 0.5))
    pitch = (scene.width - 16) / len(names)
    side = min(pitch * 0.72, bottom - top - 8)
    middle = (top + bottom - 2) / 2
    for i, name in enumerate(names):
        x = 8 + (i + 0.5) * pitch - side / 2
        box = scene.app_tile(x, middle - side / 2, side, None, glyph=name)
        scene.add(name, "icon", "icon", box, box)
