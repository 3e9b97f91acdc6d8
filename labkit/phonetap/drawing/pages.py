"""Pages of an app: menu (entries and tabs), detail (an article or a product), loading."""

from __future__ import annotations

from labkit.phonetap.drawing.bars import plan_navigation, status_bar, tab_bar, title_bar
from labkit.phonetap.drawing.canvas import mix, union
from labkit.phonetap.drawing.lists import chevron, end_page, field_line, floating_button, start_page
from labkit.phonetap.drawing.scene import Scene
from labkit.phonetap.drawing.themes import readable_on

# How many tiles may lie side by side, by language, usual and hard.
_COLUMNS = {("zh", False): (3, 4), ("en", False): (3,), ("zh", True): (4, 5), ("en", True): (3, 4)}
LOADING = {
    "zh": ("加载中…", "正在加载…", "请稍候…", "努力加载中"),
    "en": ("Loading…", "Please wait…", "Just a moment…"),
}


def menu(scene: Scene) -> None:
    """Entries as tiles, pairs, a list or sections, with a bar of tabs below."""
    rng, theme = scene.rng, scene.theme
    start_page(scene, rng.choice((1, 2, 3)), back=rng.random() < 0.4, prefer=("search", "menu", "more"))
    if "search" not in scene.icons and rng.random() < 0.35:
        field_line(scene)
    must = scene.must
    at_home = [label for label in must if label in scene.words.concepts("tab", scene.lang)]
    tabs = rng.random() < 0.85 or bool(at_home)
    if tabs:
        scene.must = at_home
        tab_bar(scene)
        scene.must = [label for label in must if label in scene.must or label not in at_home]
    if rng.random() < 0.3 and scene.density != "high":
        banner(scene)
    variant = rng.choice(theme.options.menu_variants)
    if variant == "list":
        entry_list(scene)
    else:
        entry_grid(scene, variant)
    if rng.random() < 0.15:
        floating_button(scene)
    ground = theme.surface if tabs else theme.background
    end_page(scene, ground)


def banner(scene: Scene) -> None:
    """A coloured card with words that are no target."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    first, second = theme.colours(rng)
    height = rng.uniform(34, 60)
    box = (theme.margin, scene.top + 3, scene.width - theme.margin, scene.top + 3 + height)
    canvas.round(box, theme.radius, first)
    canvas.disc(box[2] - height * 0.5, (box[1] + box[3]) / 2, height * 0.3, second)
    text = scene.filler(8 if scene.lang == "zh" else 16)
    canvas.text(box[0] + 8, box[1] + height * 0.36, text, scene.size, readable_on(first), strong=True)
    canvas.text(box[0] + 8, box[1] + height * 0.66, scene.filler(10), scene.size * 0.75, readable_on(first))
    scene.top += height + 6


def entry_grid(scene: Scene, variant: str) -> None:
    """Tiles with a picture and a caption; "pairs" are two wide cards a row, "bands" rows of tinted cells."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    lines = 2 if scene.lang == "en" else 1
    choices = _COLUMNS[scene.lang, scene.hard]
    columns = 2 if variant == "pairs" else rng.choice(choices)
    margin = theme.margin
    pitch = (scene.width - 2 * margin) / columns
    side = min(rng.uniform(14, 20) if scene.hard else rng.uniform(18, 30), pitch * 0.62)
    beside = variant == "pairs"
    tall = max(side + 8, scene.size * 2.6) if beside else side + scene.size * (1.12 * lines + 0.7) + 5
    space = scene.bottom - scene.top - 4
    rows = max(1, int(space / tall))
    count = min(rows * columns, max(len(scene.must), scene.count(4, 9, 22)))
    width = pitch - side - 12 if beside else pitch - 3
    labels = scene.labels("menu", count, width=width, lines=2 if beside and scene.lang == "en" else lines)
    used = -(-len(labels) // columns)
    pitch_y = min(tall * rng.uniform(1.0, 1.25), space / max(1, used))
    y0 = scene.top + 3
    if variant == "sections" and space - used * pitch_y > 16:
        canvas.text(margin + 2, y0 + 7, scene.filler(5), scene.size * 0.9, theme.text, strong=True)
        y0 += 14
    if variant in ("grid", "sections") and rng.random() < 0.5:
        canvas.round(
            (margin / 2, y0, scene.width - margin / 2, y0 + used * pitch_y), theme.radius, theme.surface
        )
    for i, label in enumerate(labels):
        r, c = divmod(i, columns)
        x0, y = margin + c * pitch, y0 + r * pitch_y
        cell = (x0 + 1, y + 1, x0 + pitch - 1, y + pitch_y - 1)
        if variant == "bands":
            canvas.round(
                cell, theme.radius, theme.surface if (r + c) % 2 else mix(theme.surface, theme.accent, 0.1)
            )
        elif beside:
            canvas.round(cell, theme.radius, theme.surface)
        entry(scene, label, cell, side, beside)
    scene.state["scrolls"] = used == rows


def entry(scene: Scene, label: str, cell, side: float, beside: bool) -> None:
    """One tile of a menu; `cell` in units is its tap target."""
    canvas, theme = scene.canvas, scene.theme
    if beside:
        y = (cell[1] + cell[3]) / 2
        mark = scene.app_tile(cell[0] + 4, y - side / 2, side, label)
        lines = scene.wrap(label, cell[2] - cell[0] - side - 9)
        first = y - (len(lines) - 1) * scene.size * 0.55
        inks = [
            canvas.text(cell[0] + side + 8, first + k * scene.size * 1.1, line, scene.size, theme.text)
            for k, line in enumerate(lines)
        ]
        ink = union(mark, *inks)
    else:
        x = (cell[0] + cell[2]) / 2
        mark = scene.app_tile(x - side / 2, cell[1] + 3, side, label)
        text, _ = scene.caption(
            x, cell[1] + 3 + side + scene.size * 0.8, label, cell[2] - cell[0] - 1, theme.text
        )
        ink = union(mark, text)
    scene.add(label, "text", "app", canvas.pixels(cell), ink)


def entry_list(scene: Scene) -> None:
    """Entries as rows, some with glyphs."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    tall = max(theme.row, scene.size * 1.9)
    if scene.hard:
        tall = max(scene.size * 1.8, min(tall, (scene.bottom - scene.top) / rng.randint(15, 21)))
    room = int((scene.bottom - scene.top - 2) / tall)
    labels = scene.labels("menu", min(room, max(len(scene.must), scene.count(4, 8, 18))), width=125)
    glyphs, arrows = rng.random() < 0.6, rng.random() < 0.6
    for i, label in enumerate(labels):
        y = scene.top + 2 + i * tall
        box, x, mark = (0.0, y, scene.width, y + tall), theme.margin + 2, None
        if glyphs:
            name = scene.decoration(label)
            if name:
                colour = theme.colours(rng)[0] if rng.random() < 0.3 else theme.accent_text
                mark = canvas.glyph(name, x + 7, y + tall / 2, 14, colour, theme.stroke, theme.filled)
            x += 22
        ink = canvas.text(x, y + tall / 2, label, scene.size, theme.text)
        if arrows:
            chevron(scene, scene.width - theme.margin, y + tall / 2)
        canvas.line(x, scene.width, y + tall, theme.line)
        scene.add(label, "text", "row", canvas.pixels(box), union(ink, mark))
    scene.state["scrolls"] = len(labels) == room


def detail(scene: Scene) -> None:
    """A picture, a heading, lines of grey text, a row of glyphs and one to three buttons."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    start_page(scene, rng.choice((1, 2, 3)), prefer=("share", "more", "heart"))
    margin = theme.margin + 1
    count = max(len(scene.must), rng.randint(1, 3) if scene.density != "high" else rng.randint(2, 4))
    stacked = count > 2 or (scene.lang == "en" and count > 1 and rng.random() < 0.5)
    tall = max(rng.uniform(20, 28), scene.size * 1.8)
    width = scene.width - 2 * margin
    labels = scene.labels("button", count, width=(width if stacked else width / count) - 12)
    foot = scene.bottom - (tall + 5) * (len(labels) if stacked else 1) - 2
    y = scene.top + 4
    if rng.random() < 0.65:
        y = picture(scene, y, rng.uniform(50, 110), margin) + 6
    heading = scene.filler(rng.randint(6, 10) if scene.lang == "zh" else rng.randint(10, 20))
    canvas.text(margin, y + scene.size * 0.8, heading, scene.size * 1.2, theme.text, strong=True)
    y += scene.size * 1.9
    icons = scene.take_icons(rng.randint(3, 5)) if rng.random() < 0.6 and foot - y > 34 else []
    body = foot - (30 if icons else 4)
    lines = rng.randint(2, 12)
    while y + 11 < body and lines > 0:
        lines -= 1
        text = scene.filler(int(width / (scene.size * (0.82 if scene.lang == "zh" else 0.5))))
        while text and canvas.measure(text, scene.size * 0.8) > width:
            text = text[:-1]
        canvas.text(margin, y + 5, text, scene.size * 0.8, theme.muted)
        y += scene.size * 1.25
    pitch = width / max(1, len(icons))
    spot = y + 13 if rng.random() < 0.5 else foot - 16
    for i, name in enumerate(icons):
        scene.icon(name, margin + (i + 0.5) * pitch, spot, rng.uniform(14, 17), theme.text)
    primary = rng.randrange(len(labels)) if labels else 0
    for i, label in enumerate(labels):
        if stacked:
            box = (margin, foot + i * (tall + 5), margin + width, foot + i * (tall + 5) + tall)
        else:
            each = width / len(labels)
            box = (margin + i * each + 2, foot, margin + (i + 1) * each - 2, foot + tall)
        scene.button(label, box, i == primary)
    end_page(scene)


def picture(scene: Scene, y: float, height: float, margin: float) -> float:
    """A framed pattern that stands for a photograph; returns its bottom."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    first, second = theme.colours(rng)
    edge = margin if rng.random() < 0.5 else 0
    canvas.round((edge, y, scene.width - edge, y + height), theme.radius if edge else 0, first)
    canvas.disc(rng.uniform(50, 150), y + height * 0.5, height * rng.uniform(0.2, 0.38), second)
    canvas.round(
        (edge, y + height * 0.75, scene.width - edge, y + height), theme.radius if edge else 0, second
    )
    return y + height


def loading(scene: Scene) -> None:
    """A spinner and a word of patience; few targets: an arrow back, at most two buttons."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    scene.state["loading"] = True
    canvas.rect((0, 0, scene.width, canvas.height + 1), theme.background)
    status_bar(scene, theme.text)
    plan_navigation(scene)
    if rng.random() < 0.7:
        title_bar(scene, rng.choice((0, 1)))
    if rng.random() < 0.4:
        skeleton(scene)
    middle = canvas.height * rng.uniform(0.4, 0.55)
    spinner(scene, 98, middle, rng.uniform(9, 16))
    text = rng.choice(LOADING[scene.lang])
    canvas.text(98, middle + 30, text, scene.size, theme.muted, "m")
    scene.shown.append(text.casefold())
    count = max(len(scene.must), rng.choice((0, 1, 1, 2)), 0 if scene.elements else 1)
    y = middle + 52
    for i, label in enumerate(scene.labels("button", count, width=90)):
        if y + 26 < scene.bottom:
            scene.button(label, (44, y, 152, y + 24), i == 0)
            y += 30
    end_page(scene)


def skeleton(scene: Scene) -> None:
    """Grey bars where content will be."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    shade, y = mix(theme.background, theme.text, 0.08), scene.top + 6
    while y < scene.bottom - 20:
        canvas.round((theme.margin, y, theme.margin + 24, y + 24), 4, shade)
        canvas.round((theme.margin + 30, y + 2, rng.uniform(90, 185), y + 10), 3, shade)
        canvas.round((theme.margin + 30, y + 14, rng.uniform(70, 150), y + 21), 3, shade)
        y += 34


def spinner(scene: Scene, x: float, y: float, radius: float) -> None:
    """A ring with a gap, or a ring of dots."""
    canvas, theme, rng = scene.canvas, scene.theme, scene.rng
    start, dots = rng.randrange(12), rng.random() < 0.5
    canvas.disc(x, y, radius + 8, theme.surface)
    for i in range(12):
        dx, dy = CLOCK[(start + i) % 12]
        share = i / 11
        if dots:
            canvas.disc(
                x + dx * radius, y + dy * radius, 1.2 + share, mix(theme.line, theme.accent_text, share)
            )
        elif i > 2:
            for part in (0, 0.34, 0.67):
                nx, ny = CLOCK[(start + i + 1) % 12]
                px, py = dx + (nx - dx) * part, dy + (ny - dy) * part
                canvas.disc(x + px * radius, y + py * radius, 1.6, theme.accent_text)


# The hours of a clock face, from three o'clock on.
CLOCK = (
    (1.0, 0.0), (0.866, 0.5), (0.5, 0.866), (0.0, 1.0), (-0.5, 0.866), (-0.866, 0.5),
    (-1.0, 0.0), (-0.866, -0.5), (-0.5, -0.866), (0.0, -1.0), (0.5, -0.866), (0.866, -0.5),
)  # fmt: skip
