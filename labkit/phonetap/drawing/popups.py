"""Pop-ups over another screen: questions with buttons, sheets of choices, notes in a corner."""

from __future__ import annotations

from labkit.phonetap.drawing.canvas import intersects, mix
from labkit.phonetap.drawing.home import home
from labkit.phonetap.drawing.lists import contacts, messages, settings
from labkit.phonetap.drawing.pages import detail, menu
from labkit.phonetap.drawing.scene import Scene

BELOW = (home, settings, contacts, messages, menu, detail)


def dialog(scene: Scene) -> None:
    """Draw another screen, darken it, and put a pop-up on top; only the pop-up's own targets count."""
    rng, canvas = scene.rng, scene.canvas
    must, scene.must = scene.must, []
    hard, scene.hard = scene.hard, False
    rng.choice(BELOW)(scene)
    scene.must, scene.hard = must, hard
    covered = tuple(element.label for element in scene.elements)
    scene.elements = []
    scene.state |= {"popup": True, "covered": covered, "scrolls": False}
    scene.bottom = canvas.height
    canvas.dim(rng.uniform(0.4, 0.62))
    variant = rng.choice(scene.theme.options.dialog_variants)
    if len(must) > 3 or (scene.hard and rng.random() < 0.4):
        variant = "grid" if scene.theme.style == "test" else "sheet"
    if variant == "flow":
        sheet_flow(scene)
    elif variant in ("sheet", "grid"):
        sheet(scene, variant == "grid")
    else:
        box(scene, variant)


def body(scene: Scene, x: float, y: float, width: float, lines: int, align: str) -> float:
    """Lines of explanation; returns the height below them."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    size = scene.size * 0.86
    for _ in range(lines):
        text = scene.filler(rng.randint(8, 14) if scene.lang == "zh" else rng.randint(14, 28))
        while text and canvas.measure(text, size) > width:
            text = text[:-1]
        canvas.text(x, y + size * 0.6, text, size, theme.muted, align)
        y += size * 1.4
    return y


def box(scene: Scene, variant: str) -> None:
    """A card in the middle (row, stack), at the top or bottom edge (strip) or with a cross (corner)."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    count = max(len(scene.must), rng.randint(1 if variant == "corner" else 2, 3))
    stacked = variant == "stack" or count > 2
    edge = 6.0 if variant == "strip" else rng.uniform(12, 26)
    left, right = edge, scene.width - edge
    inner = right - left - 16
    labels = scene.labels("button", count, width=(inner if stacked else inner / count) - 8)
    tall, lines = max(rng.uniform(20, 26), scene.size * 1.75), rng.randint(1, 3)
    foot = (tall + 4) * (len(labels) if stacked else 1)
    height = 12 + scene.size * 2 + lines * scene.size * 1.25 + 8 + foot + 6
    top = 18 + (canvas.height - height - 32) * rng.uniform(0.15, 0.85)
    if variant == "strip":
        top = 18 if rng.random() < 0.5 else canvas.height - height - 14
    canvas.round((left, top, right, top + height), max(3, theme.radius), theme.surface)
    align = rng.choice("lm")
    x = 98 if align == "m" else left + 10
    title = scene.title()
    canvas.text(x, top + 12 + scene.size * 0.5, title, scene.size * 1.2, theme.text, align, True)
    if (variant == "corner" or rng.random() < 0.15) and (
        align == "l" or canvas.measure(title, scene.size) < 90
    ):
        cross(scene, right - 12, top + 13)
    body(scene, x, top + 12 + scene.size * 1.8, inner - 4, lines, align)
    y = top + height - foot - 4
    primary = rng.randrange(len(labels)) if labels else 0
    ruled = not stacked and rng.random() < 0.3
    for i, label in enumerate(labels):
        if stacked:
            area = (left + 8, y + i * (tall + 4), right - 8, y + i * (tall + 4) + tall)
        else:
            each = inner / len(labels)
            area = (left + 8 + i * each + 2, y, left + 8 + (i + 1) * each - 2, y + tall)
        scene.button(label, area, i == primary and not ruled)
    if ruled:
        canvas.line(left, right, y - 3, theme.line)


def cross(scene: Scene, x: float, y: float) -> None:
    """A cross to close with, unless that glyph is on the screen already."""
    if scene.take_icon("close"):
        scene.icon("close", x, y, 12, scene.theme.text, reach=1.5)


def sheet(scene: Scene, grid: bool) -> None:
    """Choices that rose from the bottom edge: rows, or a grid of tiles."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    count = max(len(scene.must), rng.randint(3, 6) if not scene.hard else rng.randint(7, 12))
    if grid:
        return sheet_grid(scene, count)
    labels = scene.labels("menu", count, width=150)
    tall = max(rng.uniform(22, 28), scene.size * 1.75)
    titled = rng.random() < 0.6
    height = len(labels) * tall + (22 if titled else 6) + 12
    top = canvas.height - height
    canvas.round((0, top, scene.width, canvas.height + 14), max(6, theme.radius), theme.surface)
    if rng.random() < 0.4:
        canvas.round((84, top + 3, 112, top + 5), 1, theme.line)
    y = top + 6
    if titled:
        canvas.text(98, top + 14, scene.title(), scene.size, theme.muted, "m")
        if rng.random() < 0.4:
            cross(scene, scene.width - 14, top + 12)
        y = top + 22
    centred, glyphs = rng.random() < 0.5, rng.random() < 0.4
    for i, label in enumerate(labels):
        row = (0.0, y + i * tall, scene.width, y + (i + 1) * tall)
        middle, x = (row[1] + row[3]) / 2, 98.0
        if not centred:
            x = theme.margin + 4
            if glyphs:
                name = scene.decoration(label)
                if name:
                    canvas.glyph(name, x + 6, middle, 13, theme.text, theme.stroke, theme.filled)
                x += 21
        ink = canvas.text(x, middle, label, scene.size, theme.text, "m" if centred else "l")
        canvas.line(theme.margin, scene.width - theme.margin, row[1], theme.line)
        scene.add(label, "text", "row", canvas.pixels(row), ink)


def sheet_grid(scene: Scene, count: int) -> None:
    """Choices as tiles of words in two columns."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    labels = scene.labels("menu", count, width=80, lines=2 if scene.lang == "en" else 1)
    tall = max(rng.uniform(26, 32), scene.size * 2.7)
    rows = -(-len(labels) // 2)
    top = canvas.height - rows * (tall + 4) - 34
    canvas.round((0, top, scene.width, canvas.height + 14), max(6, theme.radius), theme.surface)
    canvas.text(98, top + 13, scene.title(), scene.size * 1.1, theme.text, "m", True)
    shade = mix(theme.surface, theme.text, 0.07)
    for i, label in enumerate(labels):
        r, c = divmod(i, 2)
        x0, y0 = 6 + c * 93, top + 24 + r * (tall + 4)
        canvas.round((x0, y0, x0 + 91, y0 + tall), theme.radius, shade)
        lines = scene.wrap(label, 84)
        first = y0 + tall / 2 - (len(lines) - 1) * scene.size * 0.56
        ink, _ = scene.caption(x0 + 45.5, first, label, 84, theme.text)
        scene.add(label, "text", "chip", canvas.pixels((x0, y0, x0 + 91, y0 + tall)), ink)


def sheet_flow(scene: Scene) -> None:
    """Choices as pills as wide as their words, in lines of two or three, at the bottom edge or above it."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    left, right, gap = theme.margin, scene.width - theme.margin, rng.uniform(4, 7)
    labels = scene.labels("menu", max(len(scene.must), rng.randint(3, 7)), width=right - left - 20)
    tall = max(rng.uniform(20, 26), scene.size * 1.75)
    lines: list[list[tuple[str, float]]] = [[]]
    x = left
    for label in labels:
        wide = canvas.measure(label, scene.size) + rng.uniform(12, 20)
        if lines[-1] and x + wide > right:
            lines.append([])
            x = left
        lines[-1].append((label, wide))
        x += wide + gap
    height = len(lines) * (tall + gap) + 26
    bottom = canvas.height - rng.choice((0.0, 0.0, rng.uniform(10, 60)))
    top = bottom - height
    canvas.round((0, top, scene.width, bottom + 14), max(6, theme.radius), theme.surface)
    canvas.text(
        rng.choice((98.0, left + 40)), top + 12, scene.title(), scene.size * 1.1, theme.text, "m", True
    )
    centred, primary = rng.random() < 0.4, rng.randrange(len(labels) or 1)
    for row, line in enumerate(lines):
        spare = right - left - sum(wide for _, wide in line) - gap * (len(line) - 1)
        x = left + (max(0.0, spare) / 2 if centred else 0.0)
        y = top + 22 + row * (tall + gap)
        for label, wide in line:
            area = (x, y, min(x + wide, scene.width - 1), y + tall)
            scene.button(label, area, label == labels[primary], radius=tall / 2)
            x += wide + gap


def toast(scene: Scene) -> None:
    """A note that floats over the page and covers part of it; the rest can still be tapped."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    height, edge = rng.uniform(24, 44), rng.uniform(6, 22)
    top = rng.choice((16.0, rng.uniform(60, canvas.height - 110), canvas.height - height - 40))
    area = canvas.pixels((edge, top, scene.width - edge, top + height))
    if scene.must_near(area):
        return
    hidden = [element.label for element in scene.elements if intersects(element.box, area)]
    if len(hidden) >= len(scene.elements) - 1:
        return
    scene.cover(area)
    scene.state |= {"popup": True, "covered": tuple(hidden)}
    dark = rng.random() < 0.5
    ground, ink = ((44, 46, 52), (240, 240, 244)) if dark else (theme.surface, theme.text)
    canvas.round(
        (edge, top, scene.width - edge, top + height), rng.choice((4, 9, 12)), ground, theme.muted, 0.6
    )
    right = scene.width - edge - 6
    if rng.random() < 0.7 and scene.take_icon("close"):
        scene.icon("close", right - 6, top + height / 2, 11, ink, reach=1.8)
        right -= 22
    canvas.disc(edge + 13, top + height / 2, 6, theme.accent)
    for row in range(2 if height > 32 else 1):
        text = scene.filler(rng.randint(6, 10) if scene.lang == "zh" else rng.randint(10, 20))
        while text and canvas.measure(text, scene.size * 0.82) > right - edge - 24:
            text = text[:-1]
        y = top + height * (0.5 if height <= 32 else 0.32 + 0.36 * row)
        canvas.text(edge + 24, y, text, scene.size * 0.82, ink if row == 0 else mix(ink, ground, 0.35))
