"""Screens to type on: search, and forms or chats with a keyboard."""

from __future__ import annotations

from labkit.phonetap.drawing.bars import PLACEHOLDERS, plan_navigation, status_bar, text_field, title_bar
from labkit.phonetap.drawing.canvas import mix, union
from labkit.phonetap.drawing.lists import end_page
from labkit.phonetap.drawing.scene import Scene
from labkit.phonetap.drawing.themes import readable_on

LETTERS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
CANCEL = {"zh": ("取消", "搜索"), "en": ("Cancel", "Search")}


def blank_page(scene: Scene) -> None:
    """Background and status bar."""
    scene.canvas.rect((0, 0, scene.width, scene.canvas.height + 1), scene.theme.background)
    status_bar(scene, scene.theme.text)
    plan_navigation(scene)


def typed_text(scene: Scene, width: float) -> str:
    """Something that a user may have typed, at most `width` units long, or ""."""
    labels = scene.words.sample_labels(scene.rng, "chip", scene.lang, 2, scene.part)
    return next((label for label in labels if scene.fits(label, width) and scene.claim(label)), "")


def search(scene: Scene) -> None:
    """A field, a word to leave, earlier searches as chips, suggestions as rows."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    blank_page(scene)
    height = rng.uniform(20, 25)
    y = scene.top + height / 2 + 4
    left, right = theme.margin, scene.width - theme.margin
    if rng.random() < 0.4 and scene.take_icon("back"):
        scene.icon("back", left + 7, y, 15, theme.text)
        left += 22
    leave = next((word for word in CANCEL[scene.lang] if rng.random() < 0.7 and scene.claim(word)), None)
    if leave:
        wide = canvas.measure(leave, scene.size)
        ink = canvas.text(right - wide, y, leave, scene.size, theme.accent_text)
        box = canvas.pixels((right - wide - 4, y - height / 2, scene.width, y + height / 2))
        scene.add(leave, "text", "button", box, ink)
        right -= wide + 8
    typed = typed_text(scene, right - left - 32) if rng.random() < 0.5 else ""
    text_field(scene, left, right, y, height, typed, glyph=True)
    scene.state["field"] = typed
    scene.top = y + height / 2 + 6
    keys = rng.random() < 0.25
    if keys:
        keyboard_block(scene)
    chips(scene, max(len(scene.must) // 2, scene.count(2, 5, 9)))
    suggestions(scene)
    end_page(scene, scene.key_ground if keys else None)


def chips(scene: Scene, count: int) -> None:
    """Rounded labels that flow over lines; moves `scene.top` below them."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    heading = scene.filler(rng.randint(3, 6))
    if rng.random() < 0.6:
        canvas.text(theme.margin, scene.top + 7, heading, scene.size * 0.9, theme.text, strong=True)
        scene.top += 16
    tall, x, y = scene.size * 1.75, theme.margin, scene.top + 1
    look = rng.choice(("filled", "edge", "tinted"))
    radius = rng.choice((3.0, tall / 2))
    queue = scene.labels("chip", count, width=150)
    while queue:
        label = queue.pop(0)
        wide = canvas.measure(label, scene.size) + 14
        if x + wide > scene.width - theme.margin:
            x, y = theme.margin, y + tall + 5
        if y + tall > scene.bottom - 6:
            scene.must += [left_out for left_out in (label, *queue) if left_out in scene.required]
            break
        fill = mix(theme.background, theme.text, 0.08)
        if look != "filled":
            fill = theme.background if look == "edge" else mix(theme.background, theme.accent, 0.15)
        canvas.round((x, y, x + wide, y + tall), radius, fill, theme.muted if look == "edge" else None)
        ink = canvas.text(x + wide / 2, y + tall / 2, label, scene.size, theme.text, "m")
        scene.add(label, "text", "chip", canvas.pixels((x, y, x + wide, y + tall)), ink)
        x += wide + 5
    scene.top = y + tall + 6


def suggestions(scene: Scene) -> None:
    """Rows of suggested searches, each led by the same glyph."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    tall = max(theme.row * 0.9, scene.size * 1.85)
    room = int((scene.bottom - scene.top) / tall)
    if room < 1:
        return
    mark = next((n for n in rng.sample(("search", "clock", "globe"), 3) if n not in scene.icons), None)
    if "search" in scene.decorations and rng.random() < 0.5:
        mark = "search"
    if mark:
        scene.icons.add(mark)
        scene.decorations.add(mark)
    labels = scene.labels("chip", min(room, max(len(scene.must), scene.count(2, 5, 9))), width=150)
    for i, label in enumerate(labels):
        y = scene.top + i * tall
        x, sign = theme.margin, None
        if mark:
            sign = canvas.glyph(mark, x + 6, y + tall / 2, 11, theme.muted, 2.2)
            x += 19
        ink = canvas.text(x, y + tall / 2, label, scene.size, theme.text)
        canvas.line(x, scene.width, y + tall, theme.line)
        scene.add(label, "text", "row", canvas.pixels((0, y, scene.width, y + tall)), union(ink, sign))


def keyboard_block(scene: Scene) -> None:
    """Letters in three rows at the bottom, each a target; raises `scene.bottom`."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    scene.state["keyboard"] = True
    row = rng.uniform(24, 29)
    top = scene.bottom - 4 * row - 6
    ground = mix(theme.background, (120, 126, 138), 0.32)
    key = mix(theme.surface, (255, 255, 255), 0.12 if theme.dark else 0.7)
    ink = readable_on(key)
    scene.key_ground = ground
    canvas.rect((0, top, scene.width, canvas.height + 1), ground)
    pitch, gap, radius = scene.width / 10, rng.uniform(0.8, 1.8), rng.choice((1.0, 3.0, 5.0))
    flat, upper = rng.random() < 0.2, rng.random() < 0.5
    size = rng.uniform(11, 13.5)
    for r, letters in enumerate(LETTERS):
        left = (scene.width - len(letters) * pitch) / 2
        y = top + 4 + r * row
        for c, letter in enumerate(letters):
            shown = letter.upper() if upper else letter
            if not scene.claim(shown):
                continue
            box = (left + c * pitch + gap, y + gap, left + (c + 1) * pitch - gap, y + row - gap * 1.5)
            if not flat:
                canvas.round(box, radius, key)
            middle = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            text = canvas.text(*middle, shown, size, theme.text if flat else ink, "m")
            scene.add(shown, "text", "key", canvas.pixels(box), text)
    soft = mix(ground, theme.text, 0.2)
    y = top + 4 + 2 * row
    for x0, x1 in ((0, pitch * 1.5), (scene.width - pitch * 1.5, scene.width)):
        canvas.round((x0 + gap, y + gap, x1 - gap, y + row - gap * 1.5), radius, soft)
        canvas.disc((x0 + x1) / 2, y + row / 2, 2.5, theme.text)
    y += row
    for x0, x1, shade in ((0, 40, soft), (40, 150, key), (150, 196, theme.accent)):
        canvas.round((x0 + gap, y + gap, x1 - gap, y + row - gap * 1.5), radius, shade)
    scene.bottom = top


def keyboard(scene: Scene) -> None:
    """A form or a chat with the keyboard up."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    blank_page(scene)
    if rng.random() < 0.8:
        title_bar(scene, rng.choice((0, 1, 2)))
    keyboard_block(scene)
    if rng.random() < 0.5:
        chat(scene)
    else:
        form(scene)
    canvas.line(0, scene.width, scene.bottom, theme.line)
    end_page(scene, scene.key_ground)


def form(scene: Scene) -> None:
    """One to three fields, one of them perhaps filled in, and buttons."""
    rng, theme = scene.rng, scene.theme
    height, margin = max(rng.uniform(20, 25), scene.size * 1.7), theme.margin + 2
    y = scene.top + 8
    names = list(PLACEHOLDERS[scene.lang])
    rng.shuffle(names)
    filled = rng.random() < 0.5
    for i in range(rng.randint(1, 3)):
        typed = typed_text(scene, 130) if filled and i == 0 else ""
        text_field(scene, margin, scene.width - margin, y + height / 2, height, typed, placeholder=names[i])
        if typed:
            scene.state["field"] = typed
        y += height + rng.uniform(6, 12)
    each = (scene.width - 2 * margin) / 2
    count = max(len(scene.must), rng.randint(1, 2))
    labels = scene.labels("button", count, width=each - 12)
    for start in range(0, len(labels), 2):
        pair = labels[start : start + 2]
        if y + height > scene.bottom - 3:
            break
        wide = (scene.width - 2 * margin) / len(pair)
        for k, label in enumerate(pair):
            box = (margin + k * wide + 2, y, margin + (k + 1) * wide - 2, y + height)
            scene.button(label, box, start + k == 0)
        y += height + 6


def chat(scene: Scene) -> None:
    """Bubbles, and a field with a button to send above the keyboard."""
    rng, canvas, theme = scene.rng, scene.canvas, scene.theme
    height = rng.uniform(20, 24)
    y = scene.bottom - height / 2 - 5
    right = scene.width - theme.margin
    named = bool(scene.must) or rng.random() < 0.5
    if named:
        for label in scene.labels("button", max(1, len(scene.must)), width=70):
            wide = canvas.measure(label, scene.size, True) + 12
            if right - wide < 60:
                break
            scene.button(label, (right - wide, y - height / 2, right, y + height / 2), True, 5)
            right -= wide + 5
    else:
        for name in scene.take_icons(rng.randint(1, 2), ("send", "microphone", "add")):
            scene.icon(name, right - 8, y, 16, theme.accent_text, reach=1.3)
            right -= 22
    left = theme.margin
    if rng.random() < 0.4:
        (name,) = scene.take_icons(1, ("add", "microphone", "image", "camera")) or (None,)
        if name:
            scene.icon(name, left + 7, y, 14, theme.text, reach=1.3)
            left += 20
    typed = typed_text(scene, right - left - 16) if rng.random() < 0.5 else ""
    text_field(scene, left, right, y, height, typed)
    scene.state["field"] = typed
    top, mine = scene.top + 6, rng.random() < 0.5
    while top + 24 < y - height / 2:
        text = scene.filler(rng.randint(4, 11) if scene.lang == "zh" else rng.randint(8, 20))
        wide = canvas.measure(text, scene.size * 0.85) + 14
        x0 = scene.width - theme.margin - wide if mine else theme.margin
        fill = mix(theme.background, theme.accent, 0.25) if mine else mix(theme.background, theme.text, 0.1)
        canvas.round((x0, top, x0 + wide, top + 19), 6, fill)
        canvas.text(x0 + 7, top + 9.5, text, scene.size * 0.85, theme.muted)
        top, mine = top + 24, rng.random() < 0.5
