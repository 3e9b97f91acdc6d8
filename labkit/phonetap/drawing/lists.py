"""Screens made of rows: settings, contacts, messages."""

from __future__ import annotations

from labkit.phonetap.drawing.bars import navigation_bar, plan_navigation, status_bar, text_field, title_bar
from labkit.phonetap.drawing.canvas import mix, union
from labkit.phonetap.drawing.scene import Scene
from labkit.phonetap.drawing.themes import WHITE, readable_on


def start_page(scene: Scene, icons: int, back: bool = True, prefer: tuple[str, ...] = ()) -> None:
    """Background, status bar and title bar of an ordinary page."""
    scene.canvas.rect((0, 0, scene.width, scene.canvas.height + 1), scene.theme.background)
    status_bar(scene, scene.theme.text)
    plan_navigation(scene)
    title_bar(scene, icons, back, prefer)


def end_page(scene: Scene, ground=None) -> None:
    """The system's bar, on the page's own ground."""
    ground = scene.theme.background if ground is None else ground
    navigation_bar(scene, scene.theme.text, ground)


def toggle(scene: Scene, right: float, y: float, on: bool) -> float:
    """A switch that ends at `right`; returns its left edge."""
    canvas, theme = scene.canvas, scene.theme
    wide, tall = 20.0, 11.0
    track = theme.accent if on else mix(theme.background, theme.text, 0.25)
    canvas.round((right - wide, y - tall / 2, right, y + tall / 2), tall / 2, track)
    canvas.disc(right - (tall / 2 if on else wide - tall / 2), y, tall / 2 - 1.3, WHITE)
    return right - wide


def chevron(scene: Scene, right: float, y: float) -> float:
    """A small arrow to the right; returns its left edge."""
    if not scene.canvas.dry:
        s, pen = scene.canvas.scale, scene.canvas.pen
        points = [((right - 3.2) * s, (y - 3.4) * s), (right * s, y * s), ((right - 3.2) * s, (y + 3.4) * s)]
        pen.line(points, fill=scene.theme.muted, width=max(1, round(1.1 * s)), joint="curve")
    return right - 5


def settings(scene: Scene) -> None:
    """Rows with a label and perhaps a glyph, a value, a second line, a switch or a chevron, in groups."""
    rng, theme = scene.rng, scene.theme
    start_page(scene, rng.choice((0, 0, 1, 1, 2)), prefer=("search",))
    if "search" not in scene.icons and rng.random() < 0.3:
        field_line(scene)
    variant = rng.choice(theme.options.list_variants)
    row_settings(scene, variant, scene.top + rng.uniform(1, 6))
    end_page(scene)


def field_line(scene: Scene) -> None:
    """A field to search with, across the page."""
    margin = scene.theme.margin
    height = scene.rng.uniform(18, 23)
    text_field(scene, margin, scene.width - margin, scene.top + 4 + height / 2, height, glyph=True)
    scene.top += height + 8


def row_settings(scene: Scene, variant: str, y: float) -> None:
    """The rows of a settings page from height y down to the bottom."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    twofold = rng.random() < 0.3
    tall = max(theme.row, scene.size * (2.9 if twofold else 1.9))
    space = scene.bottom - y
    room = int(space / tall)
    count = min(room, max(len(scene.must), scene.count(5, 9, 16)))
    if scene.hard:
        tall = max(scene.size * (2.6 if twofold else 1.85), min(tall, space / rng.randint(17, 23)))
        count = min(int(space / tall), max(len(scene.must), rng.randint(16, 24)))
    labels = scene.labels("setting", count, width=118)
    pictures = rng.choice(("none", "none", "tile", "bare"))
    trail = rng.choice(("chevron", "mixed", "mixed", "toggle", "none"))
    groups = rng.random() < 0.6 and variant != "plain"
    sections = variant == "sections"
    inset = theme.margin if variant in ("cards", "tiles") else 0.0
    i = 0
    while i < len(labels):
        group = labels[i : i + (rng.randint(2, 5) if groups or sections else len(labels))]
        spare = scene.bottom - y - tall * (len(labels) - i)
        if i and spare > 6:
            y += min(spare, rng.uniform(6, 10))
        if sections and scene.bottom - y - tall * (len(labels) - i) > 13:
            canvas.text(theme.margin + 2, y + 6, scene.filler(rng.randint(2, 8)), 8.5, theme.muted)
            y += 12
        shown = [k for k in range(len(group)) if y + (k + 1) * tall <= scene.bottom + 0.5]
        if not shown:
            break
        if variant == "cards" or (variant == "sections" and rng.random() < 0.5):
            canvas.round((inset, y, scene.width - inset, y + len(shown) * tall), theme.radius, theme.surface)
        for k in shown:
            box = (inset, y + k * tall, scene.width - inset, y + (k + 1) * tall)
            if variant == "tiles":
                canvas.round((box[0], box[1] + 1, box[2], box[3] - 1), theme.radius, theme.surface)
            elif k and variant != "plain":
                canvas.line(inset + theme.margin, box[2] - theme.margin / 2, box[1], theme.line)
            setting_row(scene, group[k], box, pictures, trail, twofold)
        y += len(shown) * tall
        i += len(group)
    scene.state["scrolls"] = scene.bottom - y < tall


def setting_row(scene: Scene, label: str, box, pictures: str, trail: str, twofold: bool) -> None:
    """One row of a settings page; `box` in units is its tap target."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    y, x, right = (box[1] + box[3]) / 2, box[0] + theme.margin, box[2] - theme.margin
    tall, mark = box[3] - box[1], None
    if pictures != "none":
        side = min(tall * 0.66, 18.0)
        if pictures == "tile":
            mark = scene.app_tile(x, y - side / 2, side, label)
        else:
            name = scene.decoration(label)
            if name:
                mark = canvas.glyph(
                    name, x + side / 2, y, side * 0.9, theme.accent_text, theme.stroke, theme.filled
                )
        x += side + 6
    kind = trail if trail != "mixed" else rng.choice(("chevron", "value", "toggle", "none"))
    if kind == "toggle":
        right = toggle(scene, right, y, rng.random() < 0.5) - 4
    elif kind in ("chevron", "value"):
        right = chevron(scene, right, y) - 2
    second = (
        scene.filler(rng.randint(6, 14) if scene.lang == "zh" else rng.randint(12, 24)) if twofold else ""
    )
    shift = scene.size * 0.62 if second else 0
    ink = canvas.text(x, y - shift, label, scene.size, theme.text)
    if second:
        small = scene.size * 0.76
        while second and canvas.measure(second, small) > right - x:
            second = second[:-2]
        canvas.text(x, y + scene.size * 0.62, second, small, theme.muted)
    if kind == "value":
        value = scene.filler(rng.randint(2, 4) if scene.lang == "zh" else rng.randint(3, 8))
        if value and canvas.measure(value, scene.size * 0.85) + ink[2] / canvas.scale + 6 < right:
            canvas.text(right, y, value, scene.size * 0.85, theme.muted, "r")
    scene.add(label, "text", "row", canvas.pixels(box), union(ink, mark))


def avatar(scene: Scene, x: float, y: float, side: float, label: str, shape: str) -> None:
    """A contact's picture centred on (x, y): first letter on a colour, or a plain person."""
    canvas, (first, second) = scene.canvas, scene.theme.colours(scene.rng)
    if shape == "circle":
        canvas.disc(x, y, side / 2, first)
    else:
        canvas.round((x - side / 2, y - side / 2, x + side / 2, y + side / 2), side * 0.2, first)
    if scene.rng.random() < 0.8:
        canvas.text(x, y, label[0], side * 0.5, readable_on(first), "m", True)
    else:
        canvas.disc(x, y - side * 0.1, side * 0.17, second)
        canvas.round((x - side * 0.28, y + side * 0.1, x + side * 0.28, y + side * 0.34), side * 0.2, second)


def person_rows(scene: Scene, tall: float, draw_row) -> None:
    """As many rows of people as the density asks for; `draw_row(label, box)` draws one."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    room = int((scene.bottom - scene.top) / tall)
    labels = scene.labels("contact", min(room, max(len(scene.must), scene.count(4, 8, 15))), width=100)
    cards = theme.style == "test"
    for i, label in enumerate(labels):
        box = (0.0, scene.top + i * tall, scene.width, scene.top + (i + 1) * tall)
        if cards:
            inner = (theme.margin / 2, box[1] + 1, scene.width - theme.margin / 2, box[3] - 1)
            canvas.round(inner, theme.radius, theme.surface)
        elif i and theme.margin < 10:
            canvas.line(theme.margin, scene.width, box[1], theme.line)
        draw_row(label, box)
    scene.state["scrolls"] = len(labels) == room
    if rng.random() < 0.3:
        floating_button(scene)


def floating_button(scene: Scene) -> None:
    """A round button over the page's lower right corner; elements below it are no targets any more."""
    canvas, theme = scene.canvas, scene.theme
    x, y = scene.width - 24, scene.bottom - 24
    box = canvas.pixels((x - 15, y - 15, x + 15, y + 15))
    name = scene.rng.choice(("add", "edit", "send", "phone", "search"))
    if scene.must_near(box) or not scene.take_icon(name):
        return
    scene.cover(box)
    canvas.disc(x, y, 15, theme.accent)
    glyph = canvas.glyph(name, x, y, 15, readable_on(theme.accent), theme.stroke, theme.filled)
    scene.add(name, "icon", "icon", box, glyph)


def contacts(scene: Scene) -> None:
    """Names with pictures, perhaps numbers below, glyphs to call, and an index of letters at the right."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    start_page(scene, rng.choice((0, 1, 2)), prefer=("add", "search"))
    if "search" not in scene.icons and rng.random() < 0.4:
        field_line(scene)
    tall = max(theme.row * rng.uniform(0.95, 1.15), scene.size * 1.9)
    if scene.hard:
        tall = max(scene.size * 1.8, min(tall, (scene.bottom - scene.top) / rng.randint(16, 22)))
    shape, number = rng.choice(("circle", "circle", "square")), rng.random() < 0.3 and tall > scene.size * 2.4
    calls = "phone" not in scene.icons and rng.random() < 0.35
    index = not calls and rng.random() < 0.3
    if calls:
        scene.icons.add("phone")
    side = min(tall * 0.76, 26.0)

    def row(label: str, box) -> None:
        y, x = (box[1] + box[3]) / 2, theme.margin + side / 2
        avatar(scene, x, y, side, label, shape)
        right = scene.width
        if calls:
            canvas.glyph(
                "phone", scene.width - theme.margin - 7, y, 13, theme.accent_text, theme.stroke, theme.filled
            )
            right -= theme.margin + 16
        elif index:
            right -= 12
        shift = scene.size * 0.6 if number else 0
        ink = canvas.text(x + side / 2 + 7, y - shift, label, scene.size, theme.text, strong=strong)
        if number:
            digits = "".join(str(rng.randint(0, 9)) for _ in range(8))
            canvas.text(
                x + side / 2 + 7, y + scene.size * 0.62, f"13{digits}", scene.size * 0.76, theme.muted
            )
        target = canvas.pixels((box[0], box[1], right, box[3]))
        scene.add(label, "text", "row", target, ink)

    strong = rng.random() < 0.3
    if index:
        step = (scene.bottom - scene.top - 10) / 26
        for i in range(26):
            canvas.text(scene.width - 6, scene.top + 5 + (i + 0.5) * step, chr(65 + i), 7, theme.muted, "m")
    person_rows(scene, tall, row)
    end_page(scene)


def messages(scene: Scene) -> None:
    """Conversations: picture, name, the last message, its time, perhaps a count of unread ones."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    start_page(scene, rng.choice((0, 1, 2)), back=rng.random() < 0.6, prefer=("search", "add", "edit"))
    if "search" not in scene.icons and rng.random() < 0.3:
        field_line(scene)
    tall = max(theme.row * rng.uniform(1.1, 1.35), scene.size * 2.75)
    if scene.hard:
        tall = max(scene.size * 2.65, min(tall, (scene.bottom - scene.top) / rng.randint(13, 16)))
    shape, side = rng.choice(("circle", "square")), min(tall * 0.76, 32.0)
    strong = rng.random() < 0.5

    def row(label: str, box) -> None:
        y, x = (box[1] + box[3]) / 2, theme.margin + side / 2
        avatar(scene, x, y, side, label, shape)
        left = x + side / 2 + 7
        ink = canvas.text(left, y - scene.size * 0.66, label, scene.size, theme.text, strong=strong)
        when = f"{rng.randint(0, 23)}:{rng.randint(0, 59):02d}"
        canvas.text(scene.width - theme.margin, y - scene.size * 0.66, when, 8, theme.muted, "r")
        preview = scene.filler(rng.randint(5, 13) if scene.lang == "zh" else rng.randint(10, 24))
        canvas.text(left, y + scene.size * 0.64, preview, scene.size * 0.78, theme.muted)
        if rng.random() < 0.25:
            canvas.disc(scene.width - theme.margin - 5, y + scene.size * 0.64, 5, (230, 60, 50))
            unread = str(rng.randint(1, 30))
            canvas.text(scene.width - theme.margin - 5, y + scene.size * 0.64, unread, 6.5, WHITE, "m", True)
        scene.add(label, "text", "row", canvas.pixels(box), ink)

    person_rows(scene, tall, row)
    end_page(scene)
